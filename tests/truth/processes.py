"""Gloo processes that stay up, and groups that pretend: where real layers run."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from spsim import Plan
from spsim.program.mesh import mesh_of
from spsim.pytorch.layers import Groups

TIMEOUT_S = 30
MODULES = [f"{__package__}.{path.stem}" for path in Path(__file__).parent.glob("*.py") if path.stem != "conftest"]
"""Whose functions run on ranks."""


def _join(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )


GROUPS: dict[str, Groups] = {}


def groups_of(plan: Plan) -> Groups:
    """The groups of a plan in a process of `Processes`, made once for all plans that lay out ranks alike."""
    layout = repr(mesh_of(plan))
    if layout not in GROUPS:
        GROUPS[layout] = Groups.create(plan)
    return GROUPS[layout]


class Processes:
    """Each is one rank of a gloo group; a function runs on all at the same time."""

    def __init__(self, ranks: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)  # torch, and what runs on ranks, is imported once for all
        store = str(folder / "store")
        self._workers = [context.Pool(1, _join, (rank, ranks, store)) for rank in range(ranks)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()  # at once, even if a collective hangs

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The result of each rank."""
        started = [worker.apply_async(function, arguments) for worker in self._workers]
        return [result.get(timeout=2 * TIMEOUT_S) for result in started]


@contextmanager
def pretended_groups(plan: Plan, rank: int = 0) -> Iterator[Groups]:
    """The groups of one rank of a plan, whose collectives move nothing; tensors inside have shapes only."""
    if plan.gpus > 1:
        dist.init_process_group("fake", rank=rank, world_size=plan.gpus, store=FakeStore())
    try:
        groups = Groups.create(plan)
        with FakeTensorMode():
            yield groups
    finally:
        if plan.gpus > 1:
            dist.destroy_process_group()
