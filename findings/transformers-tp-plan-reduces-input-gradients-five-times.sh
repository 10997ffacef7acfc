#!/usr/bin/env bash
# transformers 5.24.0: a Llama layer under tp_plan="auto" issues 5 all-reduces in its backward pass, not 2.
#
# q, k and v read one input, gate and up another. Each of the five column-parallel products reduces its own copy of the
# gradient of that input (5 messages of s*b*h), although their sum could be reduced once for q, k and v and once for gate
# and up, as Megatron-LM's fused products do (2 messages). The forward pass has 2 either way.
#
# Seen with torch 2.13.0, transformers 5.24.0, accelerate 1.12.0 on two gloo processes:
#
#   forward: 2 all-reduces of 16384 bytes
#   backward: 5 all-reduces of 16384 bytes
#
# Fails if that changes. Needs Python 3.11 or later and about three minutes, most of them to install.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.12.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, HIDDEN = 64, 2, 64


class AllReduces(TorchDispatchMode):
    """Bytes of each, where torch dispatches it."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("c10d::allreduce_", "_c10d_functional::all_reduce"):
            tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            self.bytes.append(tensor.numel() * tensor.element_size())
        return func(*args, **(kwargs or {}))


dist.init_process_group("gloo")
path = sys.argv[1]
if dist.get_rank() == 0:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=512,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
dist.barrier()
model = LlamaForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.bfloat16).train()
layer = model.model.layers[0]
x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
positions = torch.arange(LENGTH)[None]
rotary = model.model.rotary_emb(x, positions)
with AllReduces() as forward:
    out = layer(x, position_ids=positions, position_embeddings=rotary)
with AllReduces() as backward:
    out.backward(torch.ones_like(out))
whole = LENGTH * BATCH * HIDDEN * 2
if dist.get_rank() == 0:
    for name, seen in (("forward", forward.bytes), ("backward", backward.bytes)):
        print(f"{name}: {len(seen)} all-reduces of {' '.join(map(str, sorted(set(seen))))} bytes", flush=True)
assert (forward.bytes, backward.bytes) == ([whole] * 2, [whole] * 5), (forward.bytes, backward.bytes)
dist.destroy_process_group()
PYTHON
"$folder/environment/bin/python" -W ignore -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d \
  --rdzv-endpoint localhost:0 "$folder/run.py" "$folder/model" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
