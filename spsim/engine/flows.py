"""Transfers that share links: flows at max-min fair rates, shared anew once in an instant.

A transfer puts its bytes on several links at once, in one proportion from beginning to end: the ranks of a collective
wait for the slowest of them. Alone it takes its own duration, in which its busiest link is busy for a part and idle for
the rest, while steps start and messages travel. That rest comes first here, and nothing changes it; then all bytes
move, and links that others use too, or that are slow, make it longer. A collective of equal steps ends as one would
each of whose steps takes its time on the slowest link.

Rates are max-min fair (Bertsekas and Gallager, Data Networks, section 6.5.2): what each flow has of its busiest link
grows alike until a link is full; those that use it stay there, the others go on. All is integers, and sums of them do
not depend on who came first. A flow that stands for several of other ranks, which do the same at the same time, loads
a link that it shares with them with all of theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import simpy

from spsim.engine.network import MakeNetwork, Transfer

Link = Hashable

FULL = 720720 * 10**6
"""The rate of a flow that has its links alone, and of a link as it should be: up to 16 flows divide it evenly."""


class Use(NamedTuple):
    """What a transfer puts on links, in picoseconds for which a link at its full rate is busy with it."""

    wire_ps: int
    """Of the busiest link, if nothing else moves."""
    loads: Mapping[Link, int]
    """Of each link, with all other transfers that this one stands for."""


class RateChange(NamedTuple):
    """From when to when, in picoseconds, a link has another rate than its own."""

    link: Link
    begin_ps: int
    end_ps: int
    factor: float
    """Of its rate; 0 where nothing moves. Of several changes at once the smallest counts."""


Uses = Callable[[Transfer], Use | None]
"""What each transfer puts on links; None for one that shares none."""


def flow_network(uses: Uses, changes: Sequence[RateChange] = ()) -> MakeNetwork:
    """A network whose transfers share links."""
    return lambda env: FlowNetwork(env, uses, changes)


class _Flow:
    """A transfer whose bytes move."""

    __slots__ = ("ended", "ends", "left", "rate", "since", "weights")

    def __init__(self, use: Use, wire: int, ended: simpy.Event) -> None:
        self.weights = {link: -(-load * FULL // use.wire_ps) for link, load in use.loads.items() if load}
        """What it takes of each link at its full rate."""
        self.left = wire * FULL
        self.rate = 0
        self.since = 0
        self.ends: int | None = None
        self.ended = ended


class FlowNetwork:
    """Links that transfers share."""

    shares = True

    def __init__(self, env: Any, uses: Uses, changes: Sequence[RateChange] = ()) -> None:
        self.env = env
        self._uses = uses
        self._flows: dict[Link, dict[_Flow, None]] = defaultdict(dict)
        """Those that move over each link."""
        self._changed: dict[Link, None] = {}
        """Links that are to be shared anew in this instant."""
        self._changes: dict[Link, list[RateChange]] = defaultdict(list)
        for change in changes:
            self._changes[change.link].append(change)
        self._looked: set[tuple[Link, int]] = set()
        """When a link is looked at again."""

    def begin(self, transfer: Transfer, at: int) -> int | simpy.Event:
        """When a transfer ends: known ahead where it puts nothing on links."""
        use, end = self._uses(transfer), at + transfer.duration_ps
        wire = min(use.wire_ps, transfer.duration_ps) if use else 0
        if use is None or not wire:
            return end
        flow = _Flow(use, wire, self.env.event())
        self.env.timeout(end - wire - self.env.now).callbacks.append(lambda _: self._join(flow))
        return flow.ended

    def _join(self, flow: _Flow) -> None:
        flow.since = self.env.now
        for link in flow.weights:
            self._flows[link][flow] = None
        self._change(flow.weights)

    def _change(self, links: Iterable[Link]) -> None:
        """Share some links anew when all that happens in this instant has happened."""
        if not self._changed:
            _Last(self.env, self._share)
        self._changed.update(dict.fromkeys(links))

    def _share(self, _: simpy.Event) -> None:
        now = self.env.now
        flows = self._reached()
        for flow in flows:
            flow.left -= flow.rate * (now - flow.since)
            flow.since = now
        going = [flow for flow in flows if flow.left > 0]
        for flow in flows:
            if flow.left <= 0:
                for link in flow.weights:
                    del self._flows[link][flow]
                flow.ended.succeed()
        for flow, rate in self.rates(going).items():
            self._move(flow, rate)

    def _reached(self) -> list[_Flow]:
        """All flows whose rates may depend on the links that have changed; those links are done with."""
        links, found = [*self._changed], dict[_Flow, None]()
        self._changed = {}
        known = {*links}
        while links:
            for flow in self._flows[links.pop()]:
                if flow not in found:
                    found[flow] = None
                    links += [link for link in flow.weights if link not in known]
                    known |= flow.weights.keys()
        for link in known & self._changes.keys():
            self._look_again(link)
        return [*found]

    def _move(self, flow: _Flow, rate: int) -> None:
        """From now on at a rate; look at it again when it would end."""
        flow.rate = rate
        ends = self.env.now - (-flow.left // rate) if rate else None
        if ends is not None and ends != flow.ends:
            self.env.timeout(ends - self.env.now).callbacks.append(lambda _: self._end(flow, ends))
        flow.ends = ends

    def _end(self, flow: _Flow, planned: int) -> None:
        if flow.ends == planned and not flow.ended.triggered:
            self._change(flow.weights)

    # Rates

    def rates(self, flows: Iterable[_Flow]) -> dict[_Flow, int]:
        """Of flows that share links with none but each other: what all have grows until a link is full."""
        found = dict.fromkeys(flows, FULL)
        weights: dict[Link, int] = defaultdict(int)
        for flow in found:
            for link, weight in flow.weights.items():
                weights[link] += weight
        free = {link: self.rate_of(link) for link in weights}
        growing = {**found}
        while growing:
            levels = {link: free[link] * FULL // weight for link, weight in weights.items() if weight}
            level = min(levels.values(), default=FULL)
            if level >= FULL:
                break
            full = {link for link, own in levels.items() if own == level}
            for flow in [flow for flow in growing if not full.isdisjoint(flow.weights)]:
                found[flow] = level
                del growing[flow]
                for link, weight in flow.weights.items():
                    weights[link] -= weight
                    free[link] -= -(-level * weight // FULL)
        return found

    def rate_of(self, link: Link) -> int:
        """Of a link now; `FULL` unless a change says otherwise."""
        now = self.env.now
        factors = [own.factor for own in self._changes.get(link, ()) if own.begin_ps <= now < own.end_ps]
        return round(min(factors, default=1) * FULL)

    def _look_again(self, link: Link) -> None:
        """When the rate of a link changes next, should anything move over it then."""
        times = [time for change in self._changes[link] for time in (change.begin_ps, change.end_ps)]
        later = min((time for time in times if time > self.env.now), default=0)
        if later and self._flows[link] and (link, later) not in self._looked:
            self._looked.add((link, later))
            self.env.timeout(later - self.env.now).callbacks.append(lambda _: self._changes_now(link))

    def _changes_now(self, link: Link) -> None:
        if self._flows[link]:
            self._change((link,))


class _Last(simpy.Event):
    """Comes behind all else of an instant."""

    def __init__(self, env: Any, call: Callable[[simpy.Event], None]) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        self.callbacks.append(call)
        env.schedule(self, priority=2)
