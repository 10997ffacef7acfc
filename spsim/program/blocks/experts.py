"""The experts of a layer: a router picks some for each token, which is sent to them and back.

As Megatron-Core runs them (`MoELayer`, grouped products). With an all-to-all tokens are put in the order of their
experts (permute), exchanged, put in the order of the local ones, and the same back. With a gather every rank picks what
its experts need from all tokens. DeepEP and HybridEP send one copy to each rank (`program.routing`), where tokens are
permuted. Probabilities go with the tokens and weigh what the activation makes, so that the sum over a token's experts
needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spsim.inputs.model import Model
from spsim.program.blocks.block import ModelBlock
from spsim.program.launches import Launch, Launches
from spsim.program.operators import Grouping, Operator, Tensor
from spsim.program.placement import Extent
from spsim.program.routing import Routing
from spsim.program.strategies import EXPERTS
from spsim.work import FP32_BYTES

TOKENS = "s*b*k/e"
"""Of one expert: each token has k of e."""
ROW_ID_BYTES = 4
"""Of an int32: a permutation keeps of each token its rows, their experts, both with room for all, and how many."""
COPIES = "s*b*o/e"
"""The same of copies that are sent, one to each of o ranks."""
EPILOGUE = ("expert_fc2_cast", "expert_fc1_gradient_cast", "expert_fc2_bias")
"""Between and after the products of experts, what a fused kernel makes on its way as it does the activation."""
WEIGHTED_BIAS = Launches(
    (Launch(wide=1, accesses=3), Launch(narrow=1, wide=2), Launch(wide=2), Launch(narrow=1, wide=1)),
    (
        Launch(narrow=1, wide=1), Launch(narrow=1, wide=1), Launch(narrow=2), Launch(wide=2, accesses=3),
        Launch(wide=1), Launch(wide=2, accesses=3), Launch(wide=1),
    ),
)  # fmt: skip
"""The bias of the last product by the probability of a token, added in fp32 (`TEGroupedMLP._apply_bias`): the product
of both, the sum, its concatenation over experts and cast; of gradients two casts and a concatenation, and a product and
a sum each for bias and probability. Products broadcast what they multiply by.
"""
NO_KERNELS = Launches((), ())
"""Of what a library's kernel of the exchange itself does."""


def expert_sizes(model: Model, routing: Routing) -> dict[str, Extent]:
    """Sizes of the dimensions that only a layer of experts has; u is the width of the shared ones."""
    if model.experts is None or model.experts_per_token is None or model.expert_ffn_hidden is None:
        return {}
    return {
        "e": model.experts, "k": model.experts_per_token * routing.load, "m": model.expert_ffn_hidden,
        "u": model.shared_ffn_hidden, "o": routing.copies,
    }  # fmt: skip


def routed_experts(block: ModelBlock, x: Tensor, routing: Routing) -> Tensor:
    """Router, dispatch, experts and combination: `s b h` of every token, summed over its experts."""
    scores, picked = (
        block.tensor(name, "s b e", itemsize=FP32_BYTES) for name in ("router_scores", "router_probabilities")
    )
    softmax = block.tensor("router_softmax", "s b e", "intermediate", itemsize=FP32_BYTES)
    routing_map = block.tensor("routing_map", "s b e", "mask", itemsize=1)
    biased = block.model.mlp_bias
    added = [block.weight("router_bias", "e")] if biased else []
    block.add(
        "router", "gemm", f"s b h, h e{', e' * biased} -> s b e", [x, block.weight("router_weight", "h e"), *added],
        [scores], saves=[x],
    )  # fmt: skip
    gathers = routing.dispatcher == "allgather"
    told = [block.tensor("picked_experts", "s b e", "statistics", itemsize=1)] if gathers else []
    block.add(
        "top_k", "softmax", "s b e -> s b e", [scores], [picked, softmax, routing_map, *told], mixes="e",
        saves=[softmax, routing_map],
    )  # fmt: skip
    if routing.copies:
        return _combined(block, _experts(block, *_dispatched(block, x, picked)))
    rules, t = EXPERTS if gathers else "", TOKENS
    went = [
        block.tensor("row_id_map", "s b e", "mask", itemsize=2 * ROW_ID_BYTES),
        block.tensor("rows_of_token", "s b", "mask", itemsize=ROW_ID_BYTES),
    ]
    weights = block.tensor("expert_probabilities", f"e {t}", itemsize=FP32_BYTES)
    dealt, out = block.tensor("expert_input", f"e {t} h"), block.tensor("combined", "s b h")
    out = out._replace(summed_itemsize=FP32_BYTES)
    every = "x" if gathers else "e"  # read whole, whichever experts are here
    of_all = f"s b {every}, " * len(told)
    block.add(
        "dispatch_probabilities", "elementwise", f"{of_all}s b {every} -> e {t}", [*told, picked], [weights],
        rules=rules, mixes=every,
    )  # fmt: skip
    block.add(
        "dispatch", "elementwise", f"{of_all}s b h -> e {t} h", [*told, x], [dealt, *went], mixes="x" if told else "",
        saves=went, rules=rules, kernel="permute",
    )  # fmt: skip
    made = _experts(block, dealt, weights)
    block.add("combine", "elementwise", f"e {t} h -> s b h", [made], [out], rules=rules, kernel="permute")
    return out


