"""A trace of spans that were measured instead of simulated, so that the same metrics and pictures serve both."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np

from spsim.engine.pieces import Pass, Stretch
from spsim.engine.recording import COMPUTE_LANE, Outline, Recording, TaskInfo
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.program.placement import Collective, sent_bytes
from spsim.units import PS_PER_US

COPY_LANE = "copies"
"""The lane of copies to and from the host and other devices; there may be more, whose names begin so."""
MAX_LENGTH_US = 2**63 / PS_PER_US
"""Beyond it picoseconds do not fit in 64 bits: a hundred days."""


@dataclass(frozen=True, slots=True)
class MeasuredSpan:
    """One kernel or collective that a profiler saw on one lane of one rank; times count from any common origin."""

    rank: int
    lane: str
    """`compute`, `compute, stream 9` and so on for kernels and copies on the device, `copies` and so on for those from
    and to it; any other name is communication.
    """
    name: str
    operator_class: str
    """gemm, attention, norm, softmax, dropout, elementwise, communication, copy or other."""
    start_us: float
    end_us: float
    posted_us: float | None = None
    """When the rank asked for it, if that is known to be earlier than its start."""
    phase: Pass = "forward"
    micro_batch: int = 0
    """Which pass of this phase."""
    collective: str = ""
    message_bytes: int = 0
    """As nccl-tests count: the whole array, the buffer of one rank for all-to-all and send-receive."""
    group: tuple[int, ...] = ()
    """Ranks that take part, if they are known."""

    @property
    def asked_us(self) -> float:
        """When the rank asked for it."""
        return self.start_us if self.posted_us is None else self.posted_us


def measured_trace(spans: Iterable[MeasuredSpan]) -> Trace:
    """The trace of a measured run: one piece per phase and micro-batch, in order of their starts.

    A collective starts when the last rank of its group is there, as in a simulation; until then the others
    wait. That is known where the spans of the whole group are given and their clocks agree; elsewhere a span
    starts when its rank did. Equal tasks of the ranks, the n-th of their kind in a piece, share an index.
    `InputError` where there is no span, or one ends before it starts.
    """
    given = sorted(spans, key=lambda span: (span.asked_us, span.end_us))
    if not given:
        raise InputError("measured trace: no spans; give at least one")
    for span in given:
        if not span.asked_us <= span.start_us <= span.end_us:
            raise InputError(
                f"measured trace: {span.name!r} of rank {span.rank} is posted, starts and ends at {span.asked_us}, "
                f"{span.start_us} and {span.end_us} us; times must not go back"
            )
    length = max(span.end_us for span in given) - given[0].asked_us
    if length >= MAX_LENGTH_US:
        raise InputError(
            f"measured trace: its spans reach over {length:.3g} us, more than a hundred days; give one run, whose "
            "clocks show the same day"
        )
    pieces: dict[tuple[Pass, int], list[MeasuredSpan]] = defaultdict(list)
    for span in _met(given):
        pieces[span.phase, span.micro_batch].append(span)
    origin, stretches, first = given[0].asked_us, [], 0
    ranks = sorted({span.rank for span in given})
    for (phase, micro_batch), own in pieces.items():
        recording = _recording(own, ranks, origin)
        stretches.append(Stretch(recording, phase, None, micro_batch, 0, first))
        first += len(recording.outline.labels)
    return Trace(
        stretches,
        copies={rank: (rank,) for rank in ranks},
        describe=lambda piece: piece.recording.outline.labels,
        groups=_groups(given),
        overlapping=True,
        measured=True,
    )


def _met(spans: Sequence[MeasuredSpan]) -> list[MeasuredSpan]:
    """The spans with the collectives of whole groups starting when their last rank is there."""
    calls: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, span in enumerate(spans):
        if _is_meeting(span):
            calls[span.lane, span.group][span.rank].append(index)
    met = list(spans)
    for (_, group), by_rank in calls.items():
        own = [[spans[index] for index in by_rank[rank]] for rank in group]
        if len({tuple(span.collective for span in column) for column in own}) != 1:
            continue  # a rank is missing, or was recorded for a different stretch of time
        for meeting in zip(*(by_rank[rank] for rank in group), strict=True):
            start = max(spans[index].start_us for index in meeting)
            if start <= min(spans[index].end_us for index in meeting):
                for index in meeting:
                    met[index] = replace(spans[index], start_us=start, posted_us=spans[index].asked_us)
    return met


def _is_meeting(span: MeasuredSpan) -> bool:
    """A collective of a whole group; an exchange of a longer ring meets its neighbours only."""
    return len(span.group) == 2 if span.collective == "send_receive" else bool(span.collective and span.group)


def _recording(spans: Sequence[MeasuredSpan], ranks: Sequence[int], origin_us: float) -> Recording:
    """Spans of one pass by rank and task; tasks are numbered in order of their first start. A task that a rank did
    not run has no duration there.
    """
    tasks: dict[tuple[str, TaskInfo, int], int] = {}
    seen: Counter[tuple[int, str, TaskInfo]] = Counter()
    moments: dict[int, dict[int, list[int]]] = {rank: {} for rank in ranks}
    last = dict.fromkeys(ranks, _picoseconds(spans[0].asked_us, origin_us))
    for span in spans:
        info = _info(span)
        task = tasks.setdefault((span.lane, info, seen[span.rank, span.lane, info]), len(tasks))
        seen[span.rank, span.lane, info] += 1
        times = [_picoseconds(time, origin_us) for time in (span.asked_us, span.start_us, span.end_us)]
        moments[span.rank][task] = times
        last[span.rank] = max(last[span.rank], times[-1])
    return Recording(
        Outline([lane for lane, _, _ in tasks], [info for _, info, _ in tasks]),
        {rank: np.array([moments[rank].get(task, 3 * [last[rank]]) for task in tasks.values()]) for rank in ranks},
        (),
    )


def _picoseconds(time_us: float, origin_us: float) -> int:
    return round((time_us - origin_us) * PS_PER_US)


def _info(span: MeasuredSpan) -> TaskInfo:
    known = span.collective in get_args(Collective) and len(span.group) > 1
    sent = sent_bytes(cast("Collective", span.collective), span.message_bytes, len(span.group)) if known else 0
    return TaskInfo(
        span.name, span.operator_class, span.phase, micro_batch=span.micro_batch, collective=span.collective,
        axis=span.lane if span.collective else "", message_bytes=span.message_bytes, sent_bytes=sent,
    )  # fmt: skip


def _groups(spans: Sequence[MeasuredSpan]) -> Mapping[str, Mapping[int, tuple[int, ...]]]:
    groups: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for span in spans:
        if span.group:
            groups[span.lane][span.rank] = span.group
    return groups


# Sums over a measured run, whose kernels may run at once and on several lanes


def exposed_communication(trace: Trace) -> dict[int, int]:
    """Picoseconds of each rank during which communication is posted and no kernel runs, nor a copy on the device."""
    found = {}
    for rank in trace.copies:
        own = [span for span in trace.spans if span.rank == rank]
        kernels = [(span.start_ps, span.end_ps) for span in own if span.lane.startswith(COMPUTE_LANE)]
        others = [span for span in own if not span.lane.startswith((COMPUTE_LANE, COPY_LANE))]
        transfers = [(span.posted_ps, span.end_ps) for span in others]
        found[rank] = covered(kernels + transfers) - covered(kernels)
    return found


def compute_by_class(trace: Trace, rank: int) -> dict[str, int]:
    """Picoseconds of the kernels of one rank by operator class; of kernels that run at once each counts."""
    totals: Counter[str] = Counter()
    for span in trace.spans:
        if span.rank == rank and span.lane.startswith(COMPUTE_LANE):
            totals[trace.tasks[span.task].operator_class] += span.end_ps - span.start_ps
    return dict(totals)


def covered(intervals: Sequence[tuple[int, int]]) -> int:
    """Length of the union."""
    total, until = 0, min(intervals, default=(0, 0))[0]
    for start, end in sorted(intervals):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total
