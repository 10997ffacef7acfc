"""What of a trace a timeline shows: the passes of one layer, the ranks, and the spans of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spsim.engine.recording import COMPUTE_LANE, Span
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.export.chrome_trace import lane_order
from spsim.results.metrics import phase_of


@dataclass(frozen=True, slots=True)
class Window:
    """One pass of the layer over all ranks: when it ran, and where its start is drawn."""

    phase: str
    start_ps: int
    end_ps: int
    drawn_ps: int

    def place(self, time_ps: int) -> int:
        """Where a time is drawn, from the start of the first window; times outside stand at the edge."""
        return min(max(time_ps, self.start_ps), self.end_ps) - self.start_ps + self.drawn_ps

    @property
    def length_ps(self) -> int:
        """From the first task posted to the last end."""
        return self.end_ps - self.start_ps


@dataclass(frozen=True, slots=True)
class View:
    """The windows of a layer, the ranks shown, and their spans by window."""

    trace: Trace
    windows: list[Window]
    rows: list[tuple[int, str]]
    own: dict[str, list[tuple[int, Span]]]
    """Spans of the layer by phase, each with the rank that it is shown for."""
    others: dict[str, list[tuple[int, Span]]]
    """Spans of other layers during the same window."""

    @property
    def length_ps(self) -> int:
        """All windows together."""
        return sum(window.length_ps for window in self.windows)

    @property
    def ranks(self) -> list[int]:
        """Ranks from top to bottom."""
        return list(dict.fromkeys(rank for rank, _ in self.rows))


PHASES = ("forward", "backward")


def layer_view(
    trace: Trace, layer: int, micro_batch: int, phases: Sequence[str] | None, ranks: Sequence[int] | None
) -> View:
    """The view of some ranks, or of the distinct ones, in the given phases of one layer, or in those it has."""
    if phases is None:
        phases = [phase for phase in PHASES if any(leaf.stretch.phase == phase for leaf in trace.leaves)]
    shown = _simulated(trace, distinct_ranks(trace) if ranks is None else ranks)
    windows: list[Window] = []
    own, others = {}, {}
    for phase in phases:
        wanted = _tasks(trace, phase, layer, micro_batch)
        window = _window(trace, wanted, sum(w.length_ps for w in windows), phase)
        windows.append(window)
        inside = [
            (rank, s) for rank, source in shown.items() for s in trace.spans if s.rank == source and _meets(s, window)
        ]
        own[phase] = [(rank, span) for rank, span in inside if span.task in wanted]
        others[phase] = [(rank, span) for rank, span in inside if span.task not in wanted]
    used = {(rank, span.lane) for spans in own.values() for rank, span in spans}
    rows = [(rank, lane) for rank in shown for lane in lane_order(trace) if (rank, lane) in used]
    return View(trace, windows, rows, own, others)


def _tasks(trace: Trace, phase: str, layer: int, micro_batch: int) -> set[int]:
    """Tasks of a phase; those that belong to no layer count to every one."""
    found = {
        index
        for index, info in enumerate(trace.tasks)
        if phase_of(info.part) == phase and info.layer in (layer, None) and info.micro_batch in (micro_batch, None)
    }
    if not found:
        known = ", ".join(sorted({phase_of(info.part) for info in trace.tasks}))
        raise InputError(
            f"timeline: nothing runs in phase {phase!r} of layer {layer} and micro-batch {micro_batch}; "
            f"use phases of {known} and a layer and micro-batch of the run"
        )
    return found


def _window(trace: Trace, tasks: set[int], drawn: int, phase: str) -> Window:
    spans = [span for span in trace.spans if span.task in tasks]
    return Window(phase, min(s.posted_ps for s in spans), max(s.end_ps for s in spans), drawn)


def _meets(span: Span, window: Window) -> bool:
    """Whether a span is seen in a window; a kernel without duration is one that the rank did not run."""
    return span.posted_ps < span.end_ps and span.posted_ps < window.end_ps and span.end_ps > window.start_ps


def distinct_ranks(trace: Trace) -> list[int]:
    """The first of each set of ranks with the same spans."""
    spans: dict[int, list[tuple[int, ...]]] = {rank: [] for rank in trace.copies}
    for span in sorted(trace.spans, key=lambda s: s.task):
        spans[span.rank].append((span.task, *span[3:]))
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    return [rank for rank, own in spans.items() if first.setdefault(tuple(own), rank) == rank]


def _simulated(trace: Trace, ranks: Iterable[int]) -> dict[int, int]:
    """Rank -> the rank that was simulated for it."""
    source = {copy: rank for rank, copies in trace.copies.items() for copy in copies}
    unknown = [rank for rank in ranks if rank not in source]
    if unknown:
        raise InputError(f"ranks: {unknown[0]} is not a rank of the plan; use 0 to {max(source)}")
    return {rank: source[rank] for rank in ranks}


def busiest_view(trace: Trace, layer: int, micro_batch: int, phases: Sequence[str] | None) -> View:
    """The view of the rank that computes longest; the others wait for it."""
    busy = dict.fromkeys(trace.copies, 0)
    for span in trace.spans:
        if span.lane.startswith(COMPUTE_LANE):
            busy[span.rank] += span.end_ps - span.start_ps
    return layer_view(trace, layer, micro_batch, phases, [max(busy, key=busy.__getitem__)])
