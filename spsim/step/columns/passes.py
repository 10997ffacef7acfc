"""One pass for many workloads at once: its pieces as they ran, and for which workloads that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spsim.step.columns.fill import Fills, Floats, Places
from spsim.step.columns.order import Order
from spsim.step.columns.replay import Points, Replay
from spsim.step.segments import Segment


class PassColumns:
    """One pass that begins with all lanes free, prepared."""

    def __init__(
        self, order: Order, positions: Mapping[str, Places], coefficients: Floats, classes: Sequence[str]
    ) -> None:
        """`positions` of the bytes of the buffers of each segment, among numbers with `coefficients`."""
        self.order = order
        self.fills = Fills(order, positions, coefficients)
        self.ends = [order.end(piece) for piece in order.pieces]
        self.loose = [np.array(order.loose(piece), dtype=np.intp) for piece in order.pieces]
        """Of each piece, the communications up to its end that may outlast it."""
        runs = np.array([float(piece.runs) for piece in order.pieces] + [0.0])
        self._turns = runs[:-1] - runs[1:]
        """How often the time up to the end of each piece counts: a piece runs from the end of the one before it."""
        self._members = np.hstack([piece.runs * _members(piece.segment, classes) for piece in order.pieces])

    def length(self, run: Replay) -> Floats:
        """Picoseconds of the pass, all runs of its loops included."""
        length: Floats = self._turns @ run.ended.take(self.ends, axis=0)
        return length

    def compute(self, run: Replay) -> Floats:
        """Picoseconds of its kernels, a row for each class."""
        compute: Floats = self._members @ (run.ended - run.posted).astype(np.float64)
        return compute

    def holds(self, run: Replay) -> Points:
        """For which workloads the pieces stand for the whole pass: nothing is under way at its end, everything is
        posted before the end of the next piece, and runs of a loop that are not written out are like the last that is.
        """
        found = np.ones(run.moments.shape[1], dtype=np.bool_)
        last = len(self.ends) - 1
        for place, piece in enumerate(self.order.pieces):
            loose, end = self.loose[place], run.ended[self.ends[place]]
            if place == last and len(loose):
                found &= (run.ended[loose] <= end).all(axis=0)
            elif place < last and place:
                found &= (run.posted[loose[loose < piece.first]] <= end).all(axis=0)
            if piece.runs > 1:
                found &= self._is_steady(run, place)
        return found

    def _is_steady(self, run: Replay, place: int) -> Points:
        """Whether a run of a loop ends as the run before it did: with the same of its own under way, nothing else."""
        found = np.ones(run.moments.shape[1], dtype=np.bool_)
        states = []
        for index in (place - 1, place):
            piece, loose, end = self.order.pieces[index], self.loose[index], run.ended[self.ends[index]]
            found &= (run.ended[loose[loose < piece.first]] <= end).all(axis=0)
            calls = [piece.first + call for call in piece.segment.calls]
            states.append(np.maximum(run.moments.reshape(2, -1, run.moments.shape[1])[:, calls] - end, 0))
        before, now = states
        open_ = (before[1] > 0) | (now[1] > 0)
        found &= ((before == now).all(axis=0) | ~open_).all(axis=0)
        return found


def _members(segment: Segment, classes: Sequence[str]) -> Floats:
    """A row for each class of kernels: which tasks of a segment belong to it."""
    names, members = segment.outline.classes
    found = np.zeros((len(classes), len(segment.tasks)))
    found[[classes.index(name) for name in names]] = members
    return found
