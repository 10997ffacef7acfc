"""Passes of blocks that carry the messages of replicas: weights gathered ahead of their use, gradients reduced behind
the backward pass.

A message of gathered weights is issued when the one before it is waited for, so that one is under way while another
is used; nothing waits for a reduction but what joins its lane. Blocks in which the same is issued share one variant,
so that equal layers stay equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE
from spsim.errors import InputError
from spsim.program.instructions import Compute
from spsim.step.buckets import Parameter
from spsim.step.gradients import Sync
from spsim.step.groups import Groups, meets, sync_of
from spsim.step.messages import Message, Reduction, Synchronisation
from spsim.step.segments import BlockPass, Part, Segment
from spsim.step.weaving import Additions, Held, Issue, Issued, Place, woven


@dataclass(frozen=True, slots=True)
class StagePass:
    """One pass of the blocks of a stage, in its own order."""

    before: Segment | None
    """What is issued before its first block."""
    blocks: tuple[BlockPass, ...]


class _Task(NamedTuple):
    """A task of a pass of a block, or with `turn` of a stage; in order of issue."""

    turn: int
    part: int
    task: int


class _Gather(NamedTuple):
    """A task that waits for gathered weights, and what is gathered next."""

    task: _Task
    then: Sync | None


class _Reduction(NamedTuple):
    """Messages after a task, and the bytes of gradients of earlier blocks that are freed by them."""

    task: _Task
    before: tuple[Sync, ...]
    bucket: Sync
    after: tuple[Sync, ...]
    freed: int


class _Gradients(NamedTuple):
    """The task that begins to write gradients of a bucket, and the reduction of the block that frees them, if any."""

    task: _Task
    size: int
    freed_by: int | None


@dataclass(slots=True)
class _Block:
    """What is added to the pass of one block; tasks as if it were the first."""

    gathers: list[_Gather] = field(default_factory=list)
    reductions: list[_Reduction] = field(default_factory=list)
    gradients: list[_Gradients] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    """Bytes of what was gathered and is used here for the last time."""
    joins: set[str] = field(default_factory=set)
    """Lanes of what the block before has sent and its kernels wait for."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where the same is added."""
        sent = tuple(self.gathers), tuple(self.reductions), frozenset(self.joins)
        return *sent, tuple(self.gradients), tuple(self.freed)


