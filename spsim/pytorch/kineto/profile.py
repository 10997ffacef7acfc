"""One file of torch.profiler: its events by category, what encloses what, and what the host works on."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from spsim.errors import InputError
from spsim.files import read_limited
from spsim.pytorch.kineto.events import Event, Thread, events_in
from spsim.pytorch.kineto.names import CALLS, DEVICE_WORK, is_beside_work
from spsim.pytorch.kineto.phases import Phases
from spsim.units import GIB

HINT = "give a trace that torch.profiler exported (export_chrome_trace or tensorboard_trace_handler)"
MAX_BYTES = GIB
"""Of a file, inflated; as objects it takes some ten times as much. A step of a large model is a few hundred MB."""
MAX_RANK = 2**31


@dataclass(frozen=True)
class ProfiledRank:
    """The events of one file."""

    path: Path
    rank: int
    base_ns: int
    """Time of day from which the times of the events count."""
    world: int
    """Ranks of the run; 0 where the file does not say."""
    groups: Sequence[tuple[int, ...]]
    """The ranks of each process group that the file lists."""
    events: Sequence[Event]

    def of(self, *categories: str) -> list[Event]:
        """Events of some categories, in order of their starts, the outer before the inner."""
        return _in_order([event for event in self.events if event.category in categories])

    @cached_property
    def work(self) -> list[Event]:
        """What devices did: categories of work, and categories that are not known whose events say their stream or
        device, or were launched by a call.
        """
        launched = {event.identifier("correlation") for event in self.events if event.category.endswith(CALLS)} - {None}
        return _in_order([event for event in self.events if _is_work(event, launched)])

    @cached_property
    def launches(self) -> dict[int | str, Event]:
        """Calls of the host to a device by their correlation."""
        work = set(map(id, self.work))
        calls = (event for event in self.events if id(event) not in work and not is_beside_work(event.category))
        found = {event.identifier("correlation"): event for event in calls}
        return {key: event for key, event in found.items() if key is not None}

    @cached_property
    def phases(self) -> Phases:
        """What the threads of the host work on."""
        return Phases(self.of("cpu_op", "user_annotation"))


def _is_work(event: Event, launched: set[int | str | None]) -> bool:
    if event.category in DEVICE_WORK:
        return True
    if is_beside_work(event.category) or event.category.endswith(CALLS):
        return False
    return bool(event.arguments.keys() & {"stream", "device"}) or event.identifier("correlation") in launched


def _in_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda event: (event.start, -event.end))


class Enclosing:
    """Events of which one may ask for the innermost that a moment of a thread lies in; they come in order."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events: dict[Thread, list[Event]] = defaultdict(list)
        for event in events:
            self._events[event.thread].append(event)
        self._starts = {thread: [event.start for event in own] for thread, own in self._events.items()}
        self._latest = {thread: list(accumulate((e.end for e in own), max)) for thread, own in self._events.items()}

    def at(self, thread: Thread, time: float) -> Event | None:
        """The innermost event, if there is one."""
        index = bisect_right(self._starts.get(thread, ()), time) - 1
        while index >= 0 and self._latest[thread][index] >= time:
            if self._events[thread][index].end >= time:
                return self._events[thread][index]
            index -= 1
        return None


def read_profile(path: Path, default_rank: int) -> ProfiledRank:
    """Read one file, plain or gzipped; `InputError` in one line where it is none of torch.profiler's."""
    document = _document(path)
    records = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path}: has no list 'traceEvents'; {HINT}")
    about = document.get("distributedInfo")
    about = {} if about is None else about
    if not isinstance(about, dict):
        raise InputError(f"distributedInfo is {about!r:.40}, but must be a table")
    return ProfiledRank(
        path,
        _number(about, "rank", default_rank, MAX_RANK),
        _number(document, "baseTimeNanoseconds", 0, 2**63),
        _number(about, "world_size", 0, MAX_RANK),
        _groups(about.get("pg_config")),
        list(events_in(records)),
    )


def _document(path: Path) -> Any:
    content = read_limited(path, MAX_BYTES)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON, or is cut short; {HINT}") from None


def _number(table: dict[str, Any], key: str, default: int, limit: int) -> int:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise InputError(f"{key} is {value!r:.40}, but must be a whole number from 0 to {limit - 1}")
    return value


def _groups(listed: Any) -> list[tuple[int, ...]]:
    """The ranks of each process group."""
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise InputError(f"pg_config is {listed!r:.40}, but must be a list of process groups")
    found = []
    for group in listed:
        ranks = group.get("ranks", []) if isinstance(group, dict) else None
        if not (isinstance(ranks, list) and all(isinstance(rank, int) and 0 <= rank < MAX_RANK for rank in ranks)):
            raise InputError(f"pg_config: {group!r:.40} is no process group with a list of ranks")
        found.append(tuple(ranks))
    return found
