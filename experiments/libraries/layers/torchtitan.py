"""torchtitan: its Llama 3, parallelised by its own plan of DTensor placements, with FSDP2 on top where replicas are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from cases import Case
from subject import Subject
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.utils import clip_grad_norm_, get_train_context
from torchtitan.models.llama3.infra.parallelize import parallelize_llama
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

parallel_dims.device_type = "cpu"  # of meshes; torchtitan takes CUDA where it finds no accelerator

MULTIPLE = 32
"""What torchtitan rounds the width of its MLP up to."""


def build(case: Case) -> Subject:
    """A layer on its shard of the sequence, or the whole model; after the backward pass clipping and AdamW."""
    model = _parallelized(case)
    length, batch, hidden = case.shape
    if case.part == "model":
        ids = torch.randint(case.model["vocab"], (batch, length))
        with_loss = case.options.get("loss_parallel", True) and case.degrees.get("tp", 1) > 1
        return Subject(
            model, lambda: cross_entropy_loss(model(ids), ids), _step(model), within=get_train_context(with_loss)()
        )
    local = length // case.degrees.get("tp", 1)
    x = torch.randn(batch, local, hidden, dtype=torch.bfloat16, requires_grad=True)
    layer = model.layers["0"]
    return Subject(layer, lambda: layer(x, model.freqs_cis[:length], None), _step(layer), [model.freqs_cis])


def _parallelized(case: Case) -> nn.Module:
    model, plan, job = case.model, case.degrees, JobConfig()
    arguments = TransformerModelArgs(
        dim=model["hidden"],
        n_layers=1,
        n_heads=model["heads"],
        n_kv_heads=model["kv_heads"],
        vocab_size=model["vocab"],
        multiple_of=MULTIPLE,
        max_seq_len=case.shape[0],
    )
    transformer = Transformer(arguments)
    with torch.no_grad():
        transformer.init_weights()
    if transformer.layers["0"].feed_forward.w1.out_features != model["ffn_hidden"]:
        raise ValueError(f"ffn_hidden {model['ffn_hidden']} is not the width that torchtitan derives from hidden")
    job.training.seq_len = case.shape[0]
    job.parallelism.disable_loss_parallel = not case.options.get("loss_parallel", True)
    job.activation_checkpoint.mode = plan.get("recompute", "none")
    degrees = ParallelDims(1, plan.get("dp", 1), 1, plan.get("tp", 1), 1, 1, 1, dist.get_world_size())
    if plan.get("dp", 1) == 1:
        transformer.bfloat16()  # FSDP2 casts by itself
    cut = parallelize_llama(transformer, degrees, job)
    for module in cut.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale a sum as it reduces
    return cut


def _step(module: nn.Module) -> Callable[[], None]:
    """What torchtitan does with gradients: `clip_grad_norm_`, then AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), foreach=True)

    def step() -> None:
        clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        optimizer.step()

    return step
