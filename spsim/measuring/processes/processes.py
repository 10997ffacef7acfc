"""Ranks as processes of this machine: started, listened to, and ended; whichever is lost is named in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from spsim.measuring.processes.at_hand import Position

GRACE_S = 1.0
"""How much later than its consequences the death of a rank may be noticed."""
FAILED = 2
"""Exit status of a rank that cannot go on."""


class RankError(Exception):
    """A rank is lost, and with it the others; the message is one line."""


class RankMemoryError(RankError):
    """A case needs more memory than a rank has; others may not."""


class Processes:
    """One process a rank, each with a log in `directory` of what it and its libraries print.

    A process calls `main(pipe, position, *arguments)`, and ends with this one at the latest. What it sends is handed
    out here; an exception that it sends is raised here, unless another rank was killed and so explains it.
    """

    def __init__(self, world: int, directory: Path, main: Callable[..., None], *arguments: object) -> None:
        self.doing = "the start"
        """What the ranks are at, for messages."""
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._directory = directory
        try:
            with _interrupts_held_back():
                for rank in range(world):
                    self._start(rank, main, (Position(rank, rank, world, world), *arguments))
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, main: Callable[..., None], arguments: tuple[object, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])  # loaded once for all ranks, on no device yet
        mine, theirs = context.Pipe()
        process = context.Process(target=_run, args=(self._log(rank), main, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self._pipes.append(mine)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []

    def send(self, message: object) -> None:
        """To every rank; the loss of one shows when it should answer."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(message)

    def messages(self) -> Iterator[Any]:
        """What any rank says, until all have ended well; `RankError` once one is lost."""
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes:
            for pipe in wait(list(open_pipes)):
                rank = open_pipes[pipe]  # type: ignore[index]
                try:
                    message = self._receive(rank)
                except EOFError:
                    if self._status(rank):
                        raise RankError(self._loss(rank)) from None
                    del open_pipes[pipe]  # type: ignore[arg-type]
                else:
                    yield message

    def answers(self, limit_s: float) -> list[Any]:
        """One message of each rank, in their order; `RankError` once one is lost or late."""
        end = time.monotonic() + limit_s
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            silent = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(silent), max(0.0, end - time.monotonic()))
            if not ready:
                ranks = ", ".join(map(str, silent.values()))
                raise RankError(f"no answer from rank {ranks} within {limit_s:g} s in {self.doing}")
            for pipe in ready:
                rank = silent[pipe]  # type: ignore[index]
                try:
                    found[rank] = self._receive(rank)
                except EOFError:
                    raise RankError(self._loss(rank)) from None
        return [found[rank] for rank in range(len(found))]

    def _receive(self, rank: int) -> Any:
        try:
            message = self._pipes[rank].recv()
        except OSError:
            raise EOFError from None
        if not isinstance(message, Exception):
            return message
        if not isinstance(message, RankMemoryError):
            wait([process.sentinel for other, process in enumerate(self.processes) if other != rank], GRACE_S)
            for other, process in enumerate(self.processes):
                if (process.exitcode or 0) < 0:
                    raise RankError(self._loss(other))
        raise message

    def _status(self, rank: int) -> int:
        self.processes[rank].join(GRACE_S)
        return self.processes[rank].exitcode or 0

    def _loss(self, rank: int) -> str:
        """How a rank has ended: by a signal, or with the last line of its log."""
        status = self._status(rank)
        if status < 0:
            memory = ", perhaps out of memory" if -status == signal.SIGKILL else ""
            return f"rank {rank} was ended by {signal.Signals(-status).name}{memory} in {self.doing}"
        lines = self._log(rank).read_text(errors="replace").strip().splitlines()
        return f"rank {rank} ended in {self.doing}: {lines[-1] if lines else f'status {status}'}"

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.log"


def end_with_parent() -> None:
    """From now on this process ends when the one that started it has, however busy or stuck it is."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(FAILED)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here never see a keyboard interrupt, which is their parent's to handle, later."""
    resource_tracker.ensure_running()  # its own start would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(log: Path, main: Callable[..., None], *arguments: object) -> None:
    """Entry of a process."""
    end_with_parent()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(*arguments)
