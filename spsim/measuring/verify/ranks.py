"""The processes that run the layers: started here on one machine, or by torchrun on any number of them.

A rank that fails, dies or hangs ends the run with one line; what was measured before stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from spsim.inputs.hardware import HardwareProfile
from spsim.measuring.processes.at_hand import (
    CPU_RANKS,
    Position,
    check_installed,
    count_gpus,
    out_of_memory,
    reason,
    torchrun_position,
)
from spsim.measuring.processes.matching import describes_cpu
from spsim.measuring.processes.processes import Processes, RankError, RankMemoryError
from spsim.measuring.verify.records import Environment, Job, RankMeasurement

START_LIMIT_S = 120.0
"""For all ranks to load torch and to find each other."""


class RankPool(Protocol):
    """Ranks that measure one case after the other."""

    count: int
    device: str
    environment: Environment

    def run(self, job: Job) -> Sequence[RankMeasurement] | None:
        """The case on every rank, in their order; None on the ranks that do not report."""


def count_ranks(profile: HardwareProfile) -> tuple[int, str]:
    """How many processes are at hand, and whether on `cpu` or `cuda`: a profile of a CPU is verified on the CPU.

    Raises `InputError` where torch is not installed.
    """
    check_installed("verify", "torch")
    gpus = 0 if describes_cpu(profile) else count_gpus()
    position = torchrun_position()
    return position.world if position else gpus or CPU_RANKS, "cuda" if gpus else "cpu"


@contextmanager
def open_ranks(count: int, device: str, time_limit_s: float) -> Iterator[RankPool]:
    """The ranks of torchrun, or processes of this machine, ended with the block; `time_limit_s` is for one case."""
    position = torchrun_position()
    if position:
        rank = TorchrunRank(position, device, time_limit_s)
        yield rank
        rank.close()
        return
    pool = StartedRanks(count, device, time_limit_s)
    try:
        yield pool
    finally:
        pool.close()


class StartedRanks:
    """Processes of this machine that live until they fail or are closed; after a failure new ones are started."""

    def __init__(self, count: int, device: str, time_limit_s: float) -> None:
        self.count, self.device, self.time_limit_s = count, device, time_limit_s
        self._directory = TemporaryDirectory(prefix="spsim-verify-", ignore_cleanup_errors=True)
        self._starts = 0
        self.environment: Environment = self._start()

    def run(self, job: Job) -> Sequence[RankMeasurement]:
        """The case on every rank; `RankError` where one of them gives no result."""
        if not self._ranks.processes:
            self._start()
        self._ranks.doing = job.case.name
        self._ranks.send(job)
        return self._answers(self.time_limit_s)

    def close(self) -> None:
        """End the processes."""
        self._ranks.close()
        self._directory.cleanup()

    def _start(self) -> Environment:
        directory = Path(self._directory.name)
        address = f"file://{directory}/store-{self._starts}"
        self._starts += 1
        self._ranks = Processes(self.count, directory, _serve, self.device, address, 2 * self.time_limit_s)
        environment: Environment = self._answers(START_LIMIT_S)[0]
        return environment

    def _answers(self, limit_s: float) -> list[Any]:
        try:
            return self._ranks.answers(limit_s)
        except BaseException:
            self._ranks.close()
            raise


def _serve(pipe: Connection, position: Position, device: str, address: str, limit_s: float) -> None:
    """A started process: measures the cases that it is sent until the pipe closes."""
    from spsim.measuring.verify.measurement import Rank

    doing = "the start"
    try:
        rank = Rank(device, position, address, limit_s)
        pipe.send(rank.environment)
        while True:
            job: Job = pipe.recv()
            doing = job.case.name
            pipe.send(rank.measure(job))
    except (EOFError, BrokenPipeError):
        return
    except RuntimeError as error:
        if out_of_memory(error):
            pipe.send(RankMemoryError(f"rank {position.rank} is out of memory"))
        else:
            pipe.send(RankError(f"rank {position.rank} failed in {doing}: {reason(error)}"))


class TorchrunRank:
    """This process as one rank among those that torchrun started; rank 0 has the results of all.

    Raises `RankError` where the ranks do not come together.
    """

    def __init__(self, position: Position, device: str, time_limit_s: float) -> None:
        from spsim.measuring.verify.measurement import Rank

        self.count, self.device, self.time_limit_s = position.world, device, time_limit_s
        try:
            self._rank = Rank(device, position, None, time_limit_s)
        except RuntimeError as error:
            raise RankError(f"the ranks did not come together: {reason(error)}") from None
        self.environment = self._rank.environment

    def run(self, job: Job) -> Sequence[RankMeasurement] | None:
        """The case on every rank; `RankError` where this rank gets no result in time."""
        found: list[Sequence[RankMeasurement] | RankError | None] = []
        # A collective that hangs on a GPU cannot be interrupted: it is left behind in a thread of its own.
        thread = threading.Thread(target=lambda: found.append(self._measure(job)), daemon=True)
        thread.start()
        thread.join(self.time_limit_s)
        if not found:
            raise RankError(f"no result within {self.time_limit_s:g} s in {job.case.name}")
        if isinstance(found[0], RankError):
            raise found[0]
        return found[0]

    def close(self) -> None:
        """Leave the group with the others; only where all went well, since a lost rank never comes."""
        self._rank.close()

    def _measure(self, job: Job) -> Sequence[RankMeasurement] | RankError | None:
        try:
            return self._rank.gather(self._rank.measure(job))
        except RuntimeError as error:
            return RankError(f"{reason(error)} in {job.case.name}")