def _experts(block: ModelBlock, dealt: Tensor, weights: Tensor) -> Tensor:
    """The grouped products of the tokens that are dealt to experts, weighted."""
    t, model = TOKENS, block.model
    width = "g m" if model.gated_mlp else "m"
    inner, active = block.tensor("expert_fc1_out", f"e {t} {width}"), block.tensor("expert_activation_out", f"e {t} m")
    made = block.tensor("expert_out", f"e {t} h")._replace(summed_itemsize=FP32_BYTES)
    block.add(
        "expert_fc1", "gemm", f"e {t} h, e h {width} -> e {t} {width}",
        [dealt, block.weight("expert_fc1_weight", f"e h {width}")], [inner], saves=[dealt], rules=EXPERTS,
        group="launched",
    )  # fmt: skip
    biased = model.mlp_bias
    biases = [block.weight("expert_fc1_bias", f"e {width}")] if biased else []
    block.add(
        f"expert_{model.activation}", "elementwise", f"e {t} {width}, e {t}{f', e {width}' * biased} -> e {t} m",
        [inner, weights, *biases], [active],
        mixes="g" if model.gated_mlp else "", saves=[inner, weights], kernel=model.activation, rules=EXPERTS,
    )  # fmt: skip
    product = made._replace(name="expert_fc2_out") if biased else made
    block.add(
        "expert_fc2", "gemm", f"e {t} m, e m h -> e {t} h",
        [active, block.weight("expert_fc2_weight", "e m h")], [product],
        saves=[active], rules=EXPERTS, group="launched",
    )  # fmt: skip
    if biased:
        bias = block.weight("expert_fc2_bias", "e h")
        block.add(
            "expert_fc2_bias", "elementwise", f"e {t} h, e {t}, e h -> e {t} h", [product, weights, bias], [made],
            saves=[weights], rules=EXPERTS, launches=WEIGHTED_BIAS,
        )  # fmt: skip
    return made


def _dispatched(block: ModelBlock, x: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and weights of the experts of a rank, of copies that carry the probabilities of all their experts."""
    block.sizes["p"] = block.sizes["h"] + (block.model.experts_per_token or 0) * FP32_BYTES // block.element_bytes
    sent, weights = (
        block.tensor("dispatched", f"e {COPIES} p"),
        block.tensor("expert_probabilities", f"e {TOKENS}", itemsize=FP32_BYTES),
    )
    dealt = block.tensor("expert_input", f"e {TOKENS} h")
    block.add(
        "dispatch", "elementwise", f"s b h, s b e -> e {COPIES} p", [x, picked], [sent], mixes="h e",
        passthrough=[x, picked], launches=NO_KERNELS,
    )  # fmt: skip
    went = block.tensor("row_id_map", f"e {TOKENS}", "mask", itemsize=ROW_ID_BYTES)
    block.add(
        "permute", "elementwise", f"e {COPIES} p -> e {TOKENS} h, e {TOKENS}", [sent], [dealt, weights, went],
        mixes="p", saves=[went], rules=EXPERTS, kernel="permute",
    )  # fmt: skip
    return dealt, weights


def _combined(block: ModelBlock, made: Tensor) -> Tensor:
    """What the experts of a rank made of a token is summed there, and then over ranks."""
    sent, out = block.tensor("combining", f"e {COPIES} h"), block.tensor("combined", "s b h")
    block.add(
        "unpermute", "elementwise", f"e {TOKENS} h -> e {COPIES} h", [made], [sent], rules=EXPERTS, kernel="permute"
    )
    block.add(
        "combine", "elementwise", f"e {COPIES} h -> s b h", [sent], [out], passthrough=[sent], launches=NO_KERNELS
    )
    return out


def fused_experts(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """The operators of a layer whose products of experts are single kernels, with all between them in epilogues."""

    def fused(op: Operator) -> Operator:
        between = op.kind == "elementwise" and "m" in op.extents
        own: Grouping | None = "epilogue" if between or op.name in EPILOGUE else "kernel" if op.group else None
        return replace(op, group=own) if own else op

    return tuple(map(fused, operators))
