"""What slow ranks and slow links do to the tasks of each rank: which ranks are unlike others, and their durations.

Kernels of a slow rank take its factor times as long. The bytes of a transfer take that of the slowest link that its
group holds, for its slowest step paces a collective; the latency is as ever. An adapter belongs to the GPU of its
number and carries what leaves the node; a port of a GPU carries what its group moves inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from spsim.costs.collectives import CommCost
from spsim.costs.curves import Number
from spsim.engine.contention import PPM, Held
from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.tasks import Paces
from spsim.errors import InputError
from spsim.inputs.perturbations import Link, Perturbations, SlowLink, SlowRanks, Window
from spsim.inputs.plan import Plan
from spsim.lazy import lazy
from spsim.program.mesh import Axis, Mesh, mesh_of, world_of
from spsim.program.placement import Collective
from spsim.step.folding import Step
from spsim.step.ranks import Marks
from spsim.step.segments import Call, Segment
from spsim.units import picoseconds

Ends = tuple[int, int]
"""The ranks of the world between which a message goes."""
Ran = Segment | Ends
"""What a rank runs: a segment, or a message by itself."""
FOR_EVER = 2**62
"""Picoseconds, after any step."""


class Latencies(CommCost):
    """Of collectives: the seconds of each without its bytes."""

    def duration(self, collective: Collective, message: Number, ranks: int, nodes: int = 1) -> Number:
        """As of an empty message."""
        return super().duration(collective, 0 * message, ranks, nodes)

    def step_duration(self, collective: Collective, part: Number, ranks: int, nodes: int = 1) -> Number:
        """As of an empty part."""
        return super().step_duration(collective, 0 * part, ranks, nodes)

    def batched_duration(self, message: Number, ranks: int, nodes: int = 1, *, before: int) -> Number:
        """None: what one more send adds is its bytes."""
        return 0 * message


@dataclass(frozen=True)
class Perturbed:
    """Of the ranks of a plan: `world` are all, `mesh` those of one pipeline stage."""

    perturbations: Perturbations
    world: Mesh
    mesh: Mesh
    gpus_per_node: int

    @lazy
    def slow_ranks(self) -> list[SlowRanks]:
        """Those that change anything."""
        return [slow for slow in self.perturbations.slow_ranks if slow.changes]

    @lazy
    def slow_links(self) -> list[tuple[SlowLink, frozenset[int]]]:
        """Those that change anything, with the ranks whose links they are."""
        return [(slow, self._users(slow.link)) for slow in self.perturbations.slow_links if slow.changes]

    @property
    def without_links(self) -> Perturbed | None:
        """Slow ranks alone; None where there are none."""
        own = replace(self, perturbations=Perturbations.of(self.perturbations.slow_ranks))
        return own if own.slow_ranks else None

    @property
    def marks(self) -> Marks:
        """The ranks of a stage that are unlike others, and by what."""
        world, stride = self.world, self.mesh.strides["pp"]
        every = [slow.ranks for slow in self.slow_ranks] + [tuple(sorted(users)) for _, users in self.slow_links]
        found = [(rank, world.coordinate(rank, "pp"), place) for place, own in enumerate(every) for rank in own]
        return tuple([(rank - stage * stride, (stage, place)) for rank, stage, place in found])

    def _users(self, link: Link) -> frozenset[int]:
        number = link.adapter if link.gpu is None else link.gpu
        own = range(self.gpus_per_node) if number is None else (number,)
        return frozenset(link.node * self.gpus_per_node + gpu for gpu in own)

    # Kernels

    def factor(self, rank: int) -> float:
        """Of the kernels of a rank of the world, all of the step."""
        return prod([slow.factor for slow in self.slow_ranks if slow.is_whole and rank in slow.ranks])

    def all_paces(self, ran: Mapping[int, Sequence[Ran]]) -> dict[int, Paces]:
        """When some ranks, of which is known what they run, and what they send are slow for a part of the step; of
        those that ever are.
        """
        found = ((rank, self._paces(rank, every)) for rank, every in ran.items())
        return {rank: paces for rank, paces in found if paces}

    def _paces(self, rank: int, ran: Sequence[Ran]) -> Paces | None:
        kernels = [_held(slow, slow.factor) for slow in self.slow_ranks if not slow.is_whole and rank in slow.ranks]
        transfers = dict(self._slow_transfers(rank, ran)) if self._links_at_times else {}
        return Paces(kernels, transfers) if kernels or transfers else None

    def _slow_transfers(self, rank: int, ran: Iterable[Ran]) -> Iterator[tuple[int, Sequence[Held]]]:
        """Transfers of a rank whose links are slow at times, by their number among all that it runs."""
        known: dict[Call | Ends, Sequence[Held]] = {}
        first = 0
        for made in ran:
            calls: Mapping[int, Call | Ends] = made.calls if isinstance(made, Segment) else {0: made}
            for task, call in calls.items():
                if call not in known:
                    known[call] = [_held(slow, slow.factor) for slow in self._slow_at_times(call, rank)]
                if known[call]:
                    yield first + task, known[call]
            first += len(made.tasks) if isinstance(made, Segment) else 1

    def _slow_at_times(self, call: Call | Ends, rank: int) -> Iterator[SlowLink]:
        """Links that a call or a message goes over, which are slow for a part of the step."""
        for slow, users in self._links_at_times:
            goes = self.holds(call, rank, slow.link, users) if isinstance(call, Call) else (
                self._crosses(slow.link, users, {*call})
            )  # fmt: skip
            if goes:
                yield slow

    # Transfers

    def transfer_factor(self, call: Call, rank: int) -> float:
        """Of the bytes of a call of a rank of the world, all of the step: of the slowest link that its group holds."""
        own = [slow.factor or 1.0 for slow, users in self._whole_links if self.holds(call, rank, slow.link, users)]
        return max(own, default=1.0)

    @lazy
    def _whole_links(self) -> list[tuple[SlowLink, frozenset[int]]]:
        return [own for own in self.slow_links if own[0].is_whole]

    @lazy
    def _links_at_times(self) -> list[tuple[SlowLink, frozenset[int]]]:
        return [own for own in self.slow_links if not own[0].is_whole]

    def holds(self, call: Call, rank: int, link: Link, users: frozenset[int]) -> bool:
        """Whether what a rank calls goes over a link of some ranks."""
        axes = call.axes
        if not axes:
            return False
        if call.exchange:
            around = self.world.neighbours(rank, axes[0])
            return any(self._crosses(link, users, {rank, other}) for other in around)
        first = self.world.first(rank, axes)
        own = {user for user in users if self.world.first(user, axes) == first}
        if not own:
            return False
        if link.gpu is None:
            return self._spans_nodes(first, axes)
        node = range(link.node * self.gpus_per_node, (link.node + 1) * self.gpus_per_node)
        return sum(self.world.first(other, axes) == first for other in node) > 1

    def _message_factor(self, rank: int, other: int) -> float:
        own = [
            slow.factor or 1.0 for slow, users in self._whole_links if self._crosses(slow.link, users, {rank, other})
        ]
        return max(own, default=1.0)

    def _crosses(self, link: Link, users: frozenset[int], ends: set[int]) -> bool:
        """Whether what two ranks send each other goes over a link."""
        inside = len({rank // self.gpus_per_node for rank in ends}) == 1
        return bool(users & ends) and len(ends) > 1 and inside == (link.gpu is not None)

    def _spans_nodes(self, first: int, axes: Sequence[Axis]) -> bool:
        last = first + sum((count - 1) * stride for stride, count in self.world.steps(axes))
        return first // self.gpus_per_node < last // self.gpus_per_node

    # A step

    def step(self, step: Step, empty: Step, segments: Iterable[Segment], stage: int = 0) -> Step:
        """The step of a stage; `empty` is the same with empty messages, whose durations are latencies."""
        first = stage * self.mesh.strides["pp"]
        durations = {**step.durations}
        for segment in segments:
            if segment.name in durations:
                latencies = empty.durations[segment.name]
                durations[segment.name] = {
                    rank: self._durations(segment, first + rank, times, latencies[rank])
                    for rank, times in step.durations[segment.name].items()
                }
        return replace(step, durations=durations, apart=True)

    def message_ps(self, rank: int, other: int, whole_ps: int, empty_ps: int) -> int:
        """Of a message between two ranks of the world."""
        factor = self._message_factor(rank, other)
        return whole_ps if factor == 1 else empty_ps + round((whole_ps - empty_ps) * factor)

    def _durations(self, segment: Segment, rank: int, times: Sequence[int], latencies: Sequence[int]) -> Sequence[int]:
        kernels = self.factor(rank)
        calls = {call: self.transfer_factor(call, rank) for call in {*segment.calls.values()}}
        if kernels == 1 and all(factor == 1 for factor in calls.values()):
            return times
        return [*self._longer(segment, kernels, calls, times, latencies)]

    def _longer(
        self, segment: Segment, kernels: float, calls: Mapping[Call, float], times: Sequence[int],
        latencies: Sequence[int],
    ) -> Iterator[int]:  # fmt: skip
        for task, time, latency in zip(segment.tasks, times, latencies, strict=True):
            if task.id in segment.calls:
                yield latency + round((time - latency) * calls[segment.calls[task.id]])
            else:
                yield round(time * kernels) if task.lane == COMPUTE_LANE else time


def perturbed_ranks(
    plan: Plan, perturbations: Perturbations, gpus_per_node: int, *, windows: bool = True
) -> Perturbed | None:
    """What perturbations do to the ranks of a plan; None where they do nothing. `InputError` where some are drawn, or
    last for a part of the step that may not be.
    """
    if perturbations.jitters:
        raise InputError("simulate: jitter is drawn for each of many seeds; use perturb(), or run --seeds")
    if not perturbations.changes:
        return None
    if perturbations.windows and not windows:
        raise InputError("perturbations: jitter with from_s and to_s is not simulated; leave one of them out")
    return Perturbed(perturbations, world_of(plan), mesh_of(plan), gpus_per_node)


def _held(window: Window, factor: float | None) -> Held:
    """A window at the pace of a factor; of none nothing moves."""
    end = FOR_EVER if window.to_s is None else picoseconds(window.to_s)
    return picoseconds(window.from_s), end, round(PPM / factor) if factor else 0
