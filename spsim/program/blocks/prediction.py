"""Multi-token prediction: one more layer, for the token after the next (DeepSeek-AI 2024, arXiv:2412.19437, section
2.2), as `MultiTokenPredictionLayer` of Megatron-Core runs it between the final norm and the head.

Hidden states and the embedding of the next token are normalised, joined and projected from 2h to h, go through a layer
of the model and a norm, and are handed to the head with the hidden states. Dimension z is 2h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from spsim.inputs.model import Model
from spsim.inputs.workload import Workload
from spsim.program.blocks.embedding import TOKEN_BYTES, EmbeddingBlock
from spsim.program.blocks.head import LAST_HIDDEN, PREDICTED_HIDDEN
from spsim.program.blocks.transformer import LAYER_INPUT
from spsim.program.operators import Operator, Tensor

PROJECTION = "eh_proj"


def prediction_block(
    model: Model, workload: Workload, replicas: int, layer: Sequence[Operator], *, vocab: int
) -> tuple[Operator, ...]:
    """From the output of the last layer [s b h] to what the head reads for both tokens; `layer` are the operators of
    its layer. `vocab` are the rows of the embedding with their padding.
    """
    block = EmbeddingBlock(model, workload, replicas, v=vocab, z=2 * model.hidden)
    hidden = block.norm("final_norm", block.tensor("last_layer_out", "s b h"))
    ids = block.tensor("next_tokens", "s b", "token ids", itemsize=TOKEN_BYTES)
    embedded = block.norm("enorm", block.to_sequence_first(block.lookup("embedding", ids, "v")))
    joined = block.tensor("joined", "s b z")
    block.add(
        "join", "elementwise", "s b h, s b h -> s b z", [embedded, block.norm("hnorm", hidden)], [joined],
        mixes="h z", kernel="copy",
    )  # fmt: skip
    given = _projected(block, joined)
    before, block.operators = block.operators, []
    inner = [_reading(op, given) for op in layer]
    made = block.norm("mtp_final_norm", inner[-1].results[0].tensor)
    for name, own in ((PREDICTED_HIDDEN, made), (LAST_HIDDEN, hidden)):  # torch.cat, whose gradients are views
        block.add(
            f"{name}_copy", "elementwise", "s b h -> s b h", [own], [block.tensor(name, "s b h")], passthrough=[own],
            kernel="copy",
        )  # fmt: skip
    return (*before, *inner, *block.operators)


def _projected(block: EmbeddingBlock, joined: Tensor) -> Tensor:
    """What the layer reads: the columns of a column-parallel linear, cut as the width of an MLP is."""

    def wide(name: str, dims: str) -> Tensor:
        made = block.tensor(name, dims)
        return made._replace(sizes=(*made.sizes[:-1], Fraction(block.model.hidden)))

    out, weight = wide(LAYER_INPUT, "s b f"), wide(f"{PROJECTION}_weight", "z f")._replace(kind="weight")
    block.add(
        PROJECTION, "gemm", "s b z, z f -> s b f", [joined, weight], [out], saves=[joined], owns_gather=[joined]
    )  # fmt: skip
    return out


def _reading(op: Operator, given: Tensor) -> Operator:
    """An operator of the layer whose input is what was projected."""
    inputs = tuple(x._replace(tensor=given) if x.tensor.name == given.name else x for x in op.inputs)
    return replace(op, inputs=inputs)
