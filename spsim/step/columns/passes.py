"""One pass for many workloads at once: its pieces as they ran, and for which workloads that holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spsim.step.columns.fill import Fill, Fills, Floats, Places
from spsim.step.columns.order import Order
from spsim.step.columns.replay import Points, Replay
from spsim.step.segments import Segment


@dataclass(frozen=True, eq=False)
class Ran:
    """One run of a segment as it was, for each workload, and how many in a row were like it."""

    segment: Segment
    runs: int
    length: Floats
    """Picoseconds from the end of the kernels before it to the end of its own, or of all where it has none."""
    compute: Mapping[str, Floats]
    """Picoseconds of its kernels by class."""
    fill: Fill


class PassColumns:
    """One pass that begins with all lanes free, prepared."""

    def __init__(self, order: Order, positions: Mapping[str, Places], coefficients: npt.NDArray[np.int64]) -> None:
        self.order = order
        self.fills = Fills(order, positions, coefficients)
        self.ends = [order.end(piece) for piece in order.pieces]
        self.loose = [np.array(order.loose(piece), dtype=np.intp) for piece in order.pieces]
        """Of each piece, the communications up to its end that may outlast it."""

    def ran(self, run: Replay, basis: Floats) -> Iterator[Ran]:
        """Its pieces as they ran."""
        took = (run.ended - run.posted).astype(np.float64)
        ends = run.ended[self.ends].astype(np.float64)
        before: Floats | float = 0.0
        for piece, end, fill in zip(self.order.pieces, ends, self.fills.of(run, basis), strict=True):
            names, members = piece.segment.outline.classes
            compute = dict(zip(names, members @ took[piece.first : piece.stop], strict=True))
            yield Ran(piece.segment, piece.runs, end - before, compute, fill)
            before = end

    def holds(self, run: Replay) -> Points:
        """For which workloads the pieces stand for the whole pass: nothing is under way at its end, nothing is posted
        after the end of its own piece, and runs of a loop that are not written out are like the last that is.
        """
        found = np.ones(run.moments.shape[1], dtype=np.bool_)
        last = len(self.ends) - 1
        for place, piece in enumerate(self.order.pieces):
            loose, end = self.loose[place], run.ended[self.ends[place]]
            if len(loose):
                found &= ((run.ended if place == last else run.posted)[loose] <= end).all(axis=0)
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
