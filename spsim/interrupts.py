"""How a process ends that is interrupted before it has begun. Imports next to nothing, so that it is there at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""Exit status of a command that was interrupted from the keyboard."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While packages are imported an interrupt ends the process where it stands, in one line.

    An exception instead might pass through an import that takes it for a failure of its own.
    """
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    print("interrupted; nothing was started", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
