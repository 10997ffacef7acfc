"""The processes that run the layers: started here on one machine, or by torchrun on any number of them.

A rank that fails, dies or hangs ends the run with one line; what was measured before stays.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

from spsim.calibrate.launch import CPU_RANKS, under_torchrun
from spsim.errors import InputError
from spsim.hardware import HardwareProfile
from spsim.verify.records import Environment, Job, RankMeasurement

GRACE_S = 1.0
"""How much later than its consequences the death of a rank may be noticed."""
START_LIMIT_S = 120.0
"""For all ranks to load torch and to find each other."""


class RankError(Exception):
    """A rank is lost, and with it the others; the message is one line."""


class RankMemoryError(RankError):
    """A case needs more memory than a rank has; others may not."""


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
    if find_spec("torch") is None:
        raise InputError("verify: torch is not installed; install spsim[calibrate]")
    gpus = 0 if profile.datasheet.topology[0].kind == "shared_memory" else _count_gpus()
    device = "cuda" if gpus else "cpu"
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"]), device
    return gpus or CPU_RANKS, device


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def open_ranks(count: int, device: str, time_limit_s: float) -> Iterator[RankPool]:
    """The ranks of torchrun, or processes of this machine, ended with the block; `time_limit_s` is for one case."""
    if under_torchrun():
        rank = TorchrunRank(device, time_limit_s)
        yield rank
        rank.close()
        return
    pool = StartedRanks(count, device, time_limit_s)
    try:
        yield pool
    finally:
        pool.close()


class Answer(NamedTuple):
    """What a rank says: a result, or why it has none."""

    value: Any
    problem: str = ""
    out_of_memory: bool = False


class StartedRanks:
    """Processes of this machine that live until they fail or are closed; after a failure new ones are started."""

    def __init__(self, count: int, device: str, time_limit_s: float) -> None:
        self.count, self.device, self.time_limit_s = count, device, time_limit_s
        self._directory = TemporaryDirectory(prefix="spsim-verify-", ignore_cleanup_errors=True)
        self._starts = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self.environment: Environment = self._start()

    def run(self, job: Job) -> Sequence[RankMeasurement]:
        """The case on every rank; `RankError` where one of them gives no result."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send(job)
        return self._answers(job.case.name, self.time_limit_s)

    def close(self) -> None:
        """End the processes."""
        self._kill()
        self._directory.cleanup()

    def _start(self) -> Environment:
        context = multiprocessing.get_context("spawn")
        directory = Path(self._directory.name)
        address = f"file://{directory}/store-{self._starts}"
        self._starts += 1
        for rank in range(self.count):
            mine, theirs = context.Pipe()
            settings = (self.device, rank, self.count, rank, address, 2 * self.time_limit_s)
            process = context.Process(target=_serve, args=(theirs, directory / f"{rank}.log", settings), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        environment: Environment = self._answers("the start", START_LIMIT_S)[0]
        return environment

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _answers(self, what: str, limit_s: float) -> list[Any]:
        """One answer of each rank, or `RankError` once one is lost or late."""
        try:
            return self._collect(what, limit_s)
        except RankError:
            self._kill()
            raise

    def _collect(self, what: str, limit_s: float) -> list[Any]:
        end = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        while len(answers) < self.count:
            silent = {self._pipes[rank]: rank for rank in range(self.count) if rank not in answers}
            ready = wait(list(silent), max(0.0, end - time.monotonic()))
            if not ready:
                ranks = ", ".join(map(str, silent.values()))
                raise RankError(f"no answer from rank {ranks} within {limit_s:g} s in {what}")
            for pipe in ready:
                rank = silent[pipe]  # type: ignore[index]
                answers[rank] = self._answer(rank, what)
        return [answers[rank] for rank in range(self.count)]

    def _answer(self, rank: int, what: str) -> Any:
        try:
            answer: Answer = self._pipes[rank].recv()
        except (EOFError, OSError):
            raise RankError(self._death(rank, what)) from None
        if not answer.problem:
            return answer.value
        if answer.out_of_memory:
            raise RankMemoryError(f"rank {rank} is out of memory")
        wait([process.sentinel for process in self._processes], GRACE_S)
        dead = [other for other, process in enumerate(self._processes) if (process.exitcode or 0) < 0]
        raise RankError(self._death(dead[0], what) if dead else f"rank {rank} failed in {what}: {answer.problem}")

    def _death(self, rank: int, what: str) -> str:
        process = self._processes[rank]
        process.join(GRACE_S)
        code = process.exitcode or 0
        if code < 0:
            memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
            return f"rank {rank} was ended by {signal.Signals(-code).name}{memory} in {what}"
        lines = (Path(self._directory.name) / f"{rank}.log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"status {code}")
        return f"rank {rank} ended in {what}: {last}"


def _serve(pipe: Connection, log: Path, settings: tuple[Any, ...]) -> None:
    """A started process: measures the cases that it is sent until the pipe closes; its own output goes to `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from spsim.verify.measurement import Rank, out_of_memory

    try:
        rank = Rank(*settings)
        pipe.send(Answer(rank.environment))
        while True:
            pipe.send(Answer(rank.measure(pipe.recv())))
    except (EOFError, BrokenPipeError):
        return
    except RuntimeError as error:
        pipe.send(Answer(None, _line(error), out_of_memory(error)))


class TorchrunRank:
    """This process as one rank among those that torchrun started; rank 0 has the results of all.

    Raises `RankError` where the ranks do not come together.
    """

    def __init__(self, device: str, time_limit_s: float) -> None:
        from spsim.verify.measurement import Rank

        rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device, self.time_limit_s = device, time_limit_s
        local = int(os.environ.get("LOCAL_RANK", "0"))
        try:
            self._rank = Rank(device, rank, self.count, local, None, time_limit_s)
        except RuntimeError as error:
            raise RankError(f"the ranks did not come together: {_line(error)}") from None
        self.environment = self._rank.environment

    def run(self, job: Job) -> Sequence[RankMeasurement] | None:
        """The case on every rank; `RankError` where this rank gets no result in time."""
        found: list[Answer] = []
        # A collective that hangs on a GPU cannot be interrupted: it is left behind in a thread of its own.
        thread = threading.Thread(target=lambda: found.append(self._measure(job)), daemon=True)
        thread.start()
        thread.join(self.time_limit_s)
        if not found:
            raise RankError(f"no result within {self.time_limit_s:g} s in {job.case.name}")
        if found[0].problem:
            raise RankError(f"{found[0].problem} in {job.case.name}")
        results: Sequence[RankMeasurement] | None = found[0].value
        return results

    def close(self) -> None:
        """Leave the group with the others; only where all went well, since a lost rank never comes."""
        self._rank.close()

    def _measure(self, job: Job) -> Answer:
        try:
            return Answer(self._rank.gather(self._rank.measure(job)))
        except RuntimeError as error:
            return Answer(None, _line(error))


def _line(error: Exception) -> str:
    """The first line of a message, which torch may follow with a stack."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0] if lines else type(error).__name__
