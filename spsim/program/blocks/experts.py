"""The experts of a layer: a router picks some for each token, which is sent to them and back.

As Megatron-Core runs them (`MoELayer`, all-to-all dispatcher, grouped products): tokens are put in the order of their
experts (permute), exchanged, put in the order of the local ones, and the same back. Probabilities go with the tokens
and weigh what the activation makes, so that the sum over a token's experts needs none.
"""

from __future__ import annotations

from spsim.inputs.model import Model
from spsim.program.blocks.block import ModelBlock
from spsim.program.operators import Tensor
from spsim.program.strategies import EXPERTS
from spsim.work import FP32_BYTES

TOKENS = "s*b*k/e"
"""Of one expert: each token has k of e."""
ROW_ID_BYTES = 4
"""Of an int32: a permutation keeps of each token its rows, their experts, and how many they are."""


def expert_sizes(model: Model) -> dict[str, int]:
    """Sizes of the dimensions that only a layer of experts has; u is the width of the shared ones."""
    if model.experts is None or model.experts_per_token is None or model.expert_ffn_hidden is None:
        return {}
    return {
        "e": model.experts, "k": model.experts_per_token, "m": model.expert_ffn_hidden, "u": model.shared_ffn_hidden
    }  # fmt: skip


def routed_experts(block: ModelBlock, x: Tensor) -> Tensor:
    """Router, dispatch, experts and combination: `s b h` of every token, summed over its experts."""
    t, model = TOKENS, block.model
    scores, picked = (
        block.tensor(name, "s b e", itemsize=FP32_BYTES) for name in ("router_scores", "router_probabilities")
    )
    softmax = block.tensor("router_softmax", "s b e", "intermediate", itemsize=FP32_BYTES)
    routing_map = block.tensor("routing_map", "s b e", "mask", itemsize=1)
    went = block.tensor("row_id_map", "s b", "mask", itemsize=ROW_ID_BYTES * (2 * (model.experts or 0) + 1))
    weights = block.tensor("expert_probabilities", f"e {t}", itemsize=FP32_BYTES)
    dealt, made = (block.tensor(name, f"e {t} h") for name in ("expert_input", "expert_out"))
    made = made._replace(summed_itemsize=FP32_BYTES)
    width = "g m" if model.gated_mlp else "m"
    inner, active = block.tensor("expert_fc1_out", f"e {t} {width}"), block.tensor("expert_activation_out", f"e {t} m")
    out = block.tensor("combined", "s b h")
    block.add("router", "gemm", "s b h, h e -> s b e", [x, block.weight("router_weight", "h e")], [scores], saves=[x])
    block.add(
        "top_k", "softmax", "s b e -> s b e", [scores], [picked, softmax, routing_map], mixes="e",
        saves=[softmax, routing_map],
    )  # fmt: skip
    block.add("dispatch", "elementwise", f"s b h -> e {t} h", [x], [dealt, went], saves=[went])
    block.add("dispatch_probabilities", "elementwise", f"s b e -> e {t}", [picked], [weights], mixes="e")
    block.add(
        "expert_fc1", "gemm", f"e {t} h, e h {width} -> e {t} {width}",
        [dealt, block.weight("expert_fc1_weight", f"e h {width}")], [inner], saves=[dealt], rules=EXPERTS,
    )  # fmt: skip
    block.add(
        f"expert_{model.activation}", "elementwise", f"e {t} {width}, e {t} -> e {t} m", [inner, weights], [active],
        mixes="g" if model.gated_mlp else "", saves=[inner, weights], kernel=model.activation, rules=EXPERTS,
    )  # fmt: skip
    block.add(
        "expert_fc2", "gemm", f"e {t} m, e m h -> e {t} h",
        [active, block.weight("expert_fc2_weight", "e m h")], [made], saves=[active], rules=EXPERTS,
    )  # fmt: skip
    block.add("combine", "elementwise", f"e {t} h -> s b h", [made], [out])
    return out
