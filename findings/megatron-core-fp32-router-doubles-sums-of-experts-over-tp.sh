#!/usr/bin/env bash
# megatron-core 0.16.1: a router in fp32 makes experts that are split over tp sum their results in fp32, twice the bytes.
#
# With moe_router_dtype="fp32", which its README recommends and its examples set, probabilities are fp32. The
# all-to-all dispatcher casts what experts make to the type of the probabilities before it reduce-scatters that over
# expert tensor parallelism, and back behind it, so that the backward pass gathers its gradient in fp32, too. Gathers of
# tokens and sums of their gradients stay in bf16. A layer then sends 6 in place of 4 bf16 tensors of all dispatched
# tokens over tp, forward and backward. Without expert tensor parallelism nothing is cast.
#
# Seen with torch 2.13.0, megatron-core 0.16.1 (the same lines in d98e8a64 of August 2026), of two processes on the CPU:
#
#   moe_router_dtype=None: all_gather 8192, reduce_scatter 8192, all_gather 8192, reduce_scatter 8192 bytes
#   moe_router_dtype=fp32: all_gather 8192, reduce_scatter 16384, all_gather 16384, reduce_scatter 8192 bytes
#
# Streams are stand-ins, for there is no GPU, and the product of the router is torch's. Fails if that changes. Needs
# Python 3.11 or later and about three minutes, most of them to install.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1
cat > "$folder/run.py" <<'PYTHON'
import sys
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN, EXPERTS, RANKS = 64, 32, 2, 2
NAMES = {"allgather_": "all_gather", "reduce_scatter_": "reduce_scatter"}


class Calls(TorchDispatchMode):
    """Collectives of rows of hidden numbers, with the bytes of all ranks."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = NAMES.get(func._schema.name.removeprefix("c10d::"))
        if name:
            lists = [item for arg in args if isinstance(arg, list) for item in arg if isinstance(item, list)]
            (parts,) = lists
            if parts[0].shape[-1:] == (HIDDEN,):
                self.found.append((name, sum(part.nbytes for part in parts)))
        return func(*args, **(kwargs or {}))


def calls_of(dtype):
    """Of a forward and a backward pass whose tokens go to all experts, each of which two ranks share."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=64, moe_ffn_hidden_size=64,
        num_moe_experts=EXPERTS, moe_router_topk=EXPERTS, moe_router_dtype=dtype, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", tensor_model_parallel_size=RANKS, expert_tensor_parallel_size=RANKS,
        sequence_parallel=True, add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules)
    x = torch.randn(TOKENS // RANKS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with Calls() as calls:
        out, _ = layer(x)
        out.sum().backward()
    return calls.found


def rank_main(rank, store):
    moe_utils.te_general_gemm = None
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.stream = MagicMock()
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(RANKS, expert_tensor_parallel_size=RANKS)
    seen = {dtype: calls_of(dtype) for dtype in (None, "fp32")}
    if rank == 0:
        for dtype, calls in seen.items():
            told = ", ".join(f"{name} {size}" for name, size in calls)
            print(f"moe_router_dtype={dtype}: {told} bytes")
    once = TOKENS * EXPERTS * HIDDEN * 2
    kinds = ["all_gather", "reduce_scatter"] * 2
    assert seen[None] == list(zip(kinds, [once] * 4)), seen
    assert seen["fp32"] == list(zip(kinds, [once, 2 * once, 2 * once, once])), seen
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, (sys.argv[1],), RANKS)
PYTHON
"$folder/environment/bin/python" -W ignore "$folder/run.py" "$folder/store" 2> "$folder/log" \
  || { cat "$folder/log"; exit 1; }
