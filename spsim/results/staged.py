"""Figures of a step of several pipeline stages, from its passes and how often each runs: no trace is written out.

They are what `metrics` finds in the trace of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from spsim.costs.static_memory import StaticMemory
from spsim.engine.pieces import Pass
from spsim.engine.trace import Trace
from spsim.inputs.schedules import HALVED
from spsim.lazy import lazy
from spsim.results import accounts, metrics
from spsim.results.accounts import Account
from spsim.results.derived import operator_name
from spsim.results.metrics import Idle
from spsim.step.pipeline.orders import KINDS, Numbers
from spsim.step.pipelined import Pipelined
from spsim.step.stages import PHASES, PlacedChunk, Work

T = TypeVar("T")


class Spot(NamedTuple):
    """The moment of a stage at which its memory is fullest, or first too full."""

    stage: int
    rank: int
    """That is simulated for it."""
    bytes: int
    operator: str | None
    """Whose allocation it is; None for what is there all the time."""


@dataclass(frozen=True)
class OfStages(Mapping[int, T]):
    """By simulated rank what is the same on all stages of a kind."""

    kinds: Sequence[T]
    kind_of: Sequence[int]
    """The kind of each stage."""
    ranks: Collection[int]
    stride: int
    """From a rank to its counterpart on the next stage."""

    def __getitem__(self, rank: int) -> T:
        return self.kinds[self.kind_of[rank // self.stride % len(self.kind_of)]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Staged:
    """Reads a step that ran on several stages."""

    ran: Pipelined
    micro_batches: int

    @lazy
    def traces(self) -> Sequence[Trace]:
        """Of each sort of passes by itself."""
        return [Trace(alone.nodes, {0: (0,)}, lambda piece: ()) for alone in self.ran.alone]

    def _passes(self, stage: int) -> Iterator[tuple[int, int]]:
        """Of what the chunks of a stage run, which sort it is, and how often."""
        return ((sort, times) for sort, times in zip(self._sorts(stage), self._often[stage], strict=True) if times)

    def _sorts(self, stage: int) -> list[int]:
        """Of what the chunks of a stage run, each of `KINDS`."""
        return self.ran.sorted.of_stage(stage)

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
        sorts = self.ran.sorted.sorts
        for runs, work in (sorts[sort] for stage in self.stages for sort, _ in self._passes(stage)):
            if PHASES.get(work) == phase and any(run.numbered for run in runs):
                halves: list[Work] = ["input gradients", "weight gradients"]
                works = halves if work in halves else [work]
                return sum([metrics.layer_window(self.traces[sorts.index((runs, own))], phase) for own in works])
        return 0

    @lazy
    def idle(self) -> dict[int, Idle]:
        """Of each simulated rank, as `metrics.idle`."""
        transfer, posted, neither = self.ran.gaps.totals(len(self.stages))
        by_pass = [metrics.idle(trace)[0] for trace in self.traces]
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
        windows = [
            [(m[0][0], m[-1][2]) for made, m in closing if made.segment.phase == "optimizer"]
            for closing in self.ran.closing
        ]
        return sum(end - begin for begin, end in max(filter(None, windows), key=min, default=[]))

    def compute_by_class(self) -> dict[str, int]:
        """Kernels in the layers of the first stage."""
        found: Counter[str] = Counter()
        for sort, times in self._passes(0):
            for name, ps in metrics.compute_by_class(self.traces[sort], 0).items():
                found[name] += times * ps
        return dict(found)

    # Memory

    @lazy
    def _levels(self) -> Numbers:
        """Of each sort of passes, how much memory it takes over what is there before it, and in a second row leaves."""
        if self.ran.levels is not None:
            return np.array([level[:2] for level in self.ran.levels()], np.int64).T
        found = [metrics.profile(trace.nodes, 0) for trace in self.traces]
        return np.array([(own.highest, own.total) if own else (0, 0) for own in found], np.int64).T

    def _levels_of(self, stage: int) -> tuple[Numbers, Numbers, Numbers]:
        """What is there before each pass of a stage, and at most while it runs, and which of its passes it is."""
        own = self.ran.timeline.graph.score.passes[stage]
        which = len(KINDS) * own.chunks + own.kinds
        highest, left = self._levels[:, self.ran.sorted.of_passes[stage, which]]
        before = np.cumsum(left) - left
        return before, before + highest, which

    @lazy
    def _highest(self) -> Numbers:
        """Of each stage, at its fullest over what is always there."""
        sorts, firsts = self.ran.sorted.in_order(self.ran.timeline.graph.score)
        highest, left = self._levels[:, sorts]
        before = np.cumsum(left) - left
        found: Numbers = np.maximum.reduceat(before + highest, firsts) - before[firsts]
        return found

    def peak_bytes(self, static: Mapping[int, StaticMemory]) -> int:
        """Of the fullest stage, with what is there all the time on each simulated rank."""
        stages, highest = self._fullest
        return max(static[self.ran.rank_of(s)].total + max(0, own) for s, own in zip(stages, highest, strict=True))

    @property
    def _fullest(self) -> tuple[Sequence[int], list[int]]:
        """Stages of which one is the fullest, with what each takes at most, or with what is most of all of its kind."""
        score = self.ran.timeline.graph.score
        if score.stages.schedule not in HALVED:
            found = self.ran.sorted.fullest(score, self.ran.stages.kind_of)
            highest = found.highest(*self._levels)
            if highest is not None:
                return found.stages.tolist(), highest.tolist()
        return self.stages, self._highest.tolist()

    def peaks(self, static: Mapping[int, StaticMemory]) -> list[Spot]:
        """Of each stage."""
        found = []
        for stage, highest in enumerate(self._highest.tolist()):
            always = static[self.ran.rank_of(stage)].total
            operator = self._fullest_of(stage) if highest > 0 else None
            found.append(Spot(stage, self.ran.rank_of(stage), always + max(0, highest), operator))
        return found

    def _fullest_of(self, stage: int) -> str:
        _, levels, which = self._levels_of(stage)
        at = int(which[levels.argmax()])
        trace = self.traces[self._sorts(stage)[at]]
        profile = metrics.profile(trace.nodes, 0)
        assert profile is not None
        return self._name(trace, profile.task, self.ran.stages[stage][at // len(KINDS)])

    def first_above(self, stage: int, static: int, limit: int) -> str | None:
        """The operator whose allocation first takes a stage above a limit."""
        before, levels, which = self._levels_of(stage)
        over = np.flatnonzero(static + levels > limit)
        if not len(over):
            return None
        at = int(over[0])
        trace = self.traces[self._sorts(stage)[which[at]]]
        task = metrics.first_above(trace, 0, static + int(before[at]), limit)
        return None if task is None else self._name(trace, task, self.ran.stages[stage][which[at] // len(KINDS)])

    @staticmethod
    def _name(trace: Trace, task: int, chunk: PlacedChunk) -> str:
        piece = trace.piece_of(task)
        layer = None if piece.layer is None else piece.layer + chunk.first
        return operator_name(piece.recording.outline.labels[task - piece.first_task], layer)
