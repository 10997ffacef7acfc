"""Files in the Trace Event Format (Google, "Trace Event Format", 2016), which several viewers and tools read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from spsim.files import whole_file
from spsim.units import NS_PER_US

Event = dict[str, Any]


def write_events(path: Path, head: dict[str, Any], events: Iterable[Event]) -> None:
    """Write what describes a trace, and its events, one a line; compressed if the name ends in `.gz`. The same events
    give the same bytes.
    """
    with _opened(path) as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [')
        separator = "\n"
        for event in events:
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write("\n]}\n")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        if path.suffix != ".gz":
            with TextIOWrapper(raw, encoding="utf-8", newline="") as file:
                yield file
            return
        # Neither name nor time of the file may be in it, or no two would be equal.
        with (
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            TextIOWrapper(packed, encoding="utf-8", newline="") as file,
        ):
            yield file


def complete(name: str, category: str, start_ns: int, end_ns: int, pid: int, tid: int) -> Event:
    """A slice of a thread."""
    return {
        "name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid,
        "ts": start_ns / NS_PER_US, "dur": (end_ns - start_ns) / NS_PER_US,
    }  # fmt: skip


def process(pid: int, name: str, place: int) -> Iterator[Event]:
    """The name of a process, and its place among the others."""
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": place}}


def thread(pid: int, tid: int, name: str, place: int) -> Iterator[Event]:
    """The name of a thread, and its place in its process."""
    yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
    yield {"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": place}}
