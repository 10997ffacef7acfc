"""Spans of a run on CPUs: the outermost operators that move data, and the collectives of c10d through gloo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from spsim.engine.recording import COMPUTE_LANE
from spsim.pytorch.kineto.events import Event, Thread
from spsim.pytorch.kineto.names import COMMUNICATION, COPY, METADATA, collective, operator_class
from spsim.pytorch.kineto.phases import Issued
from spsim.pytorch.kineto.profile import ProfiledRank
from spsim.results.measured import MeasuredSpan

C10D = "c10d::"
GLOO = "gloo:"
ATEN = "aten::"


def host_spans(profile: ProfiledRank, lane: str) -> list[Issued]:
    """Spans of one rank in the order in which they were issued; collectives stand on `lane`."""
    transfers = [event for event in profile.of("user_annotation", "cpu_op") if event.name.startswith(GLOO)]
    operators, calls = _outermost(profile, transfers)
    spans = [*_compute(profile, operators), *_communication(profile, calls, transfers, lane)]
    spans.sort(key=lambda span: (span.asked_us, span.end_us))
    clears = profile.phases.clears
    return [Issued(span, span.phase, span.operator_class == COPY or clears(span.asked_us)) for span in spans]


def _outermost(profile: ProfiledRank, transfers: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Operators that move data and calls of c10d, without what they contain, nor the work of gloo's threads."""
    events = profile.of("cpu_op")
    callers = {event.thread for event in events if event.name.startswith(C10D)}
    helpers = {event.thread for event in transfers} - callers
    operators, calls = [], []
    covered: dict[Thread, float] = {}
    for event in events:
        if event.thread in helpers or event.start < covered.get(event.thread, event.start):
            continue
        if event.name.startswith(C10D):
            calls.append(event)
        elif event.name.startswith(ATEN) and event.name.removeprefix(ATEN) not in METADATA:
            operators.append(event)
        else:
            continue
        covered[event.thread] = event.end
    return operators, calls


def _compute(profile: ProfiledRank, operators: Sequence[Event]) -> Iterator[MeasuredSpan]:
    busy: Counter[Thread] = Counter()
    for event in operators:
        busy[event.thread] += round(event.end - event.start)
    main = max(busy, key=busy.__getitem__, default=None)
    for event in operators:
        lane = COMPUTE_LANE if event.thread == main else f"{COMPUTE_LANE}, thread {event.thread[1]}"
        yield MeasuredSpan(
            profile.rank, lane, event.name.removeprefix(ATEN), operator_class(event.name), event.start, event.end,
            phase=profile.phases.at(event.thread, event.start),
        )  # fmt: skip


def _communication(
    profile: ProfiledRank, calls: Sequence[Event], transfers: Sequence[Event], lane: str
) -> Iterator[MeasuredSpan]:
    """Each call with the transfer that gloo began next for it; sends and receives under way together are one."""
    groups = set(profile.groups)
    group = groups.pop() if len(groups) == 1 else ()
    waiting = list(transfers)
    spans = []
    for call in calls:
        kind = collective(call.name)
        transfer = next((t for t in waiting if t.start >= call.start and _serves(t, call)), None)
        if transfer is not None:
            waiting.remove(transfer)
        itemsize = call.itemsize() or (transfer.itemsize() if transfer else 0)
        elements = max(call.elements(), default=0)
        incoming = kind == "send_receive" and "recv" in call.name
        spans.append(
            MeasuredSpan(
                profile.rank, lane, kind, COMMUNICATION, transfer.start if transfer else call.start,
                max(call.end, transfer.end) if transfer else call.end, posted_us=call.start,
                phase=profile.phases.at(call.thread, call.start), collective=kind,
                message_bytes=0 if incoming else itemsize * elements, group=group,
            )
        )  # fmt: skip
    yield from _exchanges(spans)


def _serves(transfer: Event, call: Event) -> bool:
    """Whether a transfer may belong to a call; gloo has no reduce-scatter and uses its all-reduce."""
    kind, made = collective(call.name), collective(transfer.name)
    if kind == "send_receive":
        return made == kind and ("recv" in transfer.name) == ("recv" in call.name)
    return made == kind or (kind == "reduce_scatter" and made == "all_reduce")


def _exchanges(spans: Sequence[MeasuredSpan]) -> Iterator[MeasuredSpan]:
    """Spans with each run of sends and receives that overlap in time as one exchange."""
    current: MeasuredSpan | None = None
    for span in spans:
        if current and current.collective == span.collective == "send_receive" and span.asked_us < current.end_us:
            current = replace(
                current, end_us=max(current.end_us, span.end_us),
                message_bytes=current.message_bytes + span.message_bytes,
            )  # fmt: skip
            continue
        if current:
            yield current
        current = span
    if current:
        yield current
