#!/usr/bin/env bash
# megatron-core 0.16.1: SwiGLU as TransformerConfig has it by default keeps 5 f numbers a token, not 3 or 4.
#
# Without bias_activation_fusion (off by default in TransformerConfig; on in Megatron-LM's training script) the MLP runs
# silu(gate) * (up + glu_linear_offset), with an offset of 0.0. The sum with zero is a tensor of its own, which the product
# keeps beside the gate and up that it was split from: 2 f of fc1's output, f of silu(gate), f of up + 0.0, f of fc2's
# input. Without the sum it would be 4 f (up is a view of fc1's output), with the fused function 3 f.
#
# Seen with torch 2.13.0, megatron-core 0.16.1 (also so in 0.15.3 by its source, not in 0.14.0), of one process on the CPU:
#
#   bias_activation_fusion=False: 5 f a token
#   bias_activation_fusion=True: 3 f a token
#
# Fails if that changes. Needs Python 3.11 or later and about three minutes, most of them to install.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

LENGTH, BATCH, HIDDEN, WIDTH = 64, 2, 64, 192


def widths_kept(fused):
    """Bytes that the backward pass keeps of the MLP but its input and weights, in bf16 numbers of f for each token."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, ffn_hidden_size=WIDTH, gated_linear_unit=True,
        activation_func=functional.silu, add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
        use_cpu_initialization=True, bias_activation_fusion=fused,
    )
    mlp = MLP(config, get_gpt_layer_local_spec().submodules.mlp.submodules)
    x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *mlp.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = mlp(x)
    out.sum().backward()
    return sum(storage.nbytes() for storage in kept.values()) / (LENGTH * BATCH * WIDTH * 2)


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
seen = {fused: widths_kept(fused) for fused in (False, True)}
for fused, widths in seen.items():
    print(f"bias_activation_fusion={fused}: {widths:g} f a token")
assert seen == {False: 5, True: 3}, seen
dist.destroy_process_group()
PYTHON
"$folder/environment/bin/python" -W ignore "$folder/run.py" "$folder/store" 2> "$folder/log" \
  || { cat "$folder/log"; exit 1; }
