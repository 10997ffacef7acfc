"""The collectives of a step: which algorithm the library runs, over how many channels, at what rate."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spsim.costs.models import cost_models
from spsim.program.instructions import Communication
from spsim.program.placement import Collective, sent_bytes
from spsim.program.routing import Dispatch
from spsim.units import GB

if TYPE_CHECKING:
    from spsim.costs.collectives import CommCost
    from spsim.results.result import Result


class Message(NamedTuple):
    """What decides about the time of a collective."""

    collective: Collective
    axis: str
    ranks: int
    nodes: int
    message_bytes: int
    step_of: Collective | None = None
    sends_before: int = 0
    timed_bytes: int = 0
    """That its time follows, where they are not those of the message."""
    dispatch: Dispatch | None = None

    def time(self, costs: CommCost) -> float:
        """Seconds from a framework, once all ranks are there and nothing else moves."""
        if self.sends_before:
            before = self.sends_before
            return float(costs.batched_duration(self.message_bytes, self.ranks, self.nodes, before=before))
        size = self.timed_bytes or self.message_bytes
        if self.dispatch:
            return float(costs.dispatched(self.dispatch, size, self.ranks, self.nodes))
        duration = costs.step_duration if self.step_of else costs.duration
        return float(duration(self.step_of or self.collective, size, self.ranks, self.nodes))


@dataclass(frozen=True, slots=True)
class Call:
    """Collectives that are alike."""

    collective: Collective
    axis: str
    """Of the mesh, that its group runs along; several joined by ` × `."""
    ranks: int
    nodes: int
    """That the group lies on."""
    message_bytes: int
    calls: int
    """In a step."""
    algorithm: str
    """Of several nodes, between them."""
    channels: int | None
    """Of NCCL, an SM each, for the collective or one send; None where they are not known, and of a step of another."""
    time_s: float
    """From a framework, once all ranks are there and nothing else moves; of sends in one group call the mean."""
    gb_per_s: float
    """Bus bandwidth: bytes that one GPU sends (of a ring) over that time."""
    step_of: Collective | None = None
    """What it is one of the equal steps of, in chunks behind products."""

    @property
    def timed_as(self) -> Collective:
        """The collective whose time it takes, or a part of it."""
        return self.step_of or self.collective


def calls(result: Result) -> tuple[Call, ...]:
    """The collectives of a step by kind, axis and message, in the order in which they are first issued."""
    scenario = result.scenario
    _, costs = cost_models(scenario.hardware, scenario.workload.precision)
    counted: defaultdict[Message, Counter[Message]] = defaultdict(Counter)
    for message, count in _messages(result):
        counted[message._replace(sends_before=0, timed_bytes=0)][message] += count
    found = []
    for (collective, axis, ranks, nodes, size, step_of, *_, dispatch), own in counted.items():
        timed_as = step_of or collective
        times = [message.time(costs) for message in own]
        time = times[0] if len(own) == 1 else float(np.average(times, weights=[*own.values()]))
        algorithm = dispatch.library if dispatch else costs.algorithm(timed_as, size, ranks, nodes)
        channels = None if step_of or dispatch else costs.channels(timed_as, size, ranks, nodes)
        rate = sent_bytes(collective, size, ranks) / time / GB
        found.append(Call(collective, axis, ranks, nodes, size, own.total(), algorithm, channels, time, rate, step_of))
    return tuple(found)


def _messages(result: Result) -> Iterator[tuple[Message, int]]:
    """Each communication of a step with how often it runs, then the synchronisation of gradients."""
    scenario, prepared, numbers = result.scenario, result.prepared, result.numbers
    for step, (size, timed), runs in _communications(result):
        nodes = prepared.nodes((step.axis,), step.ranks, scenario.gpus_per_node)
        kind = step.collective, step.axis, step.ranks, nodes
        yield Message(*kind, size, step.step_of, step.sends_before, timed, step.dispatch), runs
    for sync, runs in prepared.issued(scenario.num_micro_batches).items():
        nodes = prepared.nodes(sync.axes, sync.ranks, scenario.gpus_per_node)
        yield Message(sync.collective, " × ".join(sync.axes), sync.ranks, nodes, sync.message_bytes), runs
    sent, size = result.sends
    if sent:
        yield Message("send_receive", "pp", 2, prepared.nodes(("pp",), 2, scenario.gpus_per_node), size), sent
    own = prepared.closing_calls(numbers, result.chunk)
    for sync in prepared.closing_syncs(result.chunk):
        nodes, (size, count) = prepared.nodes(sync.axes, sync.ranks, scenario.gpus_per_node), own[sync]
        yield Message(sync.collective, " × ".join(sync.axes), sync.ranks, nodes, size), count


def _communications(result: Result) -> Iterator[tuple[Communication, tuple[int, int], int]]:
    """Each communication of the passes with the bytes of its message, those that its time follows, and how often it
    runs in a step.
    """
    template, values = result.prepared.template, result.numbers.values
    for run in result.chunk:
        index = template.indices[run.block]
        for part in (part for own in result.prepared.blocks[run.block].values() for part in own.parts):
            runs = run.count * part.runs * result.scenario.num_micro_batches
            for step in part.segment.instructions:
                if isinstance(step, Communication):
                    yield step, (int(values[index.messages[step.id]]), int(values[template.pacing(step, index)])), runs


def per_layer(result: Result) -> dict[str, dict[str, int]]:
    """Number of collectives of one layer and micro-batch, by pass and kind."""
    found: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
    for phase, own in result.prepared.passes.items():
        counts: Counter[str] = Counter()
        for part in own.parts:
            steps = (step for step in part.segment.instructions if isinstance(step, Communication))
            for step in steps:
                counts[step.collective] += part.runs
        found[phase] = dict(sorted(counts.items()))
    return found


def sent_by_kind(collectives: Iterable[Call]) -> dict[str, int]:
    """Bytes that one GPU sends, by kind of collective."""
    total: Counter[str] = Counter()
    for call in collectives:
        total[call.collective] += call.calls * sent_bytes(call.collective, call.message_bytes, call.ranks)
    return dict(sorted(total.items()))


def remarks(result: Result) -> tuple[str, ...]:
    """What durations of its collectives hang on beyond the bytes."""
    scenario = result.scenario
    _, comm = cost_models(scenario.hardware, scenario.workload.precision)
    found = dict.fromkeys(
        comm.remark(call.timed_as, call.message_bytes, call.ranks, call.nodes) for call in result.collectives
    )
    return tuple(remark for remark in found if remark)
