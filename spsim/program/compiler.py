"""Compiles the operators of a layer under a plan: the rules of placement, and nothing per strategy.

Each operator is split along one dimension or none on each axis; what it needs and leaves follows
(`operators`), and where two layouts differ a redistribution is inserted. In the backward pass gradients
have the dual layouts; the ones with equal layout are summed before they move.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from spsim.inputs.plan import Plan
from spsim.program.instructions import (
    Buffer,
    Category,
    Communication,
    Compute,
    Instruction,
    Part,
    Program,
    Purpose,
    Saved,
    Section,
    WeightSync,
)
from spsim.program.kernels import Kernels
from spsim.program.mesh import Mesh
from spsim.program.operators import (
    Operand,
    Operator,
    Splits,
    Tensor,
    input_gradient_layout,
    input_layout,
    operator_splits,
    output_gradient_layout,
    output_layout,
)
from spsim.program.placement import (
    Layout,
    Partial,
    Redistribution,
    Shard,
    local_bytes,
    local_elements,
    message_bytes,
    redistribute,
    sent_bytes,
)
from spsim.program.strategies import split_rules
from spsim.work import MemoryBound, Work

Key = tuple[str, Layout, str]
"""(tensor, layout, generation): a recomputed or gathered-again tensor is another buffer."""


def compile_program(operators: Sequence[Operator], plan: Plan, mesh: Mesh, *, causal: bool) -> Program:
    """The program of one layer; ring attention is a gather here, until `lowering.lower_ring`."""
    compiler = _Compiler(operators, plan, mesh, causal)
    return categorise(compiler.compile())


def recomputed(operators: Iterable[Operator], plan: Plan) -> frozenset[str]:
    """Operators that run again in the backward pass: selective takes those that mix positions, full all
    (Korthikanti et al. 2022, section 5).
    """
    if plan.recompute == "none":
        return frozenset()
    return frozenset(op.name for op in operators if plan.recompute == "full" or op.mixes_positions)


def _from_outside(operators: Sequence[Operator]) -> tuple[Tensor, ...]:
    """Activations that no operator makes, in the order in which they are read."""
    made = {output.tensor.name for op in operators for output in op.outputs}
    read = (operand.tensor for op in operators for operand in op.activations)
    return tuple({tensor.name: tensor for tensor in read if tensor.name not in made}.values())


def _to_outside(operators: Sequence[Operator]) -> tuple[Tensor, ...]:
    """Activations that no operator reads."""
    read = {operand.tensor.name for op in operators for operand in op.inputs}
    return tuple(o.tensor for op in operators for o in op.results if o.tensor.name not in read)


class _Compiler:
    """State of one compilation: the steps so far, and which buffer holds which tensor in which layout."""

    def __init__(self, operators: Sequence[Operator], plan: Plan, mesh: Mesh, causal: bool) -> None:
        self.operators = operators
        self.plan = plan
        self.mesh = mesh
        self.causal = causal
        self.rules = split_rules(plan)
        self.entries, self.exits = _from_outside(operators), _to_outside(operators)
        # What comes from outside is placed as any output of an operator that does not mix positions.
        sources = (Operator(entry.name, "elementwise", (), (Operand(entry, entry.dims),)) for entry in self.entries)
        every = (*sources, *operators)
        self.splits: dict[str, Splits] = {op.name: operator_splits(op, self.rules, mesh) for op in every}
        self.kernels = {op.name: Kernels(op, self.splits[op.name], mesh) for op in operators}
        self.recomputed = self.to_recompute = recomputed(operators, plan)
        self.producers = {o.tensor.name: (op, o) for op in every for o in op.outputs}
        self.produced = {
            name: output_layout(output, self.splits[op.name]) for name, (op, output) in self.producers.items()
        }
        self.part: Part = "forward"
        self.steps: list[Instruction] = []
        self.values: dict[Key, Buffer] = {}
        self.gradients: dict[str, list[tuple[Layout, Buffer]]] = defaultdict(list)
        self.collected: dict[str, Buffer] = {}
        self.num_buffers = 0
        self.num_steps = 0

    def compile(self) -> Program:
        """Forward, then backward from the gradient of the layer output."""
        entries = tuple(self._hold(entry, self.produced[entry.name], "forward") for entry in self.entries)
        for op in self.operators:
            self._run_forward(op, "forward")
        forward, self.steps = Section(tuple(self.steps)), []
        outputs = tuple(self.values[exit_.name, self.produced[exit_.name], "forward"] for exit_ in self.exits)
        output_gradients = tuple(map(self._gradient_from_outside, self.exits, outputs))
        self._run_backward_pass()
        return Program(
            forward_sections=(forward,),
            backward_sections=(Section(tuple(self.steps)),),
            input_gradients=tuple(self.collected[entry.name] for entry in self.entries),
            saved=tuple(self._saved()),
            weight_sync=tuple(self._weight_sync()),
            parameters=self._parameters(),
            inputs=entries,
            outputs=outputs,
            output_gradients=output_gradients,
        )

    def _gradient_from_outside(self, tensor: Tensor, output: Buffer) -> Buffer:
        buffer = self._buffer(f"{tensor.name} gradient", output.bytes, "temporary")
        self.gradients[tensor.name].append((self.produced[tensor.name], buffer))
        return buffer

    # Steps and buffers

    def _buffer(self, tensor: str, size: int, category: Category, alias_of: int | None = None) -> Buffer:
        self.num_buffers += 1
        return Buffer(self.num_buffers - 1, tensor, size, category, alias_of)

    def _hold(self, tensor: Tensor, layout: Layout, generation: str) -> Buffer:
        buffer = self._buffer(tensor.name, local_bytes(tensor, layout, self.mesh), "temporary")
        self.values[tensor.name, layout, generation] = buffer
        return buffer

    def _next_step(self) -> int:
        self.num_steps += 1
        return self.num_steps - 1

    def _compute(
        self,
        op: Operator,
        part: Part,
        work: tuple[Work, ...],
        reads: Iterable[Buffer],
        writes: Iterable[Buffer],
    ) -> None:
        read_ids = tuple(dict.fromkeys(buffer.id for buffer in reads))
        kind = "elementwise" if part == "accumulate" else op.kind
        self.steps.append(Compute(self._next_step(), op.name, kind, part, work, read_ids, tuple(writes)))

    def _redistribute(
        self, step: Redistribution, tensor: Tensor, have: Buffer, purpose: Purpose, operator: str
    ) -> Buffer:
        """One collective; an all-reduce works in place, a slice is a view."""
        if step.collective is None:
            return have
        size = local_bytes(tensor, step.target, self.mesh)
        in_place = have.id if step.collective == "all_reduce" else None
        buffer = self._buffer(have.tensor, size, "communication buffers", in_place)
        ranks, message = self.mesh.degree(step.axis), message_bytes(step, tensor, self.mesh)
        sent = sent_bytes(step.collective, message, ranks)
        self.steps.append(
            Communication(
                self._next_step(), operator, tensor.name, step.axis, step.collective, ranks, message, sent,
                purpose, self.part, (have.id,), (buffer,),
            )
        )  # fmt: skip
        return buffer

    def _fetch(
        self, tensor: Tensor, source: Layout, target: Layout, generation: str, purpose: Purpose, op: str
    ) -> Buffer:
        """The buffer of a tensor in a layout; each redistribution happens once per (tensor, target layout)."""
        for step in redistribute(source, target, self.mesh):
            key = (tensor.name, step.target, generation)
            if key not in self.values:
                have = self.values[tensor.name, step.source, generation]
                self.values[key] = self._redistribute(step, tensor, have, purpose, op)
        return self.values[tensor.name, target, generation]

    # Forward

    def _run_forward(self, op: Operator, part: Part) -> None:
        generation = "recompute" if part == "recompute" else "forward"
        reads = [self._fetch_input(op, operand, generation) for operand in op.activations]
        work = self.kernels[op.name].forward(self.causal, self.plan.ring_cut)
        writes = [self._hold(out.tensor, self.produced[out.tensor.name], generation) for out in op.outputs]
        self._compute(op, part, work, reads, writes)

    def _fetch_input(self, op: Operator, operand: Operand, generation: str) -> Buffer:
        source = self.produced[operand.tensor.name]
        return self._fetch(
            operand.tensor, source, input_layout(operand, self.splits[op.name]), generation, "input", op.name
        )

    # What is saved

    def _saved_layout(self, op: Operator, operand: Operand) -> Layout:
        """The layout that the operator consumes; before its trailing all-gathers where it owns the gather."""
        target = input_layout(operand, self.splits[op.name])
        keeps = self.plan.keep_gathered and not op.mixes_positions
        if operand in op.outputs or operand.tensor.name not in op.owns_gather or keeps:
            return target if operand in op.inputs else self.produced[operand.tensor.name]
        steps = redistribute(self.produced[operand.tensor.name], target, self.mesh)
        while steps and steps[-1].collective == "all_gather":
            target = steps.pop().source
        return target

    def _kept(self) -> Iterator[tuple[Operand, Layout, str]]:
        """(operand, layout, operator) of all that survives the forward pass."""
        for op in self.operators:
            if op.name in self.recomputed:
                outside = (o for o in op.activations if self._is_outside(o.tensor.name))
                yield from ((o, self.produced[o.tensor.name], op.name) for o in outside)
            else:
                saved = (o for o in op.inputs + op.outputs if o.tensor.name in op.saves)
                yield from ((o, self._saved_layout(op, o), op.name) for o in saved)

    def _is_outside(self, tensor: str) -> bool:
        """Whether a tensor comes from outside the recomputed operators."""
        inside = {o.tensor.name for op in self.operators if op.name in self.recomputed for o in op.outputs}
        return tensor not in inside

    def _saved(self) -> Iterator[Saved]:
        seen = set()
        for operand, layout, op in self._kept():
            tensor = operand.tensor
            if (tensor.name, layout) not in seen:
                seen.add((tensor.name, layout))
                yield Saved(tensor.name, layout, local_bytes(tensor, layout, self.mesh), tensor.kind, op)

    # Backward

    def _run_backward_pass(self) -> None:
        """A gradient moves to where its producer needs it as soon as its last summand is there."""
        self.part = "backward"
        for exit_ in self.exits:
            self._collect_gradient(exit_)
        last_summand = {o.tensor.name: op for op in reversed(self.operators) for o in op.activations}
        for op in reversed(self.operators):
            self._recompute_for(op)
            self._run_backward(op)
            for operand in op.activations:
                if last_summand[operand.tensor.name] is op:
                    self._collect_gradient(operand.tensor)

    def _recompute_for(self, op: Operator) -> None:
        """Run the recomputed operators again, with the communication on both their sides, before the first of
        them gets its gradient.
        """
        if op.name not in self.to_recompute:
            return
        self.to_recompute = frozenset()
        self.part = "recompute"
        again = [op for op in self.operators if op.name in self.recomputed]
        for op in again:
            for operand in op.activations:
                if self._is_outside(operand.tensor.name):
                    layout = self.produced[operand.tensor.name]
                    self.values[operand.tensor.name, layout, "recompute"] = self.values[
                        operand.tensor.name, layout, "forward"
                    ]
            self._run_forward(op, "recompute")
        inside = {o.tensor.name for op in again for o in op.results}
        for op in self.operators:
            for operand in op.activations:
                if op.name not in self.recomputed and operand.tensor.name in inside:
                    self._fetch_input(op, operand, "recompute")
        self.part = "backward"

    def _run_backward(self, op: Operator) -> None:
        gradients = [self.collected[o.tensor.name] for o in op.results]
        saved = self._read_saved(op)
        if op.kind == "gemm":
            self._run_gemm_backward(op, gradients, saved)
            return
        for operand in op.activations:
            if operand.tensor.name in op.passthrough:
                self._add_gradient(op, operand, gradients[0])
        work = self.kernels[op.name].backward(self.causal, self.plan.ring_cut)
        if work:
            targets = [o for o in op.activations if o.tensor.name not in op.passthrough]
            writes = [self._gradient_of(op, operand) for operand in targets]
            self._compute(op, "backward", work, [*gradients, *saved.values()], writes)

    def _run_gemm_backward(self, op: Operator, gradients: list[Buffer], saved: dict[str, Buffer]) -> None:
        """Data gradients first, then the weight gradient: Megatron's order, which hides communication."""
        for operand, work in self.kernels[op.name].data_gradients():
            others = [] if op.weights else [b for name, b in saved.items() if name != operand.tensor.name]
            self._compute(op, "dgrad", (work,), [*gradients, *others], [self._gradient_of(op, operand)])
        for weight_work in self.kernels[op.name].weight_gradients():
            inputs = saved.values() if not isinstance(weight_work, MemoryBound) else ()
            self._compute(op, "wgrad", (weight_work,), [*gradients, *inputs], [])

    def _read_saved(self, op: Operator) -> dict[str, Buffer]:
        """What the backward pass of an operator reads of its forward pass, gathered again where it owns that."""
        generation = "recompute" if op.name in self.recomputed else "forward"
        buffers = {}
        for operand in op.inputs + op.outputs:
            tensor = operand.tensor
            if tensor.name not in op.saves:
                continue
            kept = self._saved_layout(op, operand)
            buffers[tensor.name] = buffer = self.values[tensor.name, kept, generation]
            if operand in op.inputs:
                needed = input_layout(operand, self.splits[op.name])
                self.values[tensor.name, kept, "regather"] = buffer
                buffers[tensor.name] = self._fetch(tensor, kept, needed, "regather", "regather", op.name)
        return buffers

    def _gradient_of(self, op: Operator, operand: Operand) -> Buffer:
        layout = input_gradient_layout(operand, self.splits[op.name])
        size = local_bytes(operand.tensor, layout, self.mesh)
        buffer = self._buffer(f"{operand.tensor.name} gradient", size, "temporary")
        self._add_gradient(op, operand, buffer)
        return buffer

    def _add_gradient(self, op: Operator, operand: Operand, buffer: Buffer) -> None:
        layout = input_gradient_layout(operand, self.splits[op.name])
        self.gradients[operand.tensor.name].append((layout, buffer))

    def _collect_gradient(self, tensor: Tensor) -> None:
        """The gradient of a tensor as its producer needs it: equal layouts summed, then moved, then summed."""
        producer, output = self.producers[tensor.name]
        self._recompute_for(producer)
        required = output_gradient_layout(output, self.splits[producer.name])
        groups: dict[Layout, list[Buffer]] = defaultdict(list)
        for layout, buffer in self.gradients.pop(tensor.name):
            groups[layout].append(buffer)
        moved = []
        for layout, buffers in groups.items():
            total = self._sum(tensor, layout, buffers)
            for step in redistribute(layout, required, self.mesh, backward=True):
                total = self._redistribute(step, tensor, total, "gradient", producer.name)
            moved.append(total)
        self.collected[tensor.name] = self._sum(tensor, required, moved)

    def _sum(self, tensor: Tensor, layout: Layout, buffers: list[Buffer]) -> Buffer:
        """n - 1 additions, as autograd accumulates a tensor with n consumers."""
        total, size = buffers[0], local_bytes(tensor, layout, self.mesh)
        adder = Operator(f"{tensor.name} gradient", "elementwise", (), ())
        for other in buffers[1:]:
            result = self._buffer(f"{tensor.name} gradient", size, "temporary")
            self._compute(adder, "accumulate", (MemoryBound("elementwise", 3 * size, "add"),), [total, other], [result])
            total = result
        return total

    # Weights

    def _weight_sync(self) -> Iterator[WeightSync]:
        """Weights used whole by a split operator, and KV weights replicated over part of the tp axis."""
        for op in self.operators:
            splits = self.splits[op.name]
            for weight in op.weights:
                layout = input_gradient_layout(weight, splits)
                elements = local_elements(weight.tensor, input_layout(weight, splits), self.mesh)
                partial = tuple(axis for axis, placement in layout if isinstance(placement, Partial))
                outer = tuple(axis for axis in partial if axis != "tp")
                if outer:
                    yield WeightSync(weight.tensor.name, outer, self.mesh.size(outer), elements)
                copies = self.mesh.degree("tp") if "tp" in partial else self._copies(weight.tensor, layout)
                if copies > 1:
                    yield WeightSync(weight.tensor.name, ("tp",), copies, elements)

    def _copies(self, tensor: Tensor, layout: Layout) -> int:
        """Ranks of the tp axis that hold the same heads, where there are fewer heads than ranks."""
        for axis, placement in layout:
            if axis == "tp" and isinstance(placement, Shard):
                return max(1, self.mesh.degree(axis) // tensor.sizes[tensor.dims.index(placement.dim)])
        return 1

    def _parameters(self) -> int:
        return sum(
            local_elements(weight.tensor, input_layout(weight, self.splits[op.name]), self.mesh)
            for op in self.operators
            for weight in op.weights
        )


def categorise(program: Program) -> Program:
    """Forward buffers that the backward pass reads are activations, and so is the chain of layer inputs."""
    read = {buffer for step in program.backward for buffer in step.reads}
    roots = {b.id: b.alias_of for step in program.forward for b in step.writes if b.alias_of is not None}
    kept = read | {roots[buffer] for buffer in read if buffer in roots}

    def name(buffer: Buffer, kept_here: bool) -> Buffer:
        return replace(buffer, category="activations") if kept_here else buffer

    inputs = tuple(name(entry, entry.id in kept) for entry in program.inputs)
    chained = any(entry.category == "activations" for entry in inputs)
    handed_on = {output.id for output in program.outputs} if chained else set()

    def of_section(section: Section) -> Section:
        return replace(
            section,
            instructions=tuple(
                replace(step, writes=tuple(name(b, b.id in kept or b.id in handed_on) for b in step.writes))
                for step in section.instructions
            ),
        )

    return replace(
        program,
        forward_sections=tuple(map(of_section, program.forward_sections)),
        inputs=inputs,
        outputs=tuple(name(output, output.id in kept or chained) for output in program.outputs),
    )
