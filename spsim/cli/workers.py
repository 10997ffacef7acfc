"""The processes of a command that computes much."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from spsim.measuring.processes.processes import end_with_parent


@contextmanager
def workers(jobs: int) -> Iterator[Executor | None]:
    """So many processes, which start when there is work; none for one job."""
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    """An interrupted worker ends without a word, and that of a killed sweep too: it holds both ends of its queue."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
