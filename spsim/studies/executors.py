"""The workers of a dask scheduler as an executor: whoever computes points takes any `concurrent.futures.Executor`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager, suppress

from spsim.errors import InputError

CONNECT_S = 10
"""Until a scheduler has answered."""


@contextmanager
def dask_executor(scheduler: str) -> Iterator[Executor]:
    """The workers of the scheduler at an address such as `tcp://head:8786`, those that come later included.

    Where one is lost, the scheduler gives what it was computing to another. `InputError` where dask is not installed or
    nobody answers, or where the scheduler is lost.
    """
    try:
        from distributed import Client
        from distributed.comm import CommClosedError
    except ImportError:
        raise InputError('--executor dask needs dask; install it with pip install "spsim[dask]"') from None
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {scheduler!r}: no dask scheduler answers there ({error}); start one") from None
    try:
        yield client.get_executor(pure=False)
    except (CancelledError, CommClosedError):
        raise InputError("the scheduler of the workers was lost; finished rows are kept, run again to go on") from None
    finally:
        with suppress(OSError):  # of a scheduler that is lost
            client.close()
