"""Two pipeline stages of two replicas each, trained by torch on gloo, and the collectives of a step."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from tests.truth.replicas import BLOCKS, TOKENS, VOCABULARY, WIDTH, Layer, Recorder

STAGES = 2


class Chunk(nn.Module):
    """Some of the blocks, with the embedding before the first of all and norm and head behind the last."""

    def __init__(self, number: int, chunks: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH) if number == 0 else None
        self.layers = nn.ModuleList(Layer() for _ in range(BLOCKS // chunks))
        last = number == chunks - 1
        self.norm = nn.LayerNorm(WIDTH) if last else None
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        """Token ids or activations to activations or logits."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Of predicting each next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trained(library: str, chunks: int, micro_batches: int) -> list[tuple[str, int]]:
    """Collectives over replicas in the third step, in order, with the bytes of the whole; those of the norm behind."""
    mesh = init_device_mesh("cpu", (STAGES, 2), mesh_dim_names=("pp", "dp"))
    rank, pipe, replicas = mesh["pp"].get_local_rank(), mesh["pp"].get_group(), mesh["dp"]
    made = []
    for number in range(rank, STAGES * chunks, STAGES):
        module: Any = Chunk(number, STAGES * chunks)
        if library == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for part in (*module.layers, module):
                fully_shard(part, mesh=replicas, mp_policy=policy, reshard_after_forward=False)
        else:
            module = DistributedDataParallel(module, process_group=replicas.get_group(), bucket_cap_mb=0.25)
        made.append(PipelineStage(module, number, STAGES * chunks, torch.device("cpu"), group=pipe))
    schedule: Any = (
        schedules.ScheduleInterleaved1F1B(made, micro_batches, loss_fn=loss)
        if chunks > 1
        else schedules.Schedule1F1B(made[0], micro_batches, loss_fn=loss)
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + replicas.get_local_rank())
        ids = torch.randint(VOCABULARY, (micro_batches, TOKENS), generator=generator)
        recorder = Recorder()
        with recorder:
            schedule.step(*([ids] if rank == 0 else []), **({"target": ids} if rank == STAGES - 1 else {}))
            if library == "fsdp":
                clip_grad_norm_([p for stage in made for p in stage.submod.parameters()], 1.0)
        for stage in made:
            stage.submod.zero_grad()
    dist.barrier()
    return [(name, size) for _, name, size in recorder.calls]
