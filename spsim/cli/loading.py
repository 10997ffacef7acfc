"""How the packages of a command are imported, which is most of what a short command does."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from spsim.interrupts import ending_at_once


@contextmanager
def loading() -> Iterator[None]:
    """While packages are imported an interrupt ends the process; no time is lost on garbage or threads."""
    with ending_at_once(), _for_good(), _without_threads():
        yield


@contextmanager
def _for_good() -> Iterator[None]:
    """What is imported stays until the process ends: garbage is not looked for in it, neither now nor then."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without_threads() -> Iterator[None]:
    """numpy, where it is imported here, starts no threads for linear algebra: to start them takes longer than a command
    computes with arrays. What is imported later, or by other processes, starts its own.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
