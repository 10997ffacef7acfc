"""Figures of a step of several pipeline stages, from its passes and how often each runs: no trace is written out.

They are what `metrics` finds in the trace of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spsim.engine.pieces import Pass
from spsim.engine.trace import Trace
from spsim.lazy import lazy
from spsim.results import metrics
from spsim.results.derived import operator_name
from spsim.results.metrics import Idle
from spsim.step.itinerary import Chunk
from spsim.step.pipeline.orders import KINDS
from spsim.step.pipelined import PHASES, Pipelined, PlacedChunk


class Spot(NamedTuple):
    """The moment of a stage at which its memory is fullest, or first too full."""

    stage: int
    rank: int
    """That is simulated for it."""
    bytes: int
    operator: str | None
    """Whose allocation it is; None for what is there all the time."""


@dataclass(frozen=True)
class Staged:
    """Reads a step that ran on several stages."""

    ran: Pipelined
    micro_batches: int

    @lazy
    def traces(self) -> Mapping[tuple[Chunk, Pass], Trace]:
        """Of each pass by itself."""
        return {key: Trace(alone.nodes, {0: (0,)}, lambda piece: ()) for key, alone in self.ran.passes.items()}

    def _passes(self, stage: int) -> Iterator[tuple[PlacedChunk, Pass, Trace]]:
        """Of each chunk of a stage both passes."""
        for chunk in self.ran.stages[stage]:
            for phase in PHASES.values():
                yield chunk, phase, self.traces[chunk.runs, phase]

    @property
    def stages(self) -> range:
        """Their numbers."""
        return range(len(self.ran.stages))

    # Times

    @property
    def end_ps(self) -> int:
        """When the last stage has ended."""
        return max(self.ran.ends_ps)

    def layer_window(self, phase: Pass) -> int:
        """One layer's pass, where a chunk has any."""
        for stage in self.stages:
            for chunk, own, trace in self._passes(stage):
                if own == phase and any(run.numbered for run in chunk.runs):
                    return metrics.layer_window(trace, phase)
        return 0

    @lazy
    def idle(self) -> dict[int, Idle]:
        """Of each simulated rank, as `metrics.idle`."""
        transfer, posted, neither = self.ran.gaps.totals(len(self.stages))
        by_pass = {key: metrics.idle(trace)[0] for key, trace in self.traces.items()}
        found = {}
        for stage in self.stages:
            total = Idle(transfer[stage], 0, posted[stage], neither[stage])
            for chunk, phase, _ in self._passes(stage):
                total = total.plus(by_pass[chunk.runs, phase], self.micro_batches)
            found[self.ran.rank_of(stage)] = total
        return found

    @property
    def weight_sync_ps(self) -> int:
        """Synchronisation of weights and gradients, on the stage with most of it."""
        return max(
            sum(moments[-1][2] - moments[0][0] for made, moments in own if made.segment.phase == "weight_sync")
            for own in self.ran.closing
        )

    def compute_by_class(self) -> dict[str, int]:
        """Kernels in the layers of the first stage."""
        found: Counter[str] = Counter()
        for _, _, trace in self._passes(0):
            for name, ps in metrics.compute_by_class(trace, 0).items():
                found[name] += self.micro_batches * ps
        return dict(found)

    # Memory

    @lazy
    def _levels(self) -> dict[tuple[Chunk, Pass], tuple[int, int]]:
        """Of each pass, how much memory it takes over what is there before, and what it leaves."""
        found = {}
        for key, trace in self.traces.items():
            profile = metrics.profile(trace.nodes, 0)
            found[key] = (profile.highest, profile.total) if profile else (0, 0)
        return found

    def _before(self, stage: int) -> tuple[np.ndarray, np.ndarray, list[tuple[Chunk, Pass]]]:
        """What is there before each pass of a stage, which of the last list it is, and those."""
        sorts = [(chunk.runs, phase) for chunk in self.ran.stages[stage] for phase in PHASES.values()]
        graph = self.ran.timeline.graph
        kinds, chunks, _ = (column[graph.ranks[graph.passes] == stage] for column in graph.score.columns)
        names = [*PHASES]
        places = np.array([names.index(kind) if kind in names else 0 for kind in KINDS])
        which = len(names) * chunks + places[kinds]
        left = np.array([self._levels[sort][1] for sort in sorts])[which]
        return np.cumsum(left) - left, which, sorts

    def fullest(self, static: Mapping[int, int]) -> Spot:
        """Over `static` bytes of each simulated rank."""
        found = []
        for stage in self.stages:
            always = static[self.ran.rank_of(stage)]
            before, which, sorts = self._before(stage)
            levels = before + np.array([self._levels[sort][0] for sort in sorts])[which]
            at = int(levels.argmax())
            operator = self._fullest_of(stage, int(which[at])) if levels[at] > 0 else None
            found.append(Spot(stage, self.ran.rank_of(stage), always + max(0, int(levels[at])), operator))
        return max(found, key=lambda spot: spot.bytes)

    def _fullest_of(self, stage: int, which: int) -> str:
        chunk, phase = self._sort(stage, which)
        trace = self.traces[chunk.runs, phase]
        profile = metrics.profile(trace.nodes, 0)
        assert profile is not None
        return self._name(trace, profile.task, chunk)

    def first_above(self, stage: int, static: int, limit: int) -> str | None:
        """The operator whose allocation first takes a stage above a limit."""
        before, which, sorts = self._before(stage)
        levels = before + np.array([self._levels[sort][0] for sort in sorts])[which]
        over = np.flatnonzero(static + levels > limit)
        if not len(over):
            return None
        at = int(over[0])
        chunk, phase = self._sort(stage, int(which[at]))
        trace = self.traces[chunk.runs, phase]
        task = metrics.first_above(trace, 0, static + int(before[at]), limit)
        return None if task is None else self._name(trace, task, chunk)

    def _sort(self, stage: int, which: int) -> tuple[PlacedChunk, Pass]:
        chunk, phase = divmod(which, len(PHASES))
        return self.ran.stages[stage][chunk], [*PHASES.values()][phase]

    @staticmethod
    def _name(trace: Trace, task: int, chunk: PlacedChunk) -> str:
        piece = trace.piece_of(task)
        layer = None if piece.layer is None else piece.layer + chunk.first
        return operator_name(piece.recording.outline.labels[task - piece.first_task], layer)
