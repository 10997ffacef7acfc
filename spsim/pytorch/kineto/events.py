"""Events of torch.profiler, and the one guard of what they say: a value of the wrong kind is an error that names the
event and the argument.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from spsim.errors import InputError, printable
from spsim.pytorch.kineto.names import ITEMSIZES, category

Thread = tuple[int | str, int | str]
"""(process, thread) of an event."""

MAX_TIME_US = 1e18
"""Beyond any time of day."""
MAX_DURATION_US = 9e12
"""A hundred days: picoseconds of 64 bits."""
MAX_COUNT = 2**50
MAX_NESTING = 4
"""Arguments, lists of tensors, tensors, dimensions."""
NAME_SHOWN, VALUE_SHOWN = 60, 40
"""Characters of a name and of a value in a message."""


@dataclass(frozen=True, slots=True)
class Event:
    """A complete event; times in microseconds since the base time of its file."""

    name: str
    category: str
    """In the words of today's versions."""
    thread: Thread
    start: float
    end: float
    arguments: dict[str, Any]
    number: int = 0
    """Its place in the file."""

    def identifier(self, key: str) -> int | str | None:
        """A number or name that tells things apart; None where there is none."""
        return self.place(key, self.arguments[key]) if key in self.arguments else None

    def place(self, key: str, value: Any) -> int | str:
        """A value that tells things apart, if it is one."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.wrong(key, value, "a number or a name")
        return value

    def count(self, key: str, default: int = 0) -> int:
        """How many of something there are."""
        value = self.arguments.get(key, default)
        if not _is_count(value):
            raise self.wrong(key, value, f"a whole number from 0 to {MAX_COUNT}")
        return int(value)

    def text(self, key: str) -> str:
        """A word; empty where there is none."""
        return printable(str(self.place(key, self.arguments.get(key, ""))))

    def ranks(self) -> tuple[int, ...]:
        """The ranks of its process group; none where the list was shortened, as torch does for large groups."""
        key = "Process Group Ranks"
        given = self.arguments.get(key, [])
        if isinstance(given, str):
            given = _parsed(given)
        if not (isinstance(given, list) and all(map(_is_count, given))):
            raise self.wrong(key, self.arguments[key], "a list of ranks")
        return tuple(given) if len(given) == self.count("Group size", len(given)) else ()

    def elements(self) -> list[int]:
        """Elements of each input, those of a list of tensors together; 0 where torch wrote no shape."""
        key = "Input Dims" if "Input Dims" in self.arguments else "Input dims"
        shapes = self.arguments.get(key, [])
        found = [_elements(shape, MAX_NESTING) for shape in shapes] if isinstance(shapes, list) else [None]
        known = [count for count in found if count is not None and count <= MAX_COUNT]
        if len(known) < len(found):
            raise self.wrong(key, shapes, "lists of sizes of tensors")
        return known

    def itemsize(self) -> int:
        """Bytes of an element of its first input of a known type; 0 where none is known."""
        types = self.arguments.get("Input type", [])
        if not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
            raise self.wrong("Input type", types, "a list of names")
        return next((ITEMSIZES[name] for name in types if name in ITEMSIZES), 0)

    def wrong(self, key: str, value: Any, rule: str) -> InputError:
        """What to raise where an argument is not what torch.profiler writes."""
        shown = repr(value)
        shown = shown if len(shown) <= VALUE_SHOWN else f"{shown[:VALUE_SHOWN]}…"
        where = f"event {self.number} of traceEvents ({self.name[:NAME_SHOWN]!r})"
        return InputError(f"{where}: {key!r} is {shown}, but must be {rule}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _parsed(text: str) -> Any:
    """What stands in a list that torch wrote as a text; nothing where it is shortened or empty."""
    if "..." in text or not text:
        return []
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _elements(shape: Any, nesting: int) -> int | None:
    """Elements of a tensor, or of a list of tensors; None where it is neither."""
    if not isinstance(shape, list) or nesting == 0:
        return None
    if all(map(_is_count, shape)):
        return prod(shape) if shape else 0
    parts = [_elements(part, nesting - 1) for part in shape]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def events_in(records: Sequence[Any]) -> Iterator[Event]:
    """The complete events among the records of a file; `InputError` names the first one that is malformed."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"event {number} of traceEvents is {str(record)[:VALUE_SHOWN]!r}, but must be a table")
        if record.get("ph") == "X":
            yield _event(record, number)


def _event(record: dict[str, Any], number: int) -> Event:
    name, kind, arguments = record.get("name"), record.get("cat") or "", record.get("args")
    if not (isinstance(name, str) and isinstance(kind, str)):
        raise InputError(f"event {number} of traceEvents: its name and cat must be texts")
    known, name = arguments if isinstance(arguments, dict) else {}, printable(name)
    event = Event(name, category(kind), ("", ""), 0.0, 0.0, known, number)
    start, duration = (_microseconds(event, key, record.get(key)) for key in ("ts", "dur"))
    if not 0 <= duration <= MAX_DURATION_US:
        raise event.wrong("dur", duration, f"a duration, from 0 to {MAX_DURATION_US:g} us")
    process, thread = (event.place(key, record.get(key, "")) for key in ("pid", "tid"))
    return Event(name, event.category, (process, thread), start, start + duration, known, number)


def _microseconds(event: Event, key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= MAX_TIME_US):
        raise event.wrong(key, value, f"a finite number, at most {MAX_TIME_US:g} us")
    return float(value)


def intervals(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The union of when events run, as intervals; they come in order of their starts."""
    found: list[tuple[float, float]] = []
    for event in events:
        if found and event.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], event.end))
        else:
            found.append((event.start, event.end))
    return found
