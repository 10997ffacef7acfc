#!/usr/bin/env bash
# torch 2.13.0: a DTensor gradient that is Partial is all-reduced again by everything that reads it.
#
# Under SequenceParallel() the gradient of a norm's weight is a partial sum over the tensor-parallel ranks. It stays one
# after backward(): clip_grad_norm_ reduces it for itself, and AdamW reduces it three times a step (once for each of its
# operations that reads the gradient), each with a message of its own. Four all-reduces of each norm and step, where one
# would do, since none of them is written back to .grad.
#
# Seen with torch 2.13.0 on two gloo processes, a RMSNorm of 64 numbers in fp32:
#
#   backward: 0 all-reduces of the gradient
#   clip_grad_norm_: 1
#   AdamW: 3
#
# Fails if that changes. Needs Python 3.11 or later and about two minutes, most of them to install.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN = 64


class AllReduces(TorchDispatchMode):
    """How many of the gradient, where torch dispatches them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func._schema.name == "_c10d_functional::all_reduce" and args[0].numel() == HIDDEN:
            self.count += 1
        return func(*args, **(kwargs or {}))


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
norm = parallelize_module(nn.RMSNorm(HIDDEN), mesh, SequenceParallel())
optimizer = torch.optim.AdamW(norm.parameters())
with AllReduces() as backward:
    norm(torch.randn(2, 32, HIDDEN)).to_local().sum().backward()
with AllReduces() as clipping:
    nn.utils.clip_grad_norm_(norm.parameters(), 1.0).full_tensor()
with AllReduces() as step:
    optimizer.step()
seen = (backward.count, clipping.count, step.count)
if dist.get_rank() == 0:
    print(f"backward: {seen[0]} all-reduces of the gradient\nclip_grad_norm_: {seen[1]}\nAdamW: {seen[2]}", flush=True)
assert seen == (0, 1, 3), seen
dist.destroy_process_group()
PYTHON
"$folder/environment/bin/python" -W ignore -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d \
  --rdzv-endpoint localhost:0 "$folder/run.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
