"""The program of a traced module under a plan that splits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spsim.errors import InputError
from spsim.inputs.plan import Plan
from spsim.program.assembly import program_in
from spsim.program.instructions import Compute, Instruction, Program, Section
from spsim.program.mesh import mesh_of
from spsim.program.operators import Operator, operator_splits
from spsim.program.placement import Extent
from spsim.program.region import Region
from spsim.program.strategies import split_rules
from spsim.pytorch.modules.emission import OUTPUT
from spsim.pytorch.modules.gradients import with_gradients
from spsim.work import Gemm


def split_forward(operators: Sequence[Operator], plan: Plan, *, causal: bool) -> Program:
    """The program of one rank, forward only. Raises `InputError` where a dimension does not divide."""
    _check_divisibility(operators, plan, causal)
    region = Region(operators, split_rules(plan), mesh_of(plan))
    program = program_in(region, plan, causal=causal, forward_only=True)
    return replace(program, forward_sections=tuple(map(_sections_as_torch, program.forward_sections)))


def split_program(operators: Sequence[Operator], plan: Plan, *, causal: bool, input_gradient: bool) -> Program:
    """The program of one rank. torch writes a weight gradient in the dtype of the weight, so that nothing is
    accumulated in fp32; without `input_gradient` the kernels that only lead to it are left out.

    Raises `InputError` where a dimension does not divide.
    """
    _check_divisibility(operators, plan, causal)
    region = Region(operators, split_rules(plan), mesh_of(plan))
    program = program_in(region, plan, causal=causal)
    if not input_gradient:
        program = _without_input_gradient(program, {op.name for op in operators if op.weights})
    passes = (program.forward_sections, program.backward_sections)
    forward, backward = (tuple(map(_sections_as_torch, sections)) for sections in passes)
    handed_on = Compute(
        1 + max(step.id for step in program.instructions), "input", "elementwise", "backward", (None,),
        tuple(gradient.id for gradient in program.input_gradients), (),
    )  # fmt: skip
    program = replace(program, forward_sections=forward, backward_sections=(*backward, Section((handed_on,))))
    return with_gradients(program, {op.name: sum(weight.bytes for weight in op.weights) for op in region.operators})


def _sections_as_torch(section: Section) -> Section:
    return replace(section, instructions=tuple(map(_as_torch, section.instructions)))


def _as_torch(step: Instruction) -> Instruction:
    if not isinstance(step, Compute):
        return step
    if step.operator == OUTPUT:  # nothing runs: the caller gets the buffer
        return replace(step, work=(None,), writes=tuple(replace(b, alias_of=step.reads[0]) for b in step.writes))
    return replace(step, work=tuple(replace(w, accumulated=0) if isinstance(w, Gemm) else w for w in step.work))


def _without_input_gradient(program: Program, with_weights: set[str]) -> Program:
    """Drop, from the last on, what writes nothing that is read and sums no gradient of a weight."""
    read: set[int] = set()
    kept: list[Instruction] = []
    for step in reversed(program.backward):
        sums = isinstance(step, Compute) and (
            step.part == "wgrad" or (step.part == "backward" and step.operator in with_weights)
        )
        if sums or any(buffer.id in read for buffer in step.writes):
            read |= set(step.reads)
            kept.append(step)
    return replace(program, backward_sections=(Section(tuple(kept[::-1])),), input_gradients=program.output_gradients)


def _check_divisibility(operators: Sequence[Operator], plan: Plan, causal: bool) -> None:
    """Every dimension divides by the ranks that it is split over; a causal zigzag ring takes two chunks a rank.
    Heads of K and V that are fewer than the ranks are replicated.
    """
    mesh, rules = mesh_of(plan), split_rules(plan)
    heads = max((op.extents.get("a", 1) for op in operators), default=1)
    for op in operators:
        if plan.ring > 1 and plan.ring_kind != "all_gather" and op.mixes_positions and op.kind != "attention":
            raise InputError(
                f"plan: ring_kind = {plan.ring_kind!r} needs scaled_dot_product_attention, but {op.name} holds all "
                "scores; use it, or ring_kind = 'all_gather'"
            )
        parts: dict[str, int] = {}
        for axis, dim in operator_splits(op, rules, mesh):
            if dim is not None:
                parts[dim] = parts.get(dim, 1) * mesh.degree(axis)
        if plan.ring > 1 and plan.ring_cut == "zigzag" and causal and "s" in parts:
            parts["s"] *= 2
        for dim, degree in parts.items():
            _check_dimension(op, dim, degree, heads)


def _check_dimension(op: Operator, dim: str, degree: int, heads: Extent) -> None:
    for operand in op.inputs + op.outputs:
        if dim in operand.subscript:
            size = operand.tensor.sizes[operand.subscript.index(dim)]
            fewer = dim == "a" and degree % size == 0 and size < heads
            if size % degree and not fewer:
                raise InputError(
                    f"plan: {op.name} is split over {degree} ranks along {dim}, whose size {size} they do not divide; "
                    "use smaller degrees or other sizes"
                )
