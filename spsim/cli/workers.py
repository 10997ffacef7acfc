"""What computes for a command that computes much: processes here, or the workers of a dask scheduler."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

from spsim.errors import InputError
from spsim.measuring.processes.processes import end_with_parent
from spsim.studies.executors import dask_executor

ExecutorOption = Annotated[
    Literal["processes", "dask"], typer.Option("--executor", help="What computes: processes here, or dask's workers.")
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", metavar="ADDRESS", help="Of the dask scheduler, such as tcp://head:8786.")
]

MOST_A_CORE = 16
"""Processes: more than one wait for each other, and each takes some 100 MiB."""


def check_workers(executor: str, scheduler: str | None, jobs: int | None) -> None:
    """`InputError` where options do not go together."""
    if (executor == "dask") != (scheduler is not None):
        raise InputError("--executor dask and --scheduler ADDRESS go together; give both or neither")
    if scheduler is not None and jobs is not None:
        raise InputError("--jobs are processes of this machine; leave it out with --executor dask")


@contextmanager
def workers(jobs: int, scheduler: str | None = None) -> Iterator[Executor | None]:
    """So many processes, which start when there is work; none for one job. With a scheduler its workers instead."""
    if scheduler is not None:
        with dask_executor(scheduler) as executor:
            yield executor
        return
    if jobs == 1:
        yield None
        return
    most = MOST_A_CORE * (os.cpu_count() or 1)
    if jobs > most:
        raise InputError(f"--jobs {jobs}: each is a process, and of this machine's cores {most} are plenty; give fewer")
    with ProcessPoolExecutor(jobs, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    """An interrupted worker ends without a word, and that of a killed sweep too: it holds both ends of its queue."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()
