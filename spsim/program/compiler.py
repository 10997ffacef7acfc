"""Compiles the operators of a block under a plan: the rules of placement, and nothing per strategy.

Each operator is split along one dimension or none on each axis; what it needs and leaves follows
(`placed`), and where two layouts differ a redistribution is inserted. In the backward pass gradients
have the dual layouts; the ones with equal layout are summed before they move, unless each reader moves its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from spsim.inputs.plan import Plan
from spsim.program.casts import SCALE_BYTES, Reading
from spsim.program.categories import categorise
from spsim.program.instructions import (
    Buffer,
    Category,
    Communication,
    Compute,
    Instruction,
    Part,
    Program,
    Purpose,
    Section,
)
from spsim.program.kernels import Kernels, Product
from spsim.program.operators import Tensor
from spsim.program.placed import PlacedOperand, PlacedOperator
from spsim.program.placement import Layout, sent_bytes
from spsim.program.recompute import LayerKind, Recomputed, needed, recomputed, usual_kind
from spsim.program.region import Move, Region
from spsim.program.rows import copies_before, copies_behind
from spsim.program.saving import Saving
from spsim.work import KernelClass, MemoryBound, Work

AT_REST = -1
"""Number of what is no buffer of the program: weights are there for the whole step."""
Key = tuple[str, Layout, str]
"""(tensor, layout, generation): a recomputed or gathered-again tensor is another buffer."""


def compile_region(
    region: Region, plan: Plan, *, causal: bool, keep_weights: bool = False, kind: LayerKind | None = None,
    forward_only: bool = False,
) -> Program:  # fmt: skip
    """The program of a block for plans with the degrees of its mesh; ring attention is a gather here, until
    `lowerings.ring.lower_ring`.

    With `keep_weights` weights that the forward pass gathers stay for the backward pass, which else gathers them again
    (`reshard_after_forward` of FSDP2). `kind` says what of the block is recomputed, else the plan does. `forward_only`
    there is no backward pass, and nothing is kept for one.
    """
    again = recomputed([op.operator for op in region.operators], kind or usual_kind(plan))
    compiler = _Compiler(region, plan, causal, keep_weights, again)
    return compiler.compile_forward() if forward_only else categorise(compiler.compile(), region.resting.keys())


class _Compiler:
    """State of one compilation: the instructions so far, and which buffer holds which tensor in which layout."""

    def __init__(
        self, region: Region, plan: Plan, causal: bool, keep_weights: bool, again: tuple[Recomputed, ...]
    ) -> None:
        self.region = region
        self.operators = region.operators
        self.plan = plan
        self.causal = causal
        self.keep_weights = keep_weights
        self.to_recompute = again
        self.saving = Saving(region, again, keep_gathered=plan.keep_gathered)
        self.part: Part = "forward"
        self.instructions: list[Instruction] = []
        self.values: dict[Key, Buffer] = {
            (weight.name, weight.layout, generation): Buffer(AT_REST, weight.name, weight.bytes, "temporary")
            for weight in region.resting.values()
            for generation in ("forward", "regather")
        }
        self.gradients: dict[str, list[tuple[Layout, Buffer]]] = defaultdict(list)
        self.collected: dict[str, Buffer] = {}
        self.num_buffers = 0
        self.num_instructions = 0

    def compile(self) -> Program:
        """Forward, then backward from the gradient of the block's output."""
        made = self.compile_forward()
        output_gradients = tuple(map(self._gradient_from_outside, self.region.exits, made.outputs))
        self._run_backward_pass()
        return replace(
            made,
            backward_sections=(Section(tuple(self.instructions)),),
            output_gradients=output_gradients,
            input_gradients=tuple(self.collected[e.name] for e in self.region.entries if e.kind == "activation"),
            saved=tuple(self.saving.kept(keep_weights=self.keep_weights)),
            weight_sync=self.region.weight_syncs,
        )

    def compile_forward(self) -> Program:
        """Forward alone, and nothing is kept."""
        region, produced = self.region, self.region.produced
        entries = tuple([self._hold(produced[entry.name], "forward") for entry in region.entries])
        for op in self.operators:
            self._run_forward(op, "forward")
        forward, self.instructions = Section(tuple(self.instructions)), []
        outputs = tuple(self.values[e.name, produced[e.name].layout, "forward"] for e in region.exits)
        return Program(
            (forward,), backward_sections=(), saved=(), weight_sync=(), parameters=region.parameters, inputs=entries,
            outputs=outputs, output_gradients=(), input_gradients=(), weights=region.weight_tensors,
            weight_bytes=region.weight_bytes, weight_casts=region.weight_casts,
            cache_token_bytes=region.cache_token_bytes,
        )  # fmt: skip

    # Instructions and buffers

    def _buffer(self, tensor: str, size: int, category: Category = "temporary", alias_of: int | None = None) -> Buffer:
        self.num_buffers += 1
        return Buffer(self.num_buffers - 1, tensor, size, category, alias_of)

    def _hold(self, output: PlacedOperand, generation: str, over: Buffer | None = None) -> Buffer:
        """The buffer of an output, `over` another where it is written in place."""
        size = 0 if output.tensor.kind == "cache" else output.bytes  # a cache is there for the whole step
        buffer = self._buffer(output.name, size, alias_of=over.root if over else None)
        self.values[output.name, output.layout, generation] = buffer
        return buffer

    def _next(self) -> int:
        self.num_instructions += 1
        return self.num_instructions - 1

    def _compute(
        self, operator: str, kind: KernelClass, part: Part, work: tuple[Work | None, ...], reads: Iterable[Buffer],
        writes: Iterable[Buffer],
    ) -> None:  # fmt: skip
        read = tuple(dict.fromkeys([buffer.id for buffer in reads]))
        self.instructions.append(Compute(self._next(), operator, kind, part, work, read, tuple(writes)))

    def _communicate(self, move: Move, tensor: Tensor, have: Buffer, purpose: Purpose, operator: str) -> Buffer:
        """One collective; an all-reduce works in place, a slice is a view."""
        if (collective := move.collective) is None:
            return have
        if copies_before(self.plan, move) or move.sorts == "before":
            have = self._copy(have, tensor)
        if move.cast_bytes:
            have = self._copy(have, tensor, move.cast_bytes)
        in_place = have.id if collective == "all_reduce" else None
        buffer = self._buffer(have.tensor, move.bytes, "communication buffers", in_place)
        self.instructions.append(
            Communication(
                self._next(), operator, tensor.name, move.axis, collective, move.ranks, move.message_bytes,
                move.sent_bytes, purpose, self.part, () if have.id == AT_REST else (have.id,), (buffer,),
                dispatch=move.dispatch,
            )
        )  # fmt: skip
        if move.cast_bytes:
            buffer = self._copy(buffer, tensor, self.region.bytes_of(tensor, move.target))
        copied = copies_behind(self.plan, move, tensor, self.region.mesh) or move.sorts == "after"
        return self._copy(buffer, tensor) if copied else buffer

    def _copy(self, have: Buffer, tensor: Tensor, size: int | None = None) -> Buffer:
        """In another order of dimensions, or of the tokens of experts; or in a type of another size."""
        copy = self._buffer(have.tensor, have.bytes if size is None else size)
        work = MemoryBound("elementwise", have.bytes + copy.bytes, "copy")
        self._compute(f"{tensor.name} copy", "elementwise", self.part, (work,), [have], [copy])
        return copy

    def _fetch(
        self, tensor: Tensor, source: Layout, target: Layout, generation: str, purpose: Purpose, op: str
    ) -> Buffer:
        """The buffer of a tensor in a layout; each redistribution happens once per (tensor, target layout)."""
        have = self.values[tensor.name, source, generation]
        for move in self.region.moves(tensor, source, target):
            key = (tensor.name, move.target, generation)
            if key not in self.values:
                self.values[key] = self._communicate(move, tensor, have, purpose, op)
            have = self.values[key]
        return have

    # Forward

    def _run_forward(self, op: PlacedOperator, part: Part) -> None:
        generation = "recompute" if part == "recompute" else "forward"
        reads = [self._fetch_input(op, operand, generation) for operand in op.handed_over]
        reads += [self._fetch_weight(op, weight) for weight in op.gathered]
        kernels = self.region.kernels[op.name]
        work = kernels.forward(self.causal, self.plan.ring_cut)
        if not work:  # its outputs are its inputs
            self.values |= {(o.name, o.layout, generation): b for o, b in zip(op.outputs, reads, strict=False)}
            return
        if isinstance(kernels, Product):
            self._prepare(op, kernels, "forward", dict(zip([o.name for o in op.activations], reads, strict=False)))
        self._lead(op, kernels, part, reads)
        reads += self._search(op, kernels, part, reads)
        over = {op.outputs[0].name: reads[0]} if op.operator.in_place else {}
        writes = [self._hold(output, generation, over.get(output.name)) for output in op.outputs]
        self._compute(op.name, op.operator.kind, part, work, reads, writes)

    def _lead(self, op: PlacedOperator, kernels: Kernels, part: Part, reads: Sequence[Buffer]) -> None:
        """Kernels of an operator before the one that writes its outputs; what they write themselves is not counted."""
        for work in kernels.leading(backward=part == "backward"):
            self._compute(op.name, op.operator.kind, part, (work,), reads, ())

    def _search(self, op: PlacedOperator, kernels: Kernels, part: Part, reads: Sequence[Buffer]) -> list[Buffer]:
        """The scale of a cast, if it is searched for or ranks agree on it: they cast parts of one tensor."""
        found: list[Buffer] = []
        for work in kernels.before:
            found = [self._buffer(f"{op.name} scale", SCALE_BYTES)]
            self._compute(op.name, op.operator.kind, part, (work,), reads, found)
        for axis in kernels.agreed:
            have, ranks = found or reads, self.region.mesh.degree(axis)
            found = [self._buffer(f"{op.name} scale", SCALE_BYTES, "communication buffers")]
            self.instructions.append(
                Communication(
                    self._next(), op.name, found[0].tensor, axis, "all_reduce", ranks, SCALE_BYTES,
                    sent_bytes("all_reduce", SCALE_BYTES, ranks), "gradient" if part == "backward" else "input",
                    self.part, (have[0].id,), tuple(found),
                )
            )  # fmt: skip
        return found

    def _prepare(self, op: PlacedOperator, kernels: Product, reading: Reading, read: dict[str, Buffer]) -> None:
        """Kernels that cast operands need before a product of `op` reads them; copies that they make take the place of
        what they are made of.
        """
        part: Part = self.part if reading == "forward" else reading
        for name, works, size in kernels.prepared(reading):
            source = read[name]
            for work in works[:-1]:
                self._compute(op.name, "cast", part, (work,), [source], ())
            if size:
                read[name] = self._buffer(f"{name} for {reading}", size)
            self._compute(op.name, "cast", part, works[-1:], [source], [read[name]] if size else ())

    def _fetch_input(self, op: PlacedOperator, operand: PlacedOperand, generation: str) -> Buffer:
        source = self.region.produced[operand.name].layout
        return self._fetch(operand.tensor, source, operand.layout, generation, "input", op.name)

    def _fetch_weight(self, op: PlacedOperator, weight: PlacedOperand) -> Buffer:
        """A weight that rests in another layout. Recomputation and the backward pass gather it again, once for both."""
        again = self.part != "forward" and not self.keep_weights
        generation = "regather" if again else "forward"
        purpose: Purpose = "regather" if again else "input"
        rests = self.region.resting[weight.name].layout
        return self._fetch(weight.tensor, rests, weight.layout, generation, purpose, op.name)

    # Backward

    def _gradient_from_outside(self, tensor: Tensor, output: Buffer) -> Buffer:
        buffer = self._buffer(f"{tensor.name} gradient", output.bytes)
        self.gradients[tensor.name].append((self.region.produced[tensor.name].layout, buffer))
        return buffer

    def _run_backward_pass(self) -> None:
        """A gradient moves to where its producer needs it as soon as its last summand is there."""
        self.part = "backward"
        for exit_ in self.region.exits:
            self._collect_gradient(exit_)
        for op in reversed(self.operators):
            self._recompute_for(op.name, discarded=not (self.plan.recompute_reentrant or op.saved))
            self._run_backward(op)
            for operand in self._in_turn(op):
                if self.plan.input_gradients == "each":
                    self._move_gradient(operand.tensor)
                if self.region.last_summand[operand.name] is op:
                    self._collect_gradient(operand.tensor)

    def _in_turn(self, op: PlacedOperator) -> tuple[PlacedOperand, ...]:
        """The inputs of an operator in the order in which their gradients move."""
        reverse = self.plan.ulysses > 1 and op.operator.mixes_positions and self.plan.ulysses_gradients == "reverse"
        return op.differentiated[::-1] if reverse else op.differentiated

    def _recompute_for(self, operator: str, *, discarded: bool = False) -> None:
        """What has to run again before an operator gets the gradient of its output; or of it what was discarded."""
        for own in [own for own in self.to_recompute if operator in own.before and own.discards >= discarded]:
            self.to_recompute = tuple([other for other in self.to_recompute if other is not own])
            self.part = "recompute"
            self._recompute(own)
            self.part = "backward"

    def _recompute(self, own: Recomputed) -> None:
        """Run operators again, with the communication on both their sides unless results are discarded: then the
        backward pass moves them.
        """
        again = [op for op in self.operators if op.name in own.operators]
        stops = self.plan.recompute_early_stop and not own.discards
        count = needed([op.operator for op in again]) if stops else len(again)
        made = {output.name for op in again[:count] for output in op.outputs}
        for place, op in enumerate(again[: count + 1]):
            for operand in op.handed_over:
                if self.saving.inside.get(operand.name) is not own:
                    layout = self.region.produced[operand.name].layout
                    found = self.values[operand.name, layout, "forward"]
                    self.values.setdefault((operand.name, layout, "recompute"), found)
            if place < count:
                self._run_forward(op, "recompute")
            elif op.saved:
                for operand in op.handed_over:
                    self._fetch_input(op, operand, "recompute")
        for op in (op for op in self.operators if op.name not in own.operators and not own.discards):
            for operand in op.activations:
                if self.saving.inside.get(operand.name) is own and operand.name in made:
                    self._fetch_input(op, operand, "recompute")

    def _run_backward(self, op: PlacedOperator) -> None:
        if not op.operator.has_backward:
            return
        gradients = [self.collected[output.name] for output in op.results]
        saved, kernels = self._read_saved(op), self.region.kernels[op.name]
        weights = [self._fetch_weight(op, weight) for weight in op.gathered]
        if isinstance(kernels, Product):
            self._run_product_backward(op, kernels, gradients, saved, weights)
            return
        passthrough = op.operator.passthrough
        writes: list[Buffer] = []
        if work := kernels.backward(self.causal, self.plan.ring_cut):
            scale = self._search(op, kernels, "backward", gradients)
            reads = [*gradients, *saved.values(), *weights, *scale]
            self._lead(op, kernels, "backward", reads)
            over = saved.get(op.outputs[0].name) if op.operator.in_place else None
            writes = [self._gradient_of(o, over) for o in op.differentiated if o.name not in passthrough]
            accumulated = kernels.accumulation if not op.gathered else ()
            apart = [self._buffer(f"{w.name} gradient", w.bytes) for w in op.weights if accumulated]
            self._compute(op.name, op.operator.kind, "backward", work, reads, [*writes, *apart])
            for added in accumulated:
                self._compute(op.name, "elementwise", "accumulate", (added,), apart, ())
        # Of several results, what the kernel makes of their gradients.
        passed = writes if writes and len(gradients) > 1 else gradients
        for operand in op.activations:
            if operand.name in passthrough:
                self.gradients[operand.name].append((operand.gradient, passed[0]))

    def _run_product_backward(
        self, op: PlacedOperator, kernels: Product, gradients: list[Buffer], saved: dict[str, Buffer],
        weights: list[Buffer],
    ) -> None:  # fmt: skip
        """Data gradients first, then the weight gradient: Megatron's order, which hides communication."""
        made = dict(zip([output.name for output in op.results], gradients, strict=True))
        if op.operator.recipe:
            self._prepare(op, kernels, "dgrad", made)
        for operand, work in kernels.data_gradients:
            others = weights if op.weights else [b for name, b in saved.items() if name != operand.name]
            self._compute(op.name, "gemm", "dgrad", (work,), [*made.values(), *others], [self._gradient_of(operand)])
        if op.operator.recipe:
            saved |= made
            self._prepare(op, kernels, "wgrad", saved)
            gradients = [saved.pop(output.name) for output in op.results]
        for weight_work in kernels.weight_gradients:
            of_matrices = not isinstance(weight_work, MemoryBound)
            inputs = saved.values() if of_matrices else ()
            writes = [self._gradient_of(w) for w in op.gathered if (w in kernels.matrices) == of_matrices]
            self._compute(op.name, "gemm", "wgrad", (weight_work,), [*gradients, *inputs], writes)

    def _read_saved(self, op: PlacedOperator) -> dict[str, Buffer]:
        """What the backward pass of an operator reads of its forward pass, gathered again where it owns that."""
        buffers = {}
        for operand, kept in self.saving.saved[op.name]:
            generation = "recompute" if op.name in self.saving.recomputed else "forward"
            if self.saving.discarded(operand) and op.name not in self.saving.recomputed:
                generation, kept = "recompute", self.region.produced[operand.name].layout
            self.values[operand.name, kept, "regather"] = self.values[operand.name, kept, generation]
            needed = self._fetch(operand.tensor, kept, operand.layout, "regather", "regather", op.name)
            buffers[operand.name] = needed
        return buffers

    def _gradient_of(self, operand: PlacedOperand, over: Buffer | None = None) -> Buffer:
        buffer = self._buffer(f"{operand.name} gradient", operand.gradient_bytes, alias_of=over.root if over else None)
        self.gradients[operand.name].append((operand.gradient, buffer))
        return buffer

    def _collect_gradient(self, tensor: Tensor) -> None:
        """The gradient of a tensor as its producer needs it."""
        self._recompute_for(self.region.producers[tensor.name], discarded=not self.plan.recompute_reentrant)
        self._move_gradient(tensor)
        ((_, self.collected[tensor.name]),) = self.gradients.pop(tensor.name)

    def _move_gradient(self, tensor: Tensor) -> None:
        """What is there of the gradient of a tensor: equal layouts summed, then moved to its producer, then summed."""
        producer, required = self.region.producers[tensor.name], self.region.produced[tensor.name].gradient
        groups: dict[Layout, list[Buffer]] = defaultdict(list)
        for layout, buffer in self.gradients[tensor.name]:
            groups[layout].append(buffer)
        moved = []
        for layout, buffers in groups.items():
            total = self._sum(tensor, layout, buffers)
            for move in self.region.moves(tensor.gradient, layout, required, backward=True):
                total = self._communicate(move, tensor, total, "gradient", producer)
            moved.append(total)
        self.gradients[tensor.name] = [(required, self._sum(tensor, required, moved))]

    def _sum(self, tensor: Tensor, layout: Layout, buffers: list[Buffer]) -> Buffer:
        """n - 1 additions, as autograd accumulates a tensor with n consumers."""
        if len(buffers) == 1:
            return buffers[0]
        total, name = buffers[0], f"{tensor.name} gradient"
        for other in buffers[1:]:
            size = self.region.bytes_of(tensor.gradient, layout)
            read, total = [total, other], self._buffer(name, size)
            work = MemoryBound("elementwise", 3 * size, "add")
            self._compute(name, "elementwise", "accumulate", (work,), read, [total])
        return total
