"""How full the memory of a rank is over a pass, for many workloads at once.

Memory is fullest where something is allocated. What has been allocated and freed at such a moment is mostly known
from the order of tasks alone, and then the bytes are one row of coefficients; where it depends on the workload, the
times decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.lazy import lazy
from spsim.step.columns.order import Order
from spsim.step.columns.replay import Replay, Times

Floats = npt.NDArray[np.float64]
"""Bytes and the like: whole numbers below 2^53, whose products and sums are exact."""
Places = npt.NDArray[np.intp]
NEVER = np.iinfo(np.int64).max


class _Change(NamedTuple):
    """One buffer of one piece that is allocated or freed."""

    piece: int
    tasks: tuple[int, ...]
    """The one that allocates it when it is posted, or those of which the last to end frees it."""
    position: int
    """Of its bytes among the numbers of the program."""
    allocates: bool


class Fills:
    """The changes of memory of a pass, whatever the workload."""

    def __init__(self, order: Order, positions: Mapping[str, Places], coefficients: Floats) -> None:
        """`positions` of the bytes of the buffers of each segment, among numbers with `coefficients`."""
        self.order = order
        self.ends = [order.end(piece) for piece in order.pieces]
        changes = [*_changes(order, positions)]
        allocations = [change for change in changes if change.allocates]
        self._look(allocations)
        self._relate(_Table(allocations), _Table([change for change in changes if not change.allocates]), coefficients)

    def _look(self, allocations: Sequence[_Change]) -> None:
        """The moments that may be the fullest: each allocation, among those of its piece or, where it is posted after
        the end of that, of the next one. Of each piece the later buffer stands first, those of the piece before
        before all.
        """
        late = {place for place, change in enumerate(allocations) if change.tasks[0] in self.order.late}
        by_piece: list[list[int]] = [[] for _ in self.ends]
        for place, change in reversed([*enumerate(allocations)]):
            by_piece[change.piece].append(place)
        found: list[tuple[int, int]] = []
        self.own: list[slice] = []
        """Moments of each piece."""
        for piece, own in enumerate(by_piece):
            before = [place for place in by_piece[piece - 1] if place in late] if piece else []
            self.own.append(slice(len(found), len(found) + len(before) + len(own)))
            found += [(place, piece) for place in before + own]
        self.pieces = np.array([piece for _, piece in found], dtype=np.intp)
        self.of_change = np.array([place for place, _ in found], dtype=np.intp)
        """Of each moment, the allocation,"""
        self.tasks = np.array([allocations[place].tasks[0] for place, _ in found], dtype=np.intp)
        """and its task."""
        self.late = np.array([at for at, (place, _) in enumerate(found) if place in late], dtype=np.intp)
        """Moments of which only the times tell in which piece they are."""
        own_pieces = np.array([allocations[found[at][0]].piece for at in self.late], dtype=np.intp)
        self.ends_of_late = np.array(self.ends)[own_pieces]
        self.from_before = (self.pieces[self.late] > own_pieces)[:, None]

    def _relate(self, allocated: _Table, freed: _Table, coefficients: Floats) -> None:
        """Which changes come before each moment and each end of a piece: surely, never, or as it may be."""
        moments = _Moments(self.order.matrix, self.pieces, self.tasks, self.ends)
        surely, perhaps = moments.allocated(allocated)
        surely_freed, perhaps_freed = moments.freed(freed)
        sizes, sizes_freed = coefficients[allocated.positions], coefficients[freed.positions]
        self.sizes = sizes[self.of_change]
        """Coefficients of what is allocated at each moment."""
        self.known = surely @ sizes - surely_freed @ sizes_freed
        """Coefficients of the level at each moment and end, as far as it is known."""
        count = len(self.order.tasks)
        at, which = perhaps.nonzero()
        at_freed, which_freed = perhaps_freed.nonzero()
        posted = np.repeat(allocated.tasks[:, which], len(freed.tasks), axis=0)
        self.open = _Open.of(
            np.concatenate([at, at_freed]),
            np.concatenate([posted, freed.tasks[:, which_freed] + count], axis=1),
            moments.places(count),
            np.concatenate([sizes[which], -sizes_freed[which_freed]]),
        )

    def of(self, replay: Replay, basis: Floats) -> list[Fill]:
        """Of each piece of a pass as it ran, with the monomials of its sizes."""
        levels: Floats = self.known @ basis
        if len(self.open.at):
            self.open.add_to(levels, replay.moments, basis)
        if len(self.late):
            self._leave_to_others(levels, replay)
        ends = levels[len(self.tasks) :]
        first, *more = self.own
        found = [Fill(self, first, levels[first], ends[0], replay, basis)]
        for piece, own in enumerate(more, 1):
            before = ends[piece - 1]
            found.append(Fill(self, own, levels[own] - before, ends[piece] - before, replay, basis))
        return found

    def _leave_to_others(self, levels: Floats, replay: Replay) -> None:
        """Leave out what is posted in another piece."""
        after = replay.posted[self.tasks[self.late]] > replay.ended[self.ends_of_late]
        levels[self.late] = np.where(after == self.from_before, levels[self.late], -np.inf)


def _changes(order: Order, positions: Mapping[str, Places]) -> Iterator[_Change]:
    """All of a pass."""
    for index, piece in enumerate(order.pieces):
        uses = zip(piece.segment.buffers, positions[piece.segment.name].tolist(), strict=True)
        for use, position in uses:
            if use.writer is not None:
                yield _Change(index, (use.writer + piece.first,), position, True)
            if not use.outlives:
                readers = sorted(use.readers or (use.writer or 0,))
                last = {order.tasks[task + piece.first].lane: task + piece.first for task in readers}
                yield _Change(index, tuple(last.values()), position, False)


class _Table:
    """Changes as arrays: a column for each."""

    def __init__(self, changes: Sequence[_Change]) -> None:
        most = max((len(change.tasks) for change in changes), default=1)
        padded = [change.tasks + change.tasks[-1:] * (most - len(change.tasks)) for change in changes]
        self.tasks = np.array(padded, dtype=np.intp).reshape(-1, most).T
        """Some of them more than once."""
        self.pieces = np.array([change.piece for change in changes], dtype=np.intp)
        self.positions = np.array([change.position for change in changes], dtype=np.intp)


class _Moments:
    """Moments at which tasks are posted, and after those the ends of pieces, of which nothing later counts."""

    def __init__(self, ended: npt.NDArray[np.bool_], pieces: Places, posted: Places, ends: Sequence[int]) -> None:
        self.ended = ended
        self.posts = len(posted)
        self.pieces = np.concatenate([pieces, np.arange(len(ends))])[:, None]
        self.tasks = np.concatenate([posted, ends]).astype(np.intp)
        self.done = ended[self.tasks]
        self.done[range(self.posts, len(self.tasks)), ends] = True

    def places(self, count: int) -> Places:
        """Where their times stand in the moments of a replay of so many tasks."""
        return self.tasks + count * (np.arange(len(self.tasks)) >= self.posts)

    def allocated(self, changes: _Table) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """What surely is by then, and what may be; what is posted as a piece ends belongs to it."""
        tasks = changes.tasks[0]
        here = changes.pieces <= self.pieces
        begun = self.done[:, tasks] | (tasks == self.tasks[:, None])
        later = self.ended[tasks][:, self.tasks].T
        later[self.posts :] = False
        return here & begun, here & ~begun & ~later

    def freed(self, changes: _Table) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The same of what the last of some tasks frees."""
        here = changes.pieces <= self.pieces
        done = self.done[:, changes.tasks].all(axis=1)
        own = changes.tasks[:, None] == self.tasks[:, None]
        own[:, self.posts :] = False
        later = (own | self.ended[changes.tasks][..., self.tasks].swapaxes(1, 2)).any(axis=0)
        return here & done, here & ~done & ~later


