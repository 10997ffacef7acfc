"""The seam to a model of links: who decides when a transfer ends.

Without a network every communication takes its own duration from its last meeting on, as if it had its links alone.
A network that lets transfers share links decides otherwise, and the engine takes its word for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import simpy

from spsim.engine.tasks import Key


class Transfer(NamedTuple):
    """What one rendezvous sets off: a collective is one transfer, the exchange of a ring one per edge."""

    key: Key
    """Of its meeting."""
    tasks: tuple[tuple[int, int], ...]
    """(rank, task) of all that take part, in order."""
    duration_ps: int
    """How long it takes when it has its links alone; the longest, if its tasks differ."""


class Network(Protocol):
    """Decides when transfers end. It belongs to the simpy environment of one run, whose clock is in picoseconds."""

    @property
    def shares(self) -> bool:
        """Whether transfers change each other's ends. Then a run has to begin with none under way: the network would
        not know of those that a `Start` tells of.
        """

    def begin(self, transfer: Transfer, at: int) -> int | simpy.Event:
        """When a transfer ends that begins at `at`, on all its ranks: a time, if nothing that comes later can change
        it, or else an event of the environment that happens then.

        It is asked once for each transfer, as soon as it is known when its ranks have met, which may be ahead of the
        clock: `at` is now or later. Transfers come in no order of time, and those of one moment in no order at all,
        so that no end may depend on who came first. Neither a time nor an event is before `at`. Time is whole
        picoseconds: what ends within one ends with it. Once no transfer is left nothing may go on in the environment,
        since the run lasts until nothing does.
        """


MakeNetwork = Callable[[simpy.Environment], Network]
"""Anew for each run, so that nothing is left of the run before."""
