"""What of a trace a timeline shows: the passes of one layer, the ranks, and what both do meanwhile.

Only pieces of the trace that are under way during those passes are looked at, whatever the length of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from spsim.engine.pieces import Pass, Piece
from spsim.engine.recording import Span, TaskInfo
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.results.accounts import Interval, kernels_wait
from spsim.results.metrics import compute_by_class
from spsim.results.selection import distinct_ranks, lane_order, simulated_for, spread


@dataclass(frozen=True, slots=True)
class Window:
    """One pass of the layer over all ranks: when it ran, and where its start is drawn."""

    phase: Pass
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


class Shown(NamedTuple):
    """A span, the rank that it is shown for, and what it is."""

    rank: int
    span: Span
    info: TaskInfo


@dataclass(frozen=True, slots=True)
class Scene:
    """What happens in one window on the ranks shown."""

    window: Window
    own: list[Shown]
    """Of the layer."""
    others: list[Shown]
    """Of other layers and passes."""
    waits: list[tuple[int, Interval]]
    """Rank, and when its kernels wait for another."""


@dataclass(frozen=True, slots=True)
class View:
    """The passes of a layer, and the ranks and lanes shown."""

    trace: Trace
    scenes: list[Scene]
    rows: list[tuple[int, str]]

    @property
    def windows(self) -> list[Window]:
        """From left to right."""
        return [scene.window for scene in self.scenes]

    @property
    def length_ps(self) -> int:
        """All windows together."""
        return sum(window.length_ps for window in self.windows)

    @property
    def ranks(self) -> list[int]:
        """Ranks from top to bottom."""
        return list(dict.fromkeys(rank for rank, _ in self.rows))


MOST_RANKS = 8
"""Ranks that are shown unless they are named: a ring that is cut contiguously has as many distinct ones as ranks."""
PHASES: tuple[Pass, ...] = ("forward", "backward")


def layer_view(
    trace: Trace,
    layer: int,
    micro_batch: int,
    phases: Sequence[str] | None,
    ranks: Sequence[int] | None,
    *,
    alone: bool = False,
) -> View:
    """The view of some ranks, or of the distinct ones and not too many, in the given phases of one layer, or in those
    it has. Windows are those of all ranks, or of the ones that are shown `alone`.
    """
    there = {leaf.stretch.phase for leaf in trace.leaves}
    wanted = [phase for phase in PHASES if phase in there] if phases is None else phases
    shown = simulated_for(trace, spread(distinct_ranks(trace), MOST_RANKS) if ranks is None else ranks)
    scenes: list[Scene] = []
    for phase in wanted:
        drawn = sum(scene.window.length_ps for scene in scenes)
        pieces = _pieces(trace, phase, layer, micro_batch)
        own = [piece for piece in pieces if not piece.recording.times.keys().isdisjoint(shown.values())]
        scenes.append(_scene(trace, own or pieces, shown, drawn, alone=alone))
    used = {(rank, span.lane) for scene in scenes for rank, span, _ in scene.own}
    rows = [(rank, lane) for rank in shown for lane in lane_order(trace) if (rank, lane) in used]
    return View(trace, scenes, rows)


def _pieces(trace: Trace, phase: str, layer: int, micro_batch: int) -> list[Piece]:
    """Those of a phase; those that belong to no layer count to every one."""
    found = [piece for name in get_args(Pass) if name == phase for piece in trace.pieces_of(name, layer, micro_batch)]
    if not found:
        known = ", ".join(sorted({leaf.stretch.phase for leaf in trace.leaves}))
        raise InputError(
            f"timeline: nothing runs in phase {phase!r} of layer {layer} and micro-batch {micro_batch}; "
            f"use phases of {known} and a layer and micro-batch of the run"
        )
    return found


def _scene(
    trace: Trace, pieces: Sequence[Piece], shown: Mapping[int, int], drawn: int, *, alone: bool = False
) -> Scene:
    """The window of some pieces; `shown` says which rank was simulated for each that is shown."""
    spans = (span for piece in pieces if alone for rank in shown.values() for span in piece.spans_of(rank))
    windows = [(span.posted_ps, span.end_ps) for span in spans] or [piece.window for piece in pieces]
    start, end = min(begin for begin, _ in windows), max(end for _, end in windows)
    window = Window(pieces[0].phase, start, end, drawn)
    under_way = list(trace.pieces_during(start, end))
    own_tasks = {piece.first_task for piece in pieces}
    own: list[Shown] = []
    others: list[Shown] = []
    for piece in under_way:
        (own if piece.first_task in own_tasks else others).extend(_spans(trace, piece, shown, window))
    waits = [(rank, wait) for rank, source in shown.items() for wait in kernels_wait(under_way, source, start, end)]
    return Scene(window, own, others, waits)


def _spans(trace: Trace, piece: Piece, shown: Mapping[int, int], window: Window) -> Iterator[Shown]:
    """The spans of a piece that are seen in a window; a kernel without duration is one that the rank did not run."""
    infos = trace.describe(piece)
    for rank, source in shown.items():
        for span, info in zip(piece.spans_of(source), infos, strict=False):
            if span.posted_ps < min(span.end_ps, window.end_ps) and span.end_ps > window.start_ps:
                yield Shown(rank, span, info)


def busiest_view(trace: Trace, layer: int, micro_batch: int, phases: Sequence[str] | None) -> View:
    """The view of the rank that computes longest; the others wait for it."""
    busy = {rank: sum(compute_by_class(trace, rank).values()) for rank in trace.copies}
    return layer_view(trace, layer, micro_batch, phases, [max(busy, key=busy.__getitem__)])


def first_layer(trace: Trace, rank: int) -> int:
    """The first layer that a rank runs, of the stage that it is on."""
    (source,) = simulated_for(trace, [rank]).values()
    own = (leaf.stretch for leaf in trace.leaves if source in leaf.stretch.recording.times)
    return min((stretch.layer for stretch in own if stretch.layer is not None), default=0)
