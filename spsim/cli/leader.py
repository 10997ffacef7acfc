"""Which of the ranks of a launcher speaks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from spsim.errors import InputError
from spsim.measuring.processes.at_hand import is_leader

LEADER_FIRST_S = 3.0
"""How much later than the leader the other ranks end: torchrun ends all, silent or not, once one has ended."""


@contextmanager
def leader_speaks() -> Iterator[None]:
    """Of the ranks of a launcher the leader alone says what is wrong."""
    try:
        yield
    except InputError:
        if is_leader():
            raise
        time.sleep(LEADER_FIRST_S)
        raise SystemExit(2) from None
