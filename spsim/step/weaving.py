"""Segments with tasks that are not of their program: collectives over weights, issued between its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from spsim.engine.recording import BufferUse
from spsim.engine.tasks import Need, Task
from spsim.step.gradients import Sync
from spsim.step.segments import Call, Segment


class Issued(NamedTuple):
    """A message of the additions, by its place among them."""

    number: int


Place = int | Issued
"""A task of the segment, or a message that is added to it."""


class Issue(NamedTuple):
    """A message that is added."""

    message: Sync
    before: int
    """The task before which it stands; as many as there are tasks for the end."""
    needs: tuple[Place, ...] = ()
    """Without any it waits for the last kernel before the segment."""


class Held(NamedTuple):
    """Memory of the messages, as of `BufferUse`."""

    tensor: str
    category: str
    size: int
    writer: Place | None
    readers: tuple[Place, ...]
    outlives: bool = False


@dataclass(slots=True)
class Additions:
    """What a variant of a segment has beyond it."""

    issues: list[Issue] = field(default_factory=list)
    """In order of where they stand."""
    waits: list[tuple[int, Issued | str]] = field(default_factory=list)
    """A task, and what it waits for, by name if an earlier segment has issued it."""
    exports: dict[str, Issued] = field(default_factory=dict)
    joins: frozenset[str] = frozenset()
    held: list[Held] = field(default_factory=list)


def woven(segment: Segment, name: str, additions: Additions) -> Segment:
    """The segment with its additions, under another name. Tasks keep their order and are numbered anew."""
    return _Weaving(segment, additions).segment(name)


class _Weaving:
    def __init__(self, segment: Segment, additions: Additions) -> None:
        self.own, self.additions = segment, additions
        self.places: dict[Place, int] = {}
        rest = [*enumerate(additions.issues)]
        for task in range(len(segment.tasks) + 1):
            while rest and rest[0][1].before <= task:
                self.places[Issued(rest.pop(0)[0])] = len(self.places)
            if task < len(segment.tasks):
                self.places[task] = len(self.places)

    def segment(self, name: str) -> Segment:
        own, places = self.own, self.places
        messages = {places[Issued(number)]: issue.message for number, issue in enumerate(self.additions.issues)}
        labels = {place: message.info(message.message_bytes) for place, message in messages.items()}
        labels |= {places[task]: label for task, label in enumerate(own.labels)}
        calls = {place: Call(message.axes) for place, message in messages.items()}
        return replace(
            own,
            name=name,
            variant_of=own.variant_of or (own.name if own.instructions else ""),
            tasks=tuple(self._tasks()),
            labels=tuple(labels[place] for place in range(len(places))),
            joins=own.joins | self.additions.joins,
            calls=calls | {places[task]: call for task, call in own.calls.items()},
            exports={name: places[task] for name, task in own.exports.items()}
            | {name: places[issued] for name, issued in self.additions.exports.items()},
            buffers=(*map(self._moved, own.buffers), *map(self._held, self.additions.held)),
            added={places[task]: what for task, what in own.added.items()} | messages,
            added_bytes=(*own.added_bytes, *(held.size for held in self.additions.held)),
        )

    def _tasks(self) -> Iterator[Task]:
        for place, number in self.places.items():
            if isinstance(place, Issued):
                issue = self.additions.issues[place.number]
                yield Task(number, issue.message.lane, needs=self._needs(issue.needs))
            else:
                task = self.own.tasks[place]
                waits = [awaited for waiting, awaited in self.additions.waits if waiting == place]
                yield task._replace(id=number, needs=self._needs((*task.needs, *waits)))

    def _needs(self, needs: Sequence[Place | str]) -> tuple[Need, ...]:
        """Numbers, and then names."""
        names = sorted({need for need in needs if isinstance(need, str)})
        return (*sorted({self.places[need] for need in needs if not isinstance(need, str)}), *names)

    def _moved(self, use: BufferUse) -> BufferUse:
        writer = None if use.writer is None else self.places[use.writer]
        return use._replace(writer=writer, readers=tuple(self.places[task] for task in use.readers))

    def _held(self, held: Held) -> BufferUse:
        writer = None if held.writer is None else self.places[held.writer]
        readers = tuple(self.places[place] for place in held.readers)
        return BufferUse(held.tensor, held.category, writer, readers, held.outlives)
