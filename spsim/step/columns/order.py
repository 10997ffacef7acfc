"""What is known of the order in which the tasks of a rank run before their durations are.

The ranks of a step that fold to one meet nobody, so that a task begins when all that it waits for has ended. In what
order tasks can be looked at, and which communications may hold the device while a kernel runs, follows from what waits
for what, whatever the workload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.tasks import Task
from spsim.step.chain import Chain
from spsim.step.segments import BlockPass, Segment

MOST_TASKS = 1000
"""Of a pass: what comes before what is a table of tasks by tasks."""
LONGEST_WALK = 5
"""Runs of a loop after which it should have come to a steady state."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of a segment in a pass, and how many more follow that are like it."""

    segment: Segment
    first: int
    """Its first task."""
    runs: int = 1
    """Above 1 for the last run of a loop that is written out."""

    @property
    def stop(self) -> int:
        """After its last task."""
        return self.first + len(self.segment.tasks)


class Turn(NamedTuple):
    """A task, which begins when what it waits for has ended."""

    task: int
    waits: tuple[int, ...]
    holds: tuple[int, ...] = ()
    """Communications that may be posted while a kernel runs, those of a lane in order."""
    lanes: int = 0
    """Number of lanes of those."""


class Order:
    """The tasks of a pass of one rank that begins with all lanes free, and that ends with all of them free."""

    def __init__(self, parts: Iterable[tuple[Segment, int]]) -> None:
        """Segments with the number of their runs."""
        chain = Chain()
        pieces: list[Piece] = []
        for segment, runs in parts:
            for run in range(min(runs, LONGEST_WALK)):
                more = runs - run if run == LONGEST_WALK - 1 else 1
                pieces.append(Piece(segment, len(chain.tasks), more))
                chain.append(segment, segment.tasks)
        self.pieces = tuple(pieces)
        self.tasks: Sequence[Task] = chain.tasks
        self.kernels = [task.id for task in self.tasks if task.lane == COMPUTE_LANE]
        self.waits: list[tuple[int, ...]] = []
        """What each task waits for and nothing else implies: of its lane, too."""
        self.before: list[int] = []
        """Tasks that have ended when a task is posted, as bits."""
        self._close()

    def _close(self) -> None:
        """What has ended before each task; needs stand before it."""
        last: dict[str, int] = {}
        for task in self.tasks:
            needs = {need for need in task.needs if isinstance(need, int)}
            if task.lane in last:
                needs.add(last[task.lane])
            before = 0
            for need in needs:
                before |= self.before[need]
            self.waits.append(tuple(need for need in sorted(needs) if not before >> need & 1))
            self.before.append(before | _bits(needs))
            last[task.lane] = task.id

    @cached_property
    def matrix(self) -> npt.NDArray[np.bool_]:
        """A row for each task: whether other tasks have ended when it is posted."""
        length = -(-len(self.tasks) // 8)
        rows = np.frombuffer(b"".join(mask.to_bytes(length, "little") for mask in self.before), dtype=np.uint8)
        bits = np.unpackbits(rows.reshape(-1, length), axis=1, bitorder="little", count=len(self.tasks))
        return bits.astype(np.bool_)

    @cached_property
    def program(self) -> Sequence[Turn]:
        """In an order in which the times of all that each waits for are known, and of all that slows it."""
        kernels = _bits(self.kernels)
        turns = [((before & kernels).bit_count(), kernels >> task & 1, task) for task, before in enumerate(self.before)]
        found: list[Turn] = []
        posted = 0
        for _, is_kernel, task in sorted(turns):
            if is_kernel:
                found.append(Turn(task, self.waits[task], *self._holds(posted & ~self.before[task])))
            else:
                posted |= 1 << task
                found.append(Turn(task, self.waits[task]))
        return found

    def _holds(self, posted: int) -> tuple[tuple[int, ...], int]:
        """Some communications, lane by lane, and the number of lanes."""
        own = [task for task in self.tasks if posted >> task.id & 1]
        own.sort(key=lambda task: task.lane)
        return tuple(task.id for task in own), len({task.lane for task in own})

    def end(self, piece: Piece) -> int:
        """The last kernel up to the end of a piece; where there is none, its last task."""
        return max((kernel for kernel in self.kernels if kernel < piece.stop), default=piece.stop - 1)

    def loose(self, piece: Piece) -> list[int]:
        """Communications up to the end of a piece that may outlast its kernels."""
        ended = self._ended(piece)
        return [task.id for task in self.tasks[: piece.stop] if not ended >> task.id & 1]

    @cached_property
    def late(self) -> set[int]:
        """Communications that may be posted after the end of their piece, for they wait for others."""
        found: set[int] = set()
        for piece in self.pieces[:-1]:
            ended = self._ended(piece)
            own = (task for task in self.loose(piece) if task >= piece.first)
            found |= {task for task in own if any(not ended >> other & 1 for other in self.waits[task])}
        return found

    def _ended(self, piece: Piece) -> int:
        """What surely has ended when a piece ends, as bits."""
        end = self.end(piece)
        return self.before[end] | 1 << end


def covered(block: BlockPass) -> bool:
    """Whether a pass is not too long, and all of its communications slow kernels alike."""
    tasks = [task for part in block.parts for task in part.segment.tasks]
    return len(tasks) <= MOST_TASKS and all(task.slowdown is None for task in tasks)


def order_of(block: BlockPass) -> Order:
    """The order of one pass of a block."""
    return Order((part.segment, part.runs) for part in block.parts)


def _bits(tasks: Iterable[int]) -> int:
    return sum(1 << task for task in set(tasks))
