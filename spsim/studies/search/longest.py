"""The longest sequence for which a plan fits: lengths by doubling, and then by sixteenths of the last one that fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from spsim.studies.search.candidates import Candidate, Given, candidates
from spsim.studies.search.rounds import fits, rows_of
from spsim.studies.search.space import MICRO_BATCH, Space

LONGEST = 2**28
"""Tokens beyond which nothing is asked."""
PARTS = 16
"""Between a length and its double."""
TRIED = 8
"""Plans that are simulated at a time, those that may take the least memory first."""


def longest_length(space: Space, given: Given, room_gib: float, executor: Executor | None) -> int | None:
    """Tokens of the longest sequence that fits under one plan at least, from that of the workload on, which it is a
    multiple or a sixteenth of one of; None where that does not fit.
    """
    start = space.workload.seq_len
    doubled = [start << power for power in range(max(1, (LONGEST // start).bit_length()))]
    found = _longest_of(doubled, space, given, room_gib, executor)
    if found is None:
        return None
    between = [found * (PARTS + part) // PARTS for part in range(1, PARTS)]
    return _longest_of(between, space, given, room_gib, executor) or found


def _longest_of(
    lengths: Sequence[int], space: Space, given: Given, room_gib: float, executor: Executor | None
) -> int | None:
    """The longest of some lengths that fits, with the smallest micro-batch."""
    smallest = min(space.micro_batches)
    narrow = replace(space, values={**space.values, MICRO_BATCH: [smallest]})
    by_length: dict[int, list[Candidate]] = defaultdict(list)
    for own in candidates(given, narrow.families(lengths), executor):
        if own.memory_gib <= room_gib:
            by_length[own.seq_len].append(own)
    for length in sorted(by_length, reverse=True):
        order = sorted(by_length[length], key=lambda own: own.memory_gib)
        for first in range(0, len(order), TRIED):
            if any(map(fits, rows_of(order[first : first + TRIED], given, executor))):
                return length
    return None
