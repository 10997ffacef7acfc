"""Lanes and issue order: from the sections of a program to segments.

Overlap is not modelled, it follows: lanes are in order, a task waits for the data it reads, and the policy
below says when communication is issued and whether the next kernel waits for it although no data says so.
Nothing is issued before the segment that it belongs to is reached.

| axis, purpose | lane | issued | next kernel waits |
|---|---|---|---|
| tp, input | tp | when its tensor is ready | yes |
| tp, in chunks (`tp_overlap`) | tp | when its shard or piece is there | no |
| tp, regather | tp | before the data gradient of its operator; only the weight gradient reads it | no |
| ring, regather of all K and V | ring | before the backward pass of core attention, which reads it | no |
| tp, gradient | tp | when its tensor is ready: behind the weight gradient of a column-parallel linear | no |
| tp, regather and gradient without `tp_backward_overlap` | tp | in program order | yes |
| ulysses, all | ulysses | when its tensor is ready | yes |
| ring, other | ring | when its tensor is ready; K and V of the next step when a step starts | no |
| dp and ep, regather | dp, ep | in program order | no |
| dp and ep, other | dp, ep | when its tensor is ready: weights one after another from the start of the segment | no |
| copies to the host | host | after the last kernel of the layer | no |
| copies back, of the next layer of the backward pass | host | when its segment starts | where it reads them |
| weight, group of ulysses and ring | dp | end of the step, coalesced | yes |
| weight, tp | tp | end of the step, coalesced | yes |

The last two are `gradients.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE, BufferUse, TaskInfo
from spsim.engine.tasks import Task
from spsim.inputs.plan import Plan
from spsim.program.instructions import OFFLOAD, Buffer, Communication, Compute, HostCopy, Instruction, Program, Section
from spsim.program.routing import HELD
from spsim.step.halves import Halves, halved
from spsim.step.segments import BlockPass, Call, Part, Segment

HOST_LANE = "host"
"""Of copies between the device and its host, which hold no part of the device."""
FROM_HOST = "from host"
"""What the arrival of activations from the host is called: blocks fetch them one after another, each for the next."""


def block_passes(program: Program, plan: Plan, name: str) -> dict[Pass, BlockPass]:
    """The forward and, if there is one, the backward pass of a block under a plan."""
    issue = _Issue(program, plan, name)
    return {phase: issue.block_pass(phase) for phase, sections in issue.sections.items() if sections}


def halved_passes(program: Program, plan: Plan, name: str) -> Halves[BlockPass] | None:
    """The backward pass of a block in halves; None if no product works out gradients of weights."""
    issue = _Issue(program, plan, name)
    sections = halved(issue.sections["backward"])
    return issue.halves(*sections) if sections.weights else None


class _Issue:
    """What the segments of one program have in common."""

    def __init__(self, program: Program, plan: Plan, name: str) -> None:
        self.program = program
        self.plan = plan
        self.name = name
        self.sections: dict[Pass, tuple[Section, ...]] = {
            "forward": program.forward_sections,
            "backward": program.backward_sections,
        }
        instructions = [step for found in self.sections.values() for section in found for step in section.instructions]
        outside = (*program.inputs, *program.output_gradients)
        self.buffers = {b.id: b for b in (*outside, *(b for step in instructions for b in step.writes))}
        self.roots: dict[int, int] = {}
        """Buffer -> the buffer whose memory it is."""
        for number, buffer in self.buffers.items():
            self.roots[number] = number if buffer.alias_of is None else self.roots[buffer.alias_of]
        self.from_host = frozenset([buffer.id for buffer in program.from_host])
        self.names = {left: found for sections in self.sections.values() for s in sections for found, left in s.carried}
        """Buffer that a run of a section leaves -> the one that the next run finds in its place."""

    def block_pass(self, phase: Pass) -> BlockPass:
        """The segments of one pass."""
        program = self.program
        if phase == "forward":
            after = self._read(self.sections["backward"])
            return self._pass(phase, phase, self.sections[phase], program.inputs, program.outputs, after)
        return self._pass(phase, phase, self.sections[phase], program.output_gradients, program.input_gradients, set())

    def halves(self, first: Sequence[Section], second: Sequence[Section]) -> Halves[BlockPass]:
        """Of the backward pass, as torch's autograd runs it twice: the first run keeps the graph with all that the
        forward pass has saved, the second frees it. A loop keeps none of what one of its runs leaves to the next.
        """
        own = {buffer.id for section in (*first, *second) for step in section.instructions for buffer in step.writes}
        looped = {self.roots[found] for section in first for found, _ in section.carried}
        outside = {self.roots[buffer.id] for buffer in self.program.output_gradients}
        graph = self._read((*first, *second)) - own - looped - outside
        gradients = self.program.output_gradients, self.program.input_gradients
        return Halves(
            self._pass("input gradients", "backward", first, *gradients, graph | self._read(second)),
            self._pass("weight gradients", "backward", second, (), (), set(), graph - self._read(second)),
        )

    def _pass(
        self,
        name: str,
        phase: Pass,
        sections: Sequence[Section],
        outside: Sequence[Buffer],
        result: Sequence[Buffer],
        after: set[int],
        freed: Collection[int] = (),
    ) -> BlockPass:
        """Sections as segments; what is read `after` them outlives them, what is `freed` is there until their end."""
        handed_on = [self.roots[buffer.id] for buffer in result]
        parts: list[Part] = []
        blocking: frozenset[str] = frozenset()
        sent = _sent(sections) if len(sections) > 1 else frozenset()
        for index, section in enumerate(sections):
            last = index == len(sections) - 1
            later = self._read(sections[index + 1 :]) | after | {*handed_on} | ({*freed} if not last else set())
            uses = self._buffer_uses(
                section, outside if index == 0 else (), later, handed_on if last else (), freed if last else ()
            )
            tasks, calls, blocking_next = self._tasks(section, sent)
            segment = Segment(
                name=f"{self.name} {name}" + (f" {index}" if len(sections) > 1 else ""),
                phase=phase,
                tasks=tasks,
                labels=tuple(map(_label, section.instructions)),
                calls=calls,
                exports=self._exports(section, sections[index + 1 :]),
                joins=blocking,
                buffers=tuple(uses.values()),
                buffer_ids=tuple(uses),
                instructions=section.instructions,
            )
            parts.append(Part(segment, section.count, section.layer))
            blocking = blocking_next
        assert not blocking, "a pass ends with a kernel, so that the next one finds its lanes free"
        entry, places = range(len(outside)), parts[-1].segment.buffer_ids
        return BlockPass(tuple(parts), tuple(entry), tuple(places.index(buffer) for buffer in handed_on))

    # Issue order

    def _tasks(
        self, section: Section, sent: frozenset[int]
    ) -> tuple[tuple[Task, ...], dict[int, Call], frozenset[str]]:
        """The policy table: each instruction with its lane and what it waits for; whom it calls; and the lanes that
        the first kernel after the section waits for. What other sections have `sent` is waited for by name.
        """
        tasks: list[Task] = []
        calls: dict[int, Call] = {}
        place = {step.id: index for index, step in enumerate(section.instructions)}
        writer: dict[int, int] = {}
        last_kernel: int | None = None
        blocking: set[int] = set()
        for index, step in enumerate(section.instructions):
            needs = {writer[buffer] for buffer in step.reads if buffer in writer}
            names = sorted({self._name(b) for b in step.reads if b in sent and b not in writer}) if sent else ()
            names = [*names, *({FROM_HOST} if self.from_host.intersection(step.reads) else ())]
            if isinstance(step, Compute):
                tasks.append(Task(index, COMPUTE_LANE, needs=(*sorted(needs | blocking), *names)))
                blocking, last_kernel = set(), index
            elif isinstance(step, HostCopy):
                needs |= {last_kernel} if last_kernel is not None else set()
                tasks.append(Task(index, HOST_LANE, needs=tuple(sorted(needs)), slowdown=0.0))
                calls[index] = Call(())
            else:
                needs |= {place[other] for other in step.issued_after if other in place}
                if last_kernel is not None and _in_program_order(step, self.plan):
                    needs.add(last_kernel)
                held = HELD[step.dispatch.library] if step.dispatch else step.share
                tasks.append(Task(index, step.axis, needs=(*sorted(needs), *names), slowdown=held))
                calls[index] = Call((step.axis,), step.collective == "send_receive")
                if _blocks(step, self.plan):
                    blocking.add(index)
            writer |= {buffer.id: index for buffer in step.writes}
        return tuple(tasks), calls, frozenset(tasks[index].lane for index in blocking)

    def _name(self, buffer: int) -> str:
        """What other runs and sections call the arrival of a buffer."""
        return f"{self.name} {self.names.get(buffer, buffer)}"

    def _exports(self, section: Section, later: Sequence[Section]) -> dict[str, int]:
        """Arrivals that later sections of the pass wait for, or the next run of the section."""
        steps = enumerate(section.instructions)
        fetched = [index for index, step in steps if isinstance(step, HostCopy) and step.writes]
        from_host = {FROM_HOST: fetched[0]} if fetched else {}
        if not later and not section.carried:
            return from_host
        wanted = {buffer for other in later for step in other.instructions for buffer in step.reads}
        wanted |= {left for _, left in section.carried}
        return from_host | {
            self._name(buffer.id): index
            for index, step in enumerate(section.instructions)
            if isinstance(step, Communication)
            for buffer in step.writes
            if buffer.id in wanted
        }

    # Buffers

    def _read(self, sections: Sequence[Section]) -> set[int]:
        """Buffers that sections read, by their memory."""
        return {self.roots[buffer] for s in sections for step in s.instructions for buffer in step.reads}

    def _buffer_uses(
        self,
        section: Section,
        outside: Sequence[Buffer],
        later: set[int],
        handed_on: Sequence[int],
        freed: Collection[int] = (),
    ) -> dict[int, BufferUse]:
        """Buffers of a section by their number in the program, those that it finds first; `freed` at its end.

        A run finds what the run before it left; all else that it finds, the next run finds, too.
        """
        steps = section.instructions
        readers: dict[int, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            for buffer in step.reads:
                readers[self.roots[buffer]].append(index)
        for buffer in freed:
            readers[buffer].append(len(steps) - 1)
        written = [(b, i) for i, step in enumerate(steps) for b in step.writes if b.alias_of is None]
        own = {b.id for b, _ in written} | {b.id for b in outside}
        inherited = sorted({*readers, *handed_on} - own)
        found: list[tuple[Buffer, int | None]] = [(buffer, None) for buffer in outside]
        found += [(self.buffers[number], None) for number in inherited]
        if section.count > 1:
            replaced = {self.roots[number] for number, _ in section.carried}
            later = later | ({*inherited} - replaced) | {self.roots[left] for _, left in section.carried}
        return {
            b.id: BufferUse(
                b.tensor, b.category, writer, tuple(readers[b.id]), b.id in later or b.category == "gradients"
            )
            for b, writer in (*found, *written)
        }


def _serial(step: Communication, plan: Plan) -> bool:
    return step.axis == "tp" and step.purpose != "input" and not plan.tp_backward_overlap and step.step_of is None


def _in_program_order(step: Communication, plan: Plan) -> bool:
    """Issued after the kernel before it, whatever it reads."""
    return _serial(step, plan) or (step.purpose == "regather" and not step.issued_after)


def _blocks(step: Communication, plan: Plan) -> bool:
    waited_for = step.axis == "ulysses" or (step.axis == "tp" and step.purpose == "input" and step.share is None)
    return _serial(step, plan) or waited_for


def _sent(sections: Sequence[Section]) -> frozenset[int]:
    """Buffers that communications write."""
    steps = (step for section in sections for step in section.instructions)
    return frozenset(b.id for step in steps if isinstance(step, Communication) for b in step.writes)


def _label(step: Instruction) -> TaskInfo:
    """What the task of an instruction is, without sizes and without a layer."""
    if isinstance(step, Compute):
        return TaskInfo(step.operator, step.kind, step.part)
    if isinstance(step, HostCopy):
        return TaskInfo(step.operator, "communication", step.part, OFFLOAD)
    return TaskInfo(step.operator, "communication", step.part, step.purpose, collective=step.collective, axis=step.axis)


def task_info(step: Instruction, layer: int | None = None, micro_batch: int | None = None) -> TaskInfo:
    """What the task of an instruction is."""
    if isinstance(step, Compute):
        flops = sum(work.flops for work in step.work if work) // len(step.work)
        return TaskInfo(step.operator, step.kind, step.part, layer=layer, micro_batch=micro_batch, flops=flops)
    if isinstance(step, HostCopy):
        return TaskInfo(
            step.operator, "communication", step.part, OFFLOAD, layer, micro_batch, message_bytes=step.message_bytes
        )
    return TaskInfo(
        step.operator, "communication", step.part, step.purpose, layer, micro_batch, step.collective, step.axis,
        step.message_bytes, step.sent_bytes,
    )  # fmt: skip
