"""What exported traces show: the kernels and collectives of a rank on a grid of whole nanoseconds, with what each does.

Trace viewers count nanoseconds. Start and end are rounded, and the duration is their difference: tasks that follow
each other on a lane still do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spsim.costs.models import cost_models
from spsim.engine.pieces import Piece
from spsim.engine.recording import Outline, Span, TaskInfo
from spsim.lazy import lazy
from spsim.program.instructions import Compute, HostCopy, Instruction
from spsim.program.mesh import Axis
from spsim.program.placement import Collective
from spsim.results.result import Result
from spsim.results.selection import Selection
from spsim.step.closing import Closing
from spsim.units import PS_PER_NS, PS_PER_US

Facts = Mapping[str, Any]
"""FLOPs and bytes of a kernel, algorithm and ranks of a collective: what an argument is called, and its value."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A kernel or collective of a rank."""

    piece: Piece
    span: Span
    info: TaskInfo
    facts: Facts

    @property
    def start_ns(self) -> int:
        """When work or transfer begins."""
        return nanoseconds(self.span.start_ps)

    @property
    def end_ns(self) -> int:
        """When it ends: later than it begins."""
        return nanoseconds(self.span.end_ps)

    @property
    def arguments(self) -> dict[str, Any]:
        """What a viewer shows of it; entries that do not apply are left out."""
        info, time = self.info, self.span.end_ps - self.span.start_ps
        found: dict[str, Any] = {"part": info.part}
        if info.layer is not None:
            found |= {"layer": info.layer, "micro_batch": info.micro_batch}
        found |= self.facts
        moved = found.get("bytes", 0)
        if info.collective:
            found |= {"purpose": info.purpose, "axis": info.axis, "message_bytes": info.message_bytes}
            found |= {"sent_bytes": info.sent_bytes, "wait_us": (self.span.start_ps - self.span.posted_ps) / PS_PER_US}
            moved = info.sent_bytes
        if "FLOPs" in found:
            found["TFLOP/s"] = round(found["FLOPs"] / time, 3)
        if moved:
            found["GB/s"] = round(moved * PS_PER_NS / time, 3)
        return found


def nanoseconds(time_ps: int) -> int:
    """The nearest whole nanosecond; of two the later."""
    return (time_ps + PS_PER_NS // 2) // PS_PER_NS


class Slices:
    """The slices of a selection, rank by rank."""

    def __init__(self, result: Result, selection: Selection) -> None:
        self.result = result
        self.selection = selection
        self._facts: dict[tuple[Outline, int], Sequence[Facts]] = {}

    @lazy
    def _described(self) -> list[tuple[Piece, Sequence[TaskInfo]]]:
        return [(piece, self.result.trace.describe(piece)) for piece in self.selection.pieces]

    def of(self, rank: int) -> Iterator[Slice]:
        """Of one rank in order of tasks, without what takes no time: the kernels that it does not run."""
        source = self.selection.ranks[rank]
        for piece, infos in self._described:
            known = self._known(piece, infos, source)
            for span, info, facts in zip(piece.spans_of(source), infos, known, strict=False):
                if nanoseconds(span.start_ps) < nanoseconds(span.end_ps):
                    yield Slice(piece, span, info, facts)

    # What each task does

    def _known(self, piece: Piece, infos: Sequence[TaskInfo], rank: int) -> Sequence[Facts]:
        """Of the tasks of a piece on a simulated rank."""
        prepared, outline = self.result.prepared, piece.recording.outline
        if made := prepared.closing_of(outline):
            return self._of_closing(made, infos)
        if outline not in prepared.by_outline:
            return [self._call("send_receive", ("pp",), info.message_bytes, 2) for info in infos]
        position = prepared.world.coordinate(rank, "ring")
        if (outline, position) not in self._facts:
            segment = prepared.by_outline[outline]
            self._facts[outline, position] = segment.woven(
                [self._of(step, position) for step in self.result.instructions_of(segment)],
                {t: self._call(s.collective, s.axes, s.message_bytes, s.ranks) for t, s in segment.added.items()},
            )
        return self._facts[outline, position]

    def _of(self, step: Instruction, position: int) -> Facts:
        if isinstance(step, HostCopy):
            return {"bytes": step.message_bytes}
        if not isinstance(step, Compute):
            return self._call(step.timed_as, (step.axis,), step.message_bytes, step.ranks)
        work = step.work[position if len(step.work) > 1 else 0]
        if work is None:
            return {}
        flops = {"FLOPs": int(work.flops)} if work.flops else {}
        return {**flops, "bytes": int(work.bytes_moved)}

    def _of_closing(self, made: Closing, infos: Sequence[TaskInfo]) -> list[Facts]:
        return [
            {} if isinstance(step, str) else self._call(step.collective, step.axes, info.message_bytes, step.ranks)
            for step, info in zip(made.steps, infos, strict=True)
        ]

    def _call(self, collective: Collective, axes: tuple[Axis, ...], message: int, ranks: int) -> Facts:
        scenario = self.result.scenario
        nodes = self.result.prepared.nodes(axes, ranks, scenario.gpus_per_node)
        _, costs = cost_models(scenario.hardware, scenario.workload.precision)
        return {"algorithm": costs.algorithm(collective, message, ranks, nodes), "ranks": ranks}
