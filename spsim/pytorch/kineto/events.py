"""One file of torch.profiler: its events by category, who nests in whom, and which part of a step they belong to."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spsim.engine.pieces import Pass
from spsim.errors import InputError

HINT = "give a trace that torch.profiler exported (export_chrome_trace or tensorboard_trace_handler)"
AUTOGRAD = "autograd::engine::evaluate_function"
OPTIMIZER = "Optimizer.step"

Thread = tuple[Any, Any]
"""(process, thread) of an event."""


@dataclass(frozen=True, slots=True)
class Event:
    """A complete event; times in microseconds since the base time of its file."""

    name: str
    category: str
    thread: Thread
    start: float
    end: float
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ProfiledRank:
    """The events of one file."""

    path: Path
    rank: int
    base_ns: int
    """Time of day from which the times of the events count."""
    distributed: dict[str, Any]
    events: Sequence[Event]

    def of(self, *categories: str) -> list[Event]:
        """Events of some categories, in order of their starts, the outer before the inner."""
        chosen = [event for event in self.events if event.category in categories]
        return sorted(chosen, key=lambda event: (event.start, -event.end))

    @cached_property
    def _backward(self) -> dict[Thread, list[tuple[float, float]]]:
        """When each thread computed gradients."""
        return _intervals(event for event in self.of("cpu_op") if event.name.startswith(AUTOGRAD))

    @cached_property
    def _optimizer(self) -> list[tuple[float, float]]:
        found = (event for event in self.of("user_annotation", "cpu_op") if event.name.startswith(OPTIMIZER))
        return sorted((event.start, event.end) for event in found)

    def phase_at(self, thread: Thread, time: float) -> Pass:
        """The part of a step that a thread works on: gradients inside autograd's engine, else forward."""
        if _inside(self._backward.get(thread, ()), time):
            return "backward"
        return "optimizer" if _inside(self._optimizer, time) else "forward"


def _intervals(events: Iterable[Event]) -> dict[Thread, list[tuple[float, float]]]:
    """Outermost intervals of each thread; events come in order of their starts."""
    found: dict[Thread, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        own = found[event.thread]
        if not own or event.start >= own[-1][1]:
            own.append((event.start, event.end))
    return found


def _inside(intervals: Sequence[tuple[float, float]], time: float) -> bool:
    index = bisect_right(intervals, (time, float("inf"))) - 1
    return index >= 0 and time <= intervals[index][1]


def read_profile(path: Path, default_rank: int) -> ProfiledRank:
    """Read one file, plain or gzipped; `InputError` in one line where it is none of torch.profiler's."""
    document = _document(path)
    records = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise InputError(f"{path}: has no list 'traceEvents'; {HINT}")
    try:
        events = [_event(record) for record in records if record.get("ph") == "X"]
        distributed = dict(document.get("distributedInfo") or {})
        rank, base = int(distributed.get("rank", default_rank)), int(document.get("baseTimeNanoseconds", 0))
    except InputError as error:
        raise InputError(f"{path}: {error}; {HINT}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: an event is not as torch.profiler writes it ({error!r}); {HINT}") from None
    return ProfiledRank(path, rank, base, distributed, events)


def _event(record: dict[str, Any]) -> Event:
    start, duration = (_microseconds(record, key) for key in ("ts", "dur"))
    if duration < 0:
        raise InputError(f"event {record['name']!r} has dur {duration}; a duration must not be negative")
    arguments = record.get("args")
    return Event(
        str(record["name"]), str(record.get("cat", "")), (record.get("pid"), record.get("tid")),
        start, start + duration, arguments if isinstance(arguments, dict) else {},
    )  # fmt: skip


def _microseconds(record: dict[str, Any], key: str) -> float:
    time = float(record[key])
    if not math.isfinite(time):
        raise InputError(f"event {record['name']!r} has {key} {time}; times must be finite numbers")
    return time


def _document(path: Path) -> Any:
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {HINT}") from None
    except (EOFError, zlib.error):
        raise InputError(f"{path}: the compressed file is cut short or damaged; {HINT}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON, or is cut short; {HINT}") from None
