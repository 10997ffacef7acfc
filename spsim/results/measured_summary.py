"""A measured trace in figures: its passes, where time went, what was communicated, and what no kernel hid."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from spsim.engine.pieces import Pass
from spsim.engine.trace import Trace
from spsim.results.measured import exposed_communication
from spsim.units import PS_PER_US

PHASES: tuple[Pass, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class CollectiveCount:
    """Equal collectives: how many of them one rank takes part in, at most."""

    collective: str
    """Its kind, or the name of its kernel where that alone is known."""
    message_bytes: int
    """As nccl-tests count; 0 where the trace does not say."""
    count: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """The figures of a measured trace, in microseconds."""

    ranks: int
    """Ranks in the trace, one a file."""
    passes: dict[str, int]
    """Phase -> number of passes, of those that occur."""
    time_us_by_class: dict[str, float]
    """Operator class -> time of its kernels, collectives or copies on all ranks, the longest first; what runs at once
    counts each, and a collective from when its rank came to it.
    """
    collectives: tuple[CollectiveCount, ...]
    """Those with most bytes first."""
    exposed_communication_us: dict[int, float]
    """Rank -> time in which communication is posted and neither a kernel nor a copy on the device runs."""

    def to_json(self) -> dict[str, Any]:
        """The document of `trace --json`."""
        return {
            "ranks": self.ranks,
            "passes": self.passes,
            "time_us_by_class": self.time_us_by_class,
            "collectives": [asdict(found) for found in self.collectives],
            "exposed_communication_us": {str(rank): time for rank, time in self.exposed_communication_us.items()},
        }


def summarise(trace: Trace) -> TraceSummary:
    """The figures of a measured trace."""
    passes = {(leaf.stretch.phase, leaf.stretch.micro_batch) for leaf in trace.leaves}
    numbers = Counter(phase for phase, _ in passes)
    return TraceSummary(
        ranks=len(trace.copies),
        passes={phase: numbers[phase] for phase in PHASES if numbers[phase]},
        time_us_by_class=_times(trace),
        collectives=_collectives(trace),
        exposed_communication_us={r: time / PS_PER_US for r, time in sorted(exposed_communication(trace).items())},
    )


def _times(trace: Trace) -> dict[str, float]:
    totals: Counter[str] = Counter()
    for span in trace.spans:
        totals[trace.tasks[span.task].operator_class] += span.end_ps - span.posted_ps
    return {name: time / PS_PER_US for name, time in totals.most_common()}


def _collectives(trace: Trace) -> tuple[CollectiveCount, ...]:
    """A rank that does not run a task of the others has a span of it without length."""
    counts: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for span in trace.spans:
        info = trace.tasks[span.task]
        if info.operator_class == "communication" and span.end_ps > span.posted_ps:
            counts[info.collective or info.name, info.message_bytes][span.rank] += 1
    found = (CollectiveCount(*key, max(by_rank.values())) for key, by_rank in counts.items())
    return tuple(sorted(found, key=lambda one: (-one.message_bytes * one.count, one.collective, one.message_bytes)))