class ReplicaPasses:
    """The passes of the blocks of one chunk of a stage under a plan of synchronisation."""

    def __init__(
        self, sync: Synchronisation, blocks: Sequence[Mapping[Pass, BlockPass]], groups: Groups, name: str = ""
    ) -> None:
        """`blocks` in the order of the forward pass, as the parameters of `sync` count them; `name` tells the chunk
        from others of the step.
        """
        self.sync, self.blocks, self.groups, self.name = sync, blocks, groups, name
        self._variants: dict[tuple[object, ...], BlockPass] = {}
        self._passes: dict[tuple[Pass, bool], StagePass] = {}
        self._firsts: dict[tuple[Sync, Pass], Segment] = {}

    def forward(self, *, first: bool) -> StagePass:
        """Of the first micro-batch, or of any other."""
        gathering = first or self.sync.forward_in == "every"
        return self._known("forward", gathering, self.sync.forward if gathering else (), ())

    def backward(self, *, last: bool) -> StagePass:
        """Of the last micro-batch, or of any other."""
        reducing = self.sync.behind_backward and (last or self.sync.reductions_in == "every")
        return self._known("backward", reducing, self.sync.backward, self.sync.reductions if reducing else ())

    def _known(
        self, phase: Pass, sending: bool, gathers: Sequence[Message], reductions: Sequence[Reduction]
    ) -> StagePass:
        """Made once, so that equal passes are the same."""
        if (phase, sending) not in self._passes:
            self._passes[phase, sending] = self._pass(phase, gathers, reductions)
        return self._passes[phase, sending]

    def _pass(self, phase: Pass, gathers: Sequence[Message], reductions: Sequence[Reduction]) -> StagePass:
        order = range(len(self.blocks))[:: 1 if phase == "forward" else -1]
        turns, passes = {block: turn for turn, block in enumerate(order)}, [self.blocks[b][phase] for b in order]
        stage = _Stage(turns, passes, self.groups)
        gathers = [message for message in gathers if self._meets(message)]
        stage.gather(gathers, by_module=self.sync.by_module)
        stage.reduce([own for own in reductions if self._meets(own.bucket)], self.sync.gradient_bytes)
        if self.sync.sharded:
            stage.free(self._last_used(phase, gathers))
        before = self._first(sync_of(gathers[0], self.groups), phase) if gathers else None
        return StagePass(before, tuple([self._variant(*own, phase) for own in stage.added_to_passes]))

    def _meets(self, message: Message) -> bool:
        return meets(message, self.groups)

    def _last_used(self, phase: Pass, gathers: Iterable[Message]) -> Iterator[Message]:
        """What was gathered and is used in this pass for the last time: in the forward pass what will be gathered
        again, in the backward pass all else.
        """
        again = {message.parameters for message in self.sync.backward}
        if phase == "forward":
            return (message for message in gathers if message.parameters in again)
        kept = (m for m in self.sync.forward if m.parameters not in again and self._meets(m))
        return (message for own in (gathers, kept) for message in own)

    def _arrival(self, phase: Pass) -> str:
        """What the arrival of gathered weights is called."""
        return f"{self.name} {phase} parameters".strip()

    def _first(self, message: Sync, phase: Pass) -> Segment:
        """The segment that issues the first gather of a pass; the same for the same."""
        if (message, phase) not in self._firsts:
            name = f"{self._arrival(phase)} gathered"
            additions = Additions(
                [Issue(message, 0)],
                exports={self._arrival(phase): Issued(0)},
                held=list(self._gathered(message, Issued(0))),
            )
            self._firsts[message, phase] = woven(Segment(name, phase, (), ()), name, additions)
        return self._firsts[message, phase]

    def _gathered(self, message: Sync, place: Issued) -> Iterator[Held]:
        """Memory of gathered weights that rest sharded; other libraries gather in place."""
        if self.sync.sharded:
            yield Held(message.name, "communication buffers", message.message_bytes, place, (place,), outlives=True)

    def _variant(self, block: BlockPass, added: _Block, phase: Pass) -> BlockPass:
        """The pass with what is added; the same for the same."""
        if added == _Block():
            return block
        key = (id(block), *added.key)
        if key not in self._variants:
            number = f"{self.name} {len(self._variants)}".strip()
            parts = (self._part(block, index, added, phase, number) for index in range(len(block.parts)))
            self._variants[key] = BlockPass(tuple(parts), block.entry, block.result)
        return self._variants[key]

    def _part(self, block: BlockPass, index: int, added: _Block, phase: Pass, number: str) -> Part:
        part = block.parts[index]
        additions = self._additions(part.segment, index, added, phase)
        if index == 0:
            additions.joins = frozenset(added.joins)
        if index == len(block.parts) - 1:
            readers = (len(part.segment.tasks) - 1,)
            additions.held += [Held("parameters", "communication buffers", s, None, readers) for s in added.freed]
        if additions == Additions():
            return part
        assert part.runs == 1, f"{part.segment.name} runs again and again, and would send its messages as often"
        return Part(woven(part.segment, f"{part.segment.name} (messages {number})", additions))

    def _additions(self, segment: Segment, part: int, added: _Block, phase: Pass) -> Additions:
        """Of one part of a pass."""
        gathers = [gather for gather in added.gathers if gather.task.part == part]
        reductions = [r for r in enumerate(added.reductions) if r[1].task.part == part]
        found = Additions()
        awaited: Issued | str = self._arrival(phase)
        places: dict[int, Issued] = {}
        for task in range(len(segment.tasks) + 1):
            for number, reduction in reductions:
                if reduction.task.task + 1 == task:
                    places[number] = self._add_reduction(found, reduction)
            for gather in gathers:
                if gather.task.task != task:
                    continue
                found.waits.append((task, awaited))
                if gather.then:
                    awaited = found.exports[self._arrival(phase)] = Issued(len(found.issues))
                    found.issues.append(Issue(gather.then, task, _kernel_before(segment, task)))
                    found.held += self._gathered(gather.then, awaited)
        for gradients in added.gradients:
            if gradients.task.part == part:
                freed_by = None if gradients.freed_by is None else places.get(gradients.freed_by)
                found.held.append(_held(gradients, freed_by))
        return found

    def _add_reduction(self, found: Additions, reduction: _Reduction) -> Issued:
        """A reduction with what stands around it; of gradients that are freed it reads a copy."""
        own = Issued(len(found.issues) + len(reduction.before))
        task = reduction.task.task
        needs: tuple[Place, ...] = (task,)
        for message in (*reduction.before, reduction.bucket, *reduction.after):
            found.issues.append(Issue(message, task + 1, needs))
            needs = (Issued(len(found.issues) - 1),)
        if self.sync.gradient_bytes:
            size = reduction.bucket.message_bytes
            found.held.append(Held("weight gradients to be reduced", "communication buffers", size, own, (own,)))
        if reduction.freed:
            found.held.append(Held("weight gradients", "temporary", reduction.freed, None, (own,)))
        return own


def _held(gradients: _Gradients, freed_by: Issued | None) -> Held:
    readers = () if freed_by is None else (freed_by,)
    return Held(
        "weight gradients", "temporary", gradients.size, gradients.task.task, readers, outlives=freed_by is None
    )


def _kernel_before(segment: Segment, task: int) -> tuple[int, ...]:
    kernels = [other for other in range(task) if segment.tasks[other].lane == COMPUTE_LANE]
    return (kernels[-1],) if kernels else ()


