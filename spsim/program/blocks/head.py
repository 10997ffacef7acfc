"""The head after the last layer: final norm, output projection and vocabulary-parallel cross-entropy.

The loss is Megatron-Core's `vocab_parallel_cross_entropy` (Shoeybi et al. 2019, arXiv:1909.08053, section 3), kernel by
kernel: it reads and writes fp32 logits six times, 52 bytes a 16-bit logit with the backward pass. Fused it is
Transformer Engine's: 10 bytes a logit, which stays in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from spsim.inputs.model import Model
from spsim.inputs.workload import Workload
from spsim.program.blocks.block import ModelBlock
from spsim.program.blocks.embedding import TABLE, TOKEN_BYTES
from spsim.program.launches import Launch, Launches
from spsim.program.operators import Operator, Tensor, TensorKind
from spsim.program.strategies import WHOLE_VOCABULARY

LOSS_BYTES = 4
"""The loss is computed in fp32."""
LAST_HIDDEN, PREDICTED_HIDDEN = "last_hidden", "predicted_hidden"
"""What it reads for the next token, and for the one after it."""
PREDICTED = "mtp_"
"""Begins the names of what is computed for that one."""
OUTPUT = "output_layer_weight"
"""Of the output layer, unless it is the table of the embedding."""


_COPY = Launch(narrow=2, kernel="copy")


class Head(ModelBlock):
    """The operators of the head."""

    of = ""
    """Begins the names of operators and tensors, but weights."""

    def tensor(self, name: str, dims: str, kind: TensorKind = "activation", *given: Any, **further: Any) -> Tensor:
        """A tensor of what is computed for a token."""
        return super().tensor(name if kind == "weight" else f"{self.of}{name}", dims, kind, *given, **further)

    def add(self, name: str, *given: Any, **further: Any) -> None:
        """An operator of that."""
        super().add(f"{self.of}{name}", *given, **further)

    def part(self, x: Tensor) -> Tensor:
        """A view of what comes in one tensor (torch.chunk), of whose parts the gradients are put together."""
        out = self.tensor(f"{x.name}_part", "s b h")
        self.add(f"{x.name}_part", "elementwise", "s b h -> s b h", [x], [out], launches=Launches((), (_COPY,)))
        return out

    def predicted(self, x: Tensor, *, loss_fusion: bool, loss_parallel: bool) -> None:
        """Logits and loss of a token."""
        logits = self.output_layer(x)
        before_loss = len(self.operators)
        if loss_fusion:
            self.fused_loss(logits)
        else:
            self.unfused_loss(self.in_fp32(logits))
        if not loss_parallel:
            loss = [replace(own, rules=WHOLE_VOCABULARY) for own in self.operators[before_loss:]]
            self.operators[before_loss:] = loss

    def output_layer(self, x: Tensor, tokens: str = "s b") -> Tensor:
        """Logits of some tokens: a column-parallel linear, split by the vocabulary."""
        out = self.tensor("logits", f"{tokens} v")
        weight = self.weight(TABLE if is_tied(self.model) else OUTPUT, "v h")
        bias = [self.weight("output_layer_bias", "v")] if self.model.head_bias else []
        left = ", ".join([f"{tokens} h, v h"] + ["v"] * len(bias))
        self.add(
            "output_layer", "gemm", f"{left} -> {tokens} v", [x, weight, *bias], [out], saves=[x], owns_gather=[x]
        )  # fmt: skip
        return out

    def statistics(self, name: str, itemsize: int = LOSS_BYTES) -> Tensor:
        """One number of each token, or several."""
        return self.tensor(name, "s b", "statistics", itemsize=itemsize)

    def targets(self) -> Tensor:
        """The token that is to be predicted at each position."""
        return self.tensor("targets", "s b", "token ids", itemsize=TOKEN_BYTES)

    def in_fp32(self, logits: Tensor) -> Tensor:
        """A copy of the logits, unless they are in fp32 already."""
        if logits.itemsize == LOSS_BYTES:
            return logits
        out = self.tensor("fp32_logits", "s b v", itemsize=LOSS_BYTES)
        self.add("logits_to_fp32", "elementwise", "s b v -> s b v", [logits], [out])
        return out

    def reduced(self, name: str, x: Tensor) -> Tensor:
        """Over the vocabulary."""
        out = self.statistics(name)
        self.add(name, "elementwise", "s b v -> s b", [x], [out])
        return out

    def unfused_loss(self, x: Tensor) -> None:
        """Softmax in the memory of the fp32 logits, which is all that is kept beside 9 bytes a token."""
        largest = self.reduced("logits_max", x)
        shifted, exponentials = (self.tensor(n, "s b v", itemsize=LOSS_BYTES) for n in ("shifted", "exponentials"))
        targets, of_target = self.targets(), self.statistics("target_logit")
        self.add(
            "subtract_max", "elementwise", "s b v, s b -> s b v", [x, largest], [shifted],
            passthrough=[x], in_place=True,
        )  # fmt: skip
        self.add("target_logit", "embedding", "s b, s b v -> s b", [targets, shifted], [of_target])
        self.add(
            "exp", "elementwise", "s b v -> s b v", [shifted], [exponentials], passthrough=[shifted], in_place=True
        )
        total = self.reduced("sum_exp", exponentials)
        softmax = self.tensor("softmax", "s b v", "probabilities", itemsize=LOSS_BYTES)
        elsewhere = self.tensor("target_mask", "s b", "mask", itemsize=1)
        masked = self.tensor("masked_target", "s b", "mask", itemsize=TOKEN_BYTES)
        self.add(
            "cross_entropy", "elementwise", "s b v, s b, s b, s b -> s b v", [exponentials, of_target, total, targets],
            [softmax, elsewhere, masked, self.tensor("loss", "s b", "loss", itemsize=LOSS_BYTES)],
            saves=[softmax, elsewhere, masked], in_place=True,
        )  # fmt: skip

    def fused_loss(self, logits: Tensor) -> None:
        """Largest logit, sum of exponentials and logit of the target in one kernel; another writes the gradient of the
        logits over them, which the backward pass scales.
        """
        targets, of_row = self.targets(), self.statistics("online_softmax", 3 * LOSS_BYTES)
        self.add("online_softmax", "cross_entropy", "s b v, s b -> s b", [logits, targets], [of_row])
        gradient = self.tensor("logits_gradient", "s b v", "probabilities")
        self.add(
            "cross_entropy", "cross_entropy", "s b v, s b, s b -> s b v", [logits, of_row, targets],
            [gradient, self.tensor("loss", "s b", "loss", itemsize=LOSS_BYTES)], saves=[gradient], in_place=True,
        )  # fmt: skip


head_traits = attrgetter("hidden", "norm", "head_bias", "runs_as", "mtp_layers")
"""What of a model, beside the rows of its head and whether they are the embedding's, the head depends on."""


