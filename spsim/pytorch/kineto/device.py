"""Spans of a run on devices: kernels and copies by stream, NCCL's kernels by process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf

from spsim.engine.recording import COMPUTE_LANE
from spsim.pytorch.kineto.calls import Calls
from spsim.pytorch.kineto.events import Event
from spsim.pytorch.kineto.names import AWAITS, COMMUNICATION, COPY, leaves_device, operator_class, short_name
from spsim.pytorch.kineto.phases import Issued
from spsim.pytorch.kineto.profile import ProfiledRank
from spsim.results.measured import COPY_LANE, MeasuredSpan

Stream = tuple[int | str, int | str]
"""(device, stream) of an event."""


def device_spans(profile: ProfiledRank) -> list[Issued]:
    """Spans of one rank in the order in which they were launched; none for a run without a device."""
    work = [event for event in profile.work if event.name not in AWAITS]
    lanes, calls = _lanes(work), Calls(profile)
    phases, launches = profile.phases, _launches(work, profile.launches)
    issued = []
    for event, launch in zip(work, launches, strict=True):
        kind = _class(event)
        if kind == COMMUNICATION:
            span = calls.span(event, launch)
        else:
            span = MeasuredSpan(
                profile.rank, lanes[_lane(event), _stream(event)], short_name(event.name), kind, event.start, event.end
            )
        at = launch.start if launch else -inf
        aside = kind == COPY or event.category == "gpu_memset" or phases.clears(at)
        phase = phases.at(launch.thread, at) if launch else None
        issued.append((at, event.start, Issued(span, phase, aside)))
    issued.sort(key=lambda entry: entry[:2])
    return [one for *_, one in issued]


def _launches(work: Sequence[Event], launches: Mapping[int | str, Event]) -> list[Event | None]:
    """The call that launched each event; where it is not in the file, that of the one before on its stream, since
    streams keep the order of launches. None before the first of a stream: it was launched before the recording began.
    """
    latest: dict[Stream, Event] = {}
    found = []
    for event in work:
        correlation, stream = event.identifier("correlation"), _stream(event)
        if correlation is not None and correlation in launches:
            latest[stream] = launches[correlation]
        found.append(latest.get(stream))
    return found


def _stream(event: Event) -> Stream:
    device, stream = event.identifier("device"), event.identifier("stream")
    return event.thread[0] if device is None else device, event.thread[1] if stream is None else stream


def _class(event: Event) -> str:
    if event.category == "collective_comm":
        return COMMUNICATION
    if event.category == "gpu_memcpy":
        return COPY
    return "elementwise" if event.category == "gpu_memset" else operator_class(event.name)


def _lane(event: Event) -> str:
    """Work of the device, or what moves data to and from it."""
    return COPY_LANE if _class(event) == COPY and leaves_device(event.name) else COMPUTE_LANE


def _lanes(work: Sequence[Event]) -> dict[tuple[str, Stream], str]:
    """The name of the lane of each stream, of computation and of copies; the busiest ones bear theirs alone."""
    busy: Counter[tuple[str, Stream]] = Counter()
    for event in work:
        if _class(event) != COMMUNICATION:
            busy[_lane(event), _stream(event)] += round(event.end - event.start)
    main = {lane: max((key for key in busy if key[0] == lane), key=busy.__getitem__) for lane, _ in busy}
    several = len({stream[0] for _, stream in busy}) > 1
    names = {}
    for key in busy:
        lane, (device, stream) = key
        where = f"device {device}, stream {stream}" if several else f"stream {stream}"
        names[key] = lane if main[lane] == key else f"{lane}, {where}"
    return names