class _Stage:
    """The passes of the blocks of a stage in order, and what is added to each."""

    def __init__(self, turns: Mapping[int, int], passes: Sequence[BlockPass], groups: Groups) -> None:
        self.turns, self.passes, self.groups = turns, passes, groups
        self.added = [_Block() for _ in passes]
        self._known: dict[int, list[tuple[_Task, Compute]]] = {}

    @property
    def added_to_passes(self) -> Iterator[tuple[BlockPass, _Block]]:
        """Each pass with what is added to it."""
        return zip(self.passes, self.added, strict=True)

    def gather(self, messages: Sequence[Message], *, by_module: bool) -> None:
        """Each is waited for at its first use, or at that of a later one, and then the next is issued."""
        first = self._beginning if by_module else self._first_use
        uses = [first(message.parameters) for message in messages]
        awaited = [*accumulate(reversed(uses), min)][::-1]
        for task, then in zip(awaited, (*messages, None)[1:], strict=True):
            added = then and sync_of(then, self.groups)
            self.added[task.turn].gathers.append(_Gather(task._replace(turn=0), added))

    def reduce(self, reductions: Sequence[Reduction], itemsize: int) -> None:
        """Each is issued after the last of its gradients, and of those of all before it. With an `itemsize` its
        gradients are there from the first one's task on until it has ended.
        """
        ends = accumulate([self._last_gradient(own.bucket.parameters) for own in reductions], max)
        for own, end in zip(reductions, ends, strict=True):
            block, sizes = self.added[end.turn], self._gradients(own.bucket.parameters, itemsize)
            for turn, gradients in sizes.items():
                freed_by = len(block.reductions) if turn == end.turn else None
                self.added[turn].gradients.append(gradients._replace(freed_by=freed_by))
            freed = sum(gradients.size for turn, gradients in sizes.items() if turn != end.turn)
            before, after = self._syncs(own.before), self._syncs(own.after)
            bucket = sync_of(own.bucket, self.groups)
            block.reductions.append(_Reduction(end._replace(turn=0), before, bucket, after, freed))
            for following in self.added[end.turn + 1 : end.turn + 2]:
                following.joins |= {sync.lane for sync in before}

    def free(self, messages: Iterable[Message]) -> None:
        """What is used here for the last time."""
        for message in messages:
            last = max(self.turns[parameter.block] for parameter in message.parameters)
            self.added[last].freed.append(message.message_bytes)

    def _gradients(self, parameters: Sequence[Parameter], itemsize: int) -> dict[int, _Gradients]:
        """Of a bucket, by the turn of the block that writes them."""
        found: dict[int, _Gradients] = {}
        for turn in sorted({self.turns[parameter.block] for parameter in parameters}) if itemsize else ():
            own = [parameter for parameter in parameters if self.turns[parameter.block] == turn]
            size = itemsize * sum(parameter.elements for parameter in own)
            found[turn] = _Gradients(self._writing(turn, own)[0]._replace(turn=0), size, None)
        return found

    def _syncs(self, messages: Sequence[Message]) -> tuple[Sync, ...]:
        return tuple([sync_of(message, self.groups) for message in messages if meets(message, self.groups)])

    def _beginning(self, parameters: Sequence[Parameter]) -> _Task:
        """The first task of the pass of the first block that has one of the weights."""
        return _Task(min(self.turns[parameter.block] for parameter in parameters), 0, 0)

    def _first_use(self, parameters: Sequence[Parameter]) -> _Task:
        """The first kernel of an operator that has one of the weights."""
        turn = min(self.turns[parameter.block] for parameter in parameters)
        operators = {parameter.operator for parameter in parameters if self.turns[parameter.block] == turn}
        kernels = self._kernels(turn)
        return next((task for task, step in kernels if step.operator in operators), kernels[0][0])

    def _last_gradient(self, parameters: Sequence[Parameter]) -> _Task:
        """The last kernel that writes one of the gradients."""
        turn = max(self.turns[parameter.block] for parameter in parameters)
        own = [parameter for parameter in parameters if self.turns[parameter.block] == turn]
        return self._writing(turn, own)[-1]

    def _writing(self, turn: int, parameters: Sequence[Parameter]) -> Sequence[_Task]:
        """Kernels that write gradients of weights of a block."""
        operators = {parameter.operator for parameter in parameters}
        found = [
            task
            for task, step in self._kernels(turn)
            if step.operator in operators and step.part in ("wgrad", "backward", "accumulate")
        ]
        if not found:
            raise InputError(f"no kernel writes the gradients of {', '.join(p.name for p in parameters)}")
        return found

    def _kernels(self, turn: int) -> Sequence[tuple[_Task, Compute]]:
        """Of the pass of a block, in order."""
        block = self.passes[turn]
        if id(block) not in self._known:
            self._known[id(block)] = [
                (_Task(0, place, task), step)
                for place, part in enumerate(block.parts)
                for task, step in enumerate(part.segment.instructions)
                if isinstance(step, Compute)
            ]
        return [(task._replace(turn=turn), step) for task, step in self._known[id(block)]]