def is_tied(model: Model) -> bool:
    """Whether the head reads the table of the embedding."""
    return model.tied_embeddings and model.head_rows == model.vocab


def head_block(
    model: Model,
    workload: Workload,
    replicas: int = 1,
    *,
    vocab: int | None = None,
    loss_fusion: bool = False,
    loss_parallel: bool = True,
) -> tuple[Operator, ...]:
    """From the output of the last layer [s b h] to the loss, in forward order; of a model with multi-token prediction
    from the two outputs of its block to two losses.

    `vocab` are the rows of the output layer, those of the model and its padding. Products are of the type of the
    activations, whatever type those of the layers are of. A head of tied embeddings reads the table of the embedding.
    Without `loss_parallel` the loss reads the logits of the whole vocabulary.
    """
    block = Head(model, workload, replicas, v=vocab or model.head_rows)
    hidden, options = block.tensor(LAST_HIDDEN, "s b h"), {"loss_fusion": loss_fusion, "loss_parallel": loss_parallel}
    if model.mtp_layers:
        # Both are normalised; the loss of the further token is computed first (`process_mtp_loss` of Megatron-Core).
        further, hidden = block.part(block.tensor(PREDICTED_HIDDEN, "s b h")), block.part(hidden)
        block.of = PREDICTED
        block.predicted(further, **options)
        block.of = ""
    else:
        hidden = block.norm("final_norm", hidden)
    block.predicted(hidden, **options)
    return tuple(block.operators)
