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
from spsim.inputs.schedules import HALVED
from spsim.lazy import lazy
from spsim.results import accounts, metrics
from spsim.results.accounts import Account
from spsim.results.derived import operator_name
from spsim.results.metrics import Idle
from spsim.step.itinerary import Chunk
from spsim.step.pipeline.orders import KINDS, Action
from spsim.step.pipelined import PHASES, Pipelined, PlacedChunk, Work

Sort = tuple[Chunk, Work]
"""Of passes that are alike."""


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
    def traces(self) -> Mapping[Sort, Trace]:
        """Of each pass by itself."""
        return {key: Trace(alone.nodes, {0: (0,)}, lambda piece: ()) for key, alone in self.ran.passes.items()}

    def _passes(self, stage: int) -> Iterator[tuple[Sort, int]]:
        """What the chunks of a stage run, and how often."""
        for which, times in enumerate(self._often[stage]):
            if times:
                chunk, work = self._sort(stage, which)
                yield (chunk.runs, work), times

    @lazy
    def _often(self) -> list[list[int]]:
        """Of each stage, how often each of its chunks runs each of `KINDS`."""
        timeline = self.ran.timeline
        stages = timeline.graph.score.stages
        if stages.schedule not in HALVED:
            return [[self.micro_batches, self.micro_batches, 0, 0] * stages.chunks] * stages.ranks
        found = np.zeros((stages.ranks, stages.chunks * len(KINDS)), np.int64)
        for section in timeline.sections:
            passes = section.passes
            np.add.at(found, (passes.ranks, len(KINDS) * passes.chunks + passes.kinds), section.runs)
        often: list[list[int]] = found.tolist()
        return often

    def _sort(self, stage: int, which: int) -> tuple[PlacedChunk, Work]:
        chunk, kind = divmod(which, len(KINDS))
        return self.ran.stages[stage][chunk], self.ran.work_of(stage, Action(KINDS[kind], chunk, 0))

    @property
    def stages(self) -> range:
        """Their numbers."""
        return range(len(self.ran.stages))

    # Times

    @property
    def end_ps(self) -> int:
        """When the last stage has ended."""
        return max(self.ran.ends_ps)

    @property
    def pass_ends(self) -> dict[int, int]:
        """When each simulated rank has run its last pass, and waited for what it sends of it."""
        finished: list[int] = self.ran.timeline.finished_ps.tolist()
        return {self.ran.rank_of(stage): end for stage, end in enumerate(finished)}

    def layer_window(self, phase: Pass) -> int:
        """One layer's pass, where a chunk has any; of halves the sum."""
        for runs, work in (sort for stage in self.stages for sort, _ in self._passes(stage)):
            if PHASES.get(work) == phase and any(run.numbered for run in runs):
                halves: list[Work] = ["input gradients", "weight gradients"]
                works = halves if work in halves else [work]
                return sum([metrics.layer_window(self.traces[runs, own], phase) for own in works])
        return 0

    @lazy
    def idle(self) -> dict[int, Idle]:
        """Of each simulated rank, as `metrics.idle`."""
        transfer, posted, neither = self.ran.gaps.totals(len(self.stages))
        by_pass = {key: metrics.idle(trace)[0] for key, trace in self.traces.items()}
        found = {}
        for stage in self.stages:
            total = Idle(transfer[stage], 0, posted[stage], neither[stage])
            for sort, times in self._passes(stage):
                total = total.plus(by_pass[sort], times)
            found[self.ran.rank_of(stage)] = total
        return found

    @lazy
    def account(self) -> Account:
        """Where the time of the stage that ends last goes, as `accounts.of_step`."""
        ran, found = self.ran, Account()
        stage = max(self.stages, key=lambda number: (ran.ends_ps[number], -number))
        for sort, times in self._passes(stage):
            if self.traces[sort].nodes:
                found.add(accounts.of_step(self.traces[sort]), times)
        transfer, posted, neither = (own[stage] for own in ran.gaps.totals(len(self.stages)))
        gaps = {"exposed send-receive": transfer, accounts.STAGES: posted, accounts.IDLE: neither}
        found.parts.update(gaps)
        rank = ran.rank_of(stage)
        closing = [node for node in ran.closing_nodes(0) if rank in node.recording.times]
        if closing:
            found.add(accounts.of_step(Trace(closing, {rank: (rank,)}, lambda piece: ())))
        return found

    @property
    def weight_sync_ps(self) -> int:
        """Synchronisation of weights and gradients, on the stage with most of it."""
        return max(
            sum(moments[-1][2] - moments[0][0] for made, moments in own if made.segment.phase == "weight_sync")
            for own in self.ran.closing
        )

    @property
    def optimizer_ps(self) -> int:
        """The optimizer's kernels and what ranks agree on, on the stage that comes to them last."""
        own = [[m for made, m in closing if made.segment.phase == "optimizer"] for closing in self.ran.closing]
        last = max((moments for moments in own if moments), key=lambda moments: moments[0][0][0], default=[])
        return sum(moments[-1][2] - moments[0][0] for moments in last)

    def compute_by_class(self) -> dict[str, int]:
        """Kernels in the layers of the first stage."""
        found: Counter[str] = Counter()
        for sort, times in self._passes(0):
            for name, ps in metrics.compute_by_class(self.traces[sort], 0).items():
                found[name] += times * ps
        return dict(found)

    # Memory

    @lazy
    def _levels(self) -> dict[Sort, tuple[int, int]]:
        """Of each pass, how much memory it takes over what is there before, and what it leaves."""
        found = {}
        for key, trace in self.traces.items():
            profile = metrics.profile(trace.nodes, 0)
            found[key] = (profile.highest, profile.total) if profile else (0, 0)
        return found

    def _levels_of(self, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is there before each pass of a stage, and at most while it runs, and which of its passes it is."""
        own = self.ran.timeline.graph.score.passes[stage]
        which = len(KINDS) * own.chunks + own.kinds
        levels = np.zeros((len(self._often[stage]), 2), np.int64)
        for place, times in enumerate(self._often[stage]):
            if times:
                chunk, work = self._sort(stage, place)
                levels[place] = self._levels[chunk.runs, work]
        highest, left = levels[which].T
        before = np.cumsum(left) - left
        return before, before + highest, which

    def peaks(self, static: Mapping[int, int]) -> list[Spot]:
        """Of each stage, over `static` bytes of each simulated rank."""
        found = []
        for stage in self.stages:
            always = static[self.ran.rank_of(stage)]
            _, levels, which = self._levels_of(stage)
            at = int(levels.argmax())
            operator = self._fullest_of(stage, int(which[at])) if levels[at] > 0 else None
            found.append(Spot(stage, self.ran.rank_of(stage), always + max(0, int(levels[at])), operator))
        return found

    def _fullest_of(self, stage: int, which: int) -> str:
        chunk, work = self._sort(stage, which)
        trace = self.traces[chunk.runs, work]
        profile = metrics.profile(trace.nodes, 0)
        assert profile is not None
        return self._name(trace, profile.task, chunk)

    def first_above(self, stage: int, static: int, limit: int) -> str | None:
        """The operator whose allocation first takes a stage above a limit."""
        before, levels, which = self._levels_of(stage)
        over = np.flatnonzero(static + levels > limit)
        if not len(over):
            return None
        at = int(over[0])
        chunk, work = self._sort(stage, int(which[at]))
        trace = self.traces[chunk.runs, work]
        task = metrics.first_above(trace, 0, static + int(before[at]), limit)
        return None if task is None else self._name(trace, task, chunk)

    @staticmethod
    def _name(trace: Trace, task: int, chunk: PlacedChunk) -> str:
        piece = trace.piece_of(task)
        layer = None if piece.layer is None else piece.layer + chunk.first
        return operator_name(piece.recording.outline.labels[task - piece.first_task], layer)
