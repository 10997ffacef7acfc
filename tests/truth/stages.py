"""Pipeline stages of a small model trained by torch on gloo, and what each rank runs, posts and waits for."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from tests.truth.replicas import TOKENS, WIDTH, Layer


class Ran(NamedTuple):
    """What one rank did in a step."""

    instructions: list[str]
    """In the words of `tests.test_pipeline_exchange`."""
    sent: list[int]
    """Bytes of each message that it sent."""


class Recorder:
    """Stands in for the functions by which schedules post messages and wait for them."""

    def __init__(self) -> None:
        self.instructions: list[str] = []
        self.sent: list[int] = []
        self._post, self._wait = schedules._batch_p2p, schedules._wait_batch_p2p
        self._posted: dict[int, str] = {}
        self._waited: list[str] = []
        self._works: list[Any] = []  # so that no identity comes twice
        self._calls = 0

    def post(self, operations: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
        """One call, of which each message has a wait of its own."""
        works = self._post(operations, desc)
        if operations:
            names = [f"{op.op.__name__}:{op.group_peer}" for op in operations]
            self._note("post:" + "+".join(sorted(names)))
            for work, name in zip(works, names, strict=True):
                self._posted[id(work)] = f"{name}@{self._calls}"
            self._works += works
            self._calls += 1
            self.sent += [op.tensor.nbytes for op in operations if op.op is dist.isend]
        return works

    def wait(self, works: list[dist.Work]) -> None:
        """Waits in a row are one."""
        self._waited += [self._posted[id(work)] for work in works]
        self._wait(works)

    def run(self, kind: str, chunk: int, micro_batch: int) -> None:
        """A pass."""
        self._note(f"{kind}{chunk}.{micro_batch}")

    def done(self) -> Ran:
        """All of it."""
        self._note()
        return Ran(self.instructions, self.sent)

    def _note(self, *words: str) -> None:
        if self._waited:
            self.instructions.append("wait:" + "+".join(sorted(self._waited)))
            self._waited = []
        self.instructions += words


class Stage(PipelineStage):
    """Notes its passes."""

    recorder: Recorder | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of a micro-batch."""
        if self.recorder:
            self.recorder.run("F", self.stage_index // self.group_size, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Backward pass of a micro-batch."""
        if self.recorder:
            self.recorder.run("B", self.stage_index // self.group_size, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


def trained(schedule: str, chunks: int, micro_batches: int) -> Ran:
    """The second step; layers of width 64, one for each chunk, a sequence a micro-batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    places: Sequence[int] = range(rank, ranks * chunks, ranks)
    stages = [Stage(Layer(), index, ranks * chunks, torch.device("cpu")) for index in places]
    made = getattr(schedules, schedule)(
        stages if chunks > 1 else stages[0], micro_batches, loss_fn=nn.functional.mse_loss
    )
    batch = torch.randn(micro_batches, TOKENS, WIDTH)
    given: dict[str, Any] = {"target": batch} if rank == ranks - 1 else {}
    for _ in range(2):
        recorder = Recorder()
        for stage in stages:
            stage.recorder = recorder
        with (
            patch.object(schedules, "_batch_p2p", recorder.post),
            patch.object(schedules, "_wait_batch_p2p", recorder.wait),
        ):
            made.step(*([batch] if rank == 0 else []), **given)
    return recorder.done()
