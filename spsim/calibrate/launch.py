"""Starts the ranks of a calibration, or takes those that torchrun has started, and sees them to the end.

Alone, one process a local GPU, or two on a CPU. They talk through a store that this process holds, and end with
it; it notices when one dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from spsim.calibrate.session import KEPT, Note, Progress, Report, Settings
from spsim.errors import InputError

CPU_RANKS = 2
GRACE = 0.5
"""Seconds by which the death of a rank may be noticed later than what it does to the others."""
FAILED = 2


class Failure(NamedTuple):
    """Why a rank cannot go on."""

    text: str


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_leader() -> bool:
    """Whether this process writes and prints."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def check_installed(*packages: str) -> None:
    """`InputError` where one of the packages that only a calibration needs is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f'calibrate: {package} is not installed; pip install "spsim[calibrate]"')


def measure(settings: Settings, report: Report) -> None:
    """Measure what is missing in the raw file. `InputError` when a rank fails; what was measured stays."""
    if under_torchrun():
        _run_as_rank(settings, report)
    else:
        _run_alone(settings, report)


def _run_as_rank(settings: Settings, report: Report) -> None:
    from spsim.calibrate.rank_process import run_rank
    from spsim.calibrate.ranks import ranks_of_launcher

    ranks = ranks_of_launcher(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    run_rank(ranks, settings, report, _end_with_message)


def _end_with_message(text: str) -> None:
    """End this rank although its main thread hangs in a collective."""
    if is_leader():
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _run_alone(settings: Settings, report: Report) -> None:
    import torch

    from spsim.calibrate.ranks import open_store

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        report(Note("no GPU: measuring this machine's CPU, two processes of one thread each, gloo between them"))
    world = gpus or CPU_RANKS
    store = open_store(0, master=True)
    with _processes(world, store.port, settings) as (processes, pipe):
        _Watch(processes, pipe, settings, report).follow()


@contextmanager
def _processes(world: int, port: int, settings: Settings) -> Iterator[tuple[list[BaseProcess], Connection]]:
    """The ranks, ended at the latest with the block, and what rank 0 says."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes: list[BaseProcess] = [
        context.Process(
            target=_rank_main, args=(rank, world, port, settings, sender if rank == 0 else None), daemon=True
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        yield processes, receiver
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


class _Watch:
    """Passes on what rank 0 reports until all ranks have ended; `InputError` for the first that fails."""

    def __init__(self, processes: list[BaseProcess], pipe: Connection, settings: Settings, report: Report) -> None:
        self.processes, self.pipe, self.settings, self.report = processes, pipe, settings, report
        self.item = "the start"

    def follow(self) -> None:
        """Returns when all ranks have ended well."""
        self._reports()
        for rank, process in enumerate(self.processes):
            process.join()
            if process.exitcode:
                raise InputError(self._loss(rank))

    def _reports(self) -> None:
        """Until rank 0 closes its end, or one of the others fails."""
        ends = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while True:
            ready = wait([self.pipe, *ends])
            if self.pipe in ready:
                try:
                    self._receive(self.pipe.recv())
                except EOFError:
                    return
                continue
            for end in ready:
                rank = ends.pop(end)  # type: ignore[arg-type]
                self.processes[rank].join()
                if self.processes[rank].exitcode:
                    raise InputError(self._loss(rank))

    def _receive(self, message: Progress | Note | Failure) -> None:
        if isinstance(message, Failure):
            wait([process.sentinel for process in self.processes[1:]], GRACE)
            killed = [rank for rank, process in enumerate(self.processes) if (process.exitcode or 0) < 0]
            raise InputError(self._loss(killed[0]) if killed else message.text)
        if isinstance(message, Progress):
            self.item = message.item
        self.report(message)

    def _loss(self, rank: int) -> str:
        code = self.processes[rank].exitcode or 0
        if code < 0:
            why = f"was killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}"
            return f"calibrate: the process of rank {rank} {why} during {self.item}; {KEPT}"
        lines = _log(self.settings.raw, rank).read_text(errors="replace").strip().splitlines()
        return f"calibrate: rank {rank} failed during {self.item}: {lines[-1] if lines else f'status {code}'}; {KEPT}"


def _log(raw: Path, rank: int) -> Path:
    """What the process of a rank, and the libraries in it, print."""
    return raw / f"rank-{rank}.log"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(FAILED)


def _rank_main(rank: int, world: int, port: int, settings: Settings, pipe: Connection | None) -> None:
    """Entry of a process; a keyboard interrupt is its parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    with _log(settings.raw, rank).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    send = pipe.send if pipe is not None else print

    def fail(text: str) -> None:
        send(Failure(text))
        os._exit(FAILED)

    from spsim.calibrate.rank_process import run_rank
    from spsim.calibrate.ranks import Ranks, open_store

    try:
        run_rank(Ranks(rank, rank, world, world, open_store(port)), settings, send, fail)
    except InputError as error:
        fail(str(error))