@dataclass(frozen=True, slots=True)
class _Open:
    """Changes of which the times decide whether they come before a moment."""

    at: Places
    """The moments that have some,"""
    starts: Places
    """and where theirs begin."""
    ends: Places
    """Where times stand of which the latest is that of the change."""
    limits: Places
    """Where the time of the moment stands."""
    sizes: Floats
    """Coefficients, negative where memory is freed."""

    @classmethod
    def of(cls, moments: Places, ends: Places, places: Places, sizes: Floats) -> _Open:
        """The changes in the order of their moments, whose times stand at `places`."""
        order = moments.argsort(kind="stable")
        at, starts = np.unique(moments[order], return_index=True)
        return cls(at, starts, ends[:, order], places[moments[order]], sizes[order])

    def add_to(self, levels: Floats, moments: Times, basis: Floats) -> None:
        """The changes that come before each moment."""
        first, *others = self.ends
        times = moments.take(first, axis=0)
        for other in others:
            np.maximum(times, moments.take(other, axis=0), out=times)
        changes = (times <= moments.take(self.limits, axis=0)) * (self.sizes @ basis)
        levels[self.at] += np.add.reduceat(changes, self.starts, axis=0)


class Fill:
    """The memory of one piece over what is there before it, for each workload."""

    def __init__(self, fills: Fills, own: slice, levels: Floats, total: Floats, replay: Replay, basis: Floats) -> None:
        self.levels = levels
        """Just after each allocation."""
        self.highest: Floats = levels.max(axis=0, initial=0.0)
        """The fullest; not below what is there before."""
        self.total = total
        """What is there after it."""
        self._own = own
        self._fills = fills
        self._replay = replay
        self._basis = basis

    @property
    def _tasks(self) -> Places:
        tasks: Places = self._fills.tasks[self._own]
        return tasks

    @property
    def _first(self) -> int:
        """The first task of the piece."""
        piece = self._fills.own.index(self._own)
        return self._fills.order.pieces[piece].first

    @lazy
    def _times(self) -> Times:
        return self._replay.posted.take(self._tasks, axis=0)

    @lazy
    def _sizes(self) -> Floats:
        sizes: Floats = self._fills.sizes[self._own] @ self._basis
        return sizes

    @lazy
    def fullest(self) -> Places:
        """The task of the pass whose allocation reaches the fullest level: the first, of one moment the largest."""
        times = np.where(self.levels == self.highest, self._times, NEVER)
        found = np.where(times == times.min(axis=0), self._sizes, -1.0).argmax(axis=0)
        return np.where(self.highest > 0, self._tasks[found], self._first)

    def first_above(self, room: Floats) -> Places:
        """The task of the pass whose allocation first takes the level above `room`, where there is one; the first of
        the piece where what is there before takes more.
        """
        times = np.where(self.levels > room, self._times, NEVER)
        first = times.argmin(axis=0)
        columns = np.arange(len(first))
        sizes = np.where(self._times == times[first, columns], self._sizes, 0.0)[::-1]
        order = sizes.argsort(axis=0, kind="stable")
        sums = np.take_along_axis(sizes, order, axis=0).cumsum(axis=0)
        above = (self.levels[first, columns] - sums[-1] + sums > room).argmax(axis=0)
        return np.where(room < 0, self._first, self._tasks[::-1][order[above, columns]])

    def part(self, columns: Places, replay: Replay) -> Fill:
        """Of some of the workloads, as a replay ran that is theirs."""
        basis, levels, total = self._basis[:, columns], self.levels[:, columns], self.total[columns]
        return Fill(self._fills, self._own, levels, total, replay, basis)

    @property
    def replay(self) -> Replay:
        """The pass that it is a piece of."""
        return self._replay


def parts_of(fills: Sequence[Fill], columns: Places) -> list[Fill]:
    """Of some of the workloads, each perhaps several times."""
    replays = {
        id(fill.replay): Replay(fill.replay.moments[:, columns]) for fill in {id(f.replay): f for f in fills}.values()
    }
    return [fill.part(columns, replays[id(fill.replay)]) for fill in fills]
