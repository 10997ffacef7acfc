"""Which operators does sequence parallelism apply to? Answered by the rules, operator by operator.

An operator may run on a sequence shard alone when it reads the sequence of every operand at its own
position and does not mix it. Whether a plan places it there is another question: GeLU may, but Megatron
places it on the shard of the MLP width.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from spsim.inputs.effects import notes_of
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.scenario import Shapes
from spsim.inputs.serving_rules import served, serving_notes
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_operators, layer_program, projections
from spsim.program.instructions import Communication, Compute, Program
from spsim.program.mesh import Axis, mesh_of
from spsim.program.operators import LAGGED, Operator, operator_splits
from spsim.program.routing import routing_of
from spsim.program.serving import last_layer
from spsim.program.strategies import named_rules, serving_rules, split_rules

Applies = Literal["yes", "yes, with position offset", "yes, with halo", "no"]

DIMENSION_NAMES = {
    "s": "sequence", "j": "key positions", "b": "micro-batch", "h": "hidden", "a": "heads", "d": "head size",
    "f": "MLP width", "g": "gate", "w": "width of Q, K and V",
    "e": "experts", "k": "a token's experts", "m": "expert width", "u": "shared width",
    "q": "latent of Q", "l": "latent of K and V", "c": "head size of Q and K", "n": "not rotated", "r": "rotated",
    "p": "a token with its probabilities", "x": "all experts", "o": "ranks with experts of a token",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InsertedCommunication:
    """Equal collectives that the rules insert for one operator."""

    part: str
    collective: str
    axis: str
    purpose: str
    """input: for what it reads; regather: the same again in backward; gradient: for the gradient of its output."""
    count: int


@dataclass(frozen=True, slots=True)
class OperatorExplanation:
    """One operator of the layer under one plan; FLOPs and bytes are of one rank, forward, one micro-batch."""

    operator: str
    subscripts: str
    mixes: tuple[str, ...]
    contracts: tuple[str, ...]
    applies: Applies
    why: str
    placed: Mapping[str, str | None]
    """Axis -> the dimension that the operator is split along, or None where every rank does all of it."""
    flops: int
    bytes_moved: int
    saved_bytes_without: int
    saved_bytes_with: int
    communication: tuple[InsertedCommunication, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """The operators of a layer, and what sharding the sequence saves on those that it is applied to."""

    model: str
    plan: str
    """By its label, as `without` and `with_`."""
    without: str
    with_: str
    operators: tuple[OperatorExplanation, ...]
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What of the model is left out, and which options of the plan have no effect."""

    def __repr__(self) -> str:
        return f"Explanation({self.model:.100}, {self.plan:.300}: {len(self.operators)} operators)"

    def to_json(self) -> dict[str, Any]:
        """The document of `explain --json`."""
        return {
            "model": self.model, "without": self.without, "with": self.with_,
            "operators": [asdict(operator) for operator in self.operators], "saved": self.parts,
            "notes": list(self.notes),
        }  # fmt: skip


def applies_alone(operator: Operator) -> tuple[Applies, str]:
    """Whether an operator may run on a sequence shard without the others, and why."""
    if any(operand.tensor.kind == "cache" for operand in operator.outputs):
        return "yes, with position offset", "per position, at its place in the cache"
    if any(operand.tensor.kind == "cache" for operand in operator.inputs):
        return "no", "reads the cache at every position"
    if "s" in operator.mixes:
        return "no", "mixes positions"
    for operand in operator.inputs:
        for dim, read in zip(operand.tensor.dims, operand.subscript, strict=True):
            if dim == "s" and read.startswith(LAGGED):
                halo = operator.extents[read.removeprefix(LAGGED)] - 1
                return "yes, with halo", f"reads the {halo} positions before its own too"
            if dim == "s" and read != "s":
                return "no", f"reads {operand.tensor.name} at every position"
    if any(o.tensor.kind in ("constant", "weight") and "s" in o.subscript for o in operator.inputs):
        return "yes, with position offset", "per position, given its place in the whole sequence"
    if "j" in operator.extents:
        return (
            "yes",
            f"per query{'; mixes its keys, so not on a shard of keys' if 'j' in operator.mixes else ''}",
        )
    details = [f"mixes {_names(operator.mixes)}"] if operator.mixes else []
    details += [f"contracts {_names(operator.contracted)}"] if operator.contracted else []
    return "yes", "; ".join(["per position", *details])


def _names(dims: frozenset[str]) -> str:
    return " and ".join(DIMENSION_NAMES[dim] for dim in sorted(dims))


def explain(
    model: Model | Mapping[str, Any] | str | Path,
    plan: Plan | Mapping[str, Any] | str,
    workload: Workload | Mapping[str, Any],
) -> Explanation:
    """The operator table of a model under a plan; all three may be given as to a `Scenario`.

    Saved bytes are compared between the plan without any sequence sharding and the plan itself; a plan
    that shards no sequence is compared with Megatron sequence parallelism on its tp axis. Raises `InputError`
    where the plan does not fit. Of inference the operators are those of a layer for the last tokens that pass, which
    keep nothing for a backward pass.
    """
    shapes = Shapes(model=model, plan=plan, workload=workload)
    if shapes.workload.phase != "training":
        return _explained_serving(shapes.model, shapes.plan, shapes.workload)
    return _explained(shapes.model, shapes.plan, shapes.workload)


def _explained(model: Model, plan: Plan, workload: Workload) -> Explanation:
    ep = plan.ep if plan.ulysses * plan.ring == 1 else 1  # experts are spread over ranks that it has not
    without = plan.model_copy(update={"sequence_parallel": False, "ulysses": 1, "ring": 1, "ep": ep})
    shards = plan.ulysses * plan.ring > 1 or plan.sequence_parallel
    with_ = plan if shards else plan.model_copy(update={"sequence_parallel": True})
    routing = routing_of(model, plan)
    operators = layer_operators(model, workload, joined=projections(model, plan), routing=routing)
    program = layer_program(model, plan, workload)
    saved = [_saved_by_operator(layer_program(model, p, workload)) for p in (without, with_)]
    splits = _splits(operators, plan)
    rows = tuple(
        _explain_operator(op, program, splits[op.name], saved[0].get(op.name, 0), saved[1].get(op.name, 0))
        for op in operators
    )
    sharded = _splits(operators, with_)
    return Explanation(
        model=model.name, plan=plan.label, without=without.label, with_=with_.label, operators=rows,
        parts=_savings(rows, operators, sharded), notes=notes_of(model, plan),
    )  # fmt: skip


def _explained_serving(model: Model, plan: Plan, workload: Workload) -> Explanation:
    operators, program = last_layer(model, served(plan), workload)
    rules, mesh = serving_rules(plan, workload.phase), mesh_of(plan)
    rows = tuple(_explain_operator(op, program, dict(operator_splits(op, rules, mesh)), 0, 0) for op in operators)
    cache = f"a token of a sequence takes {program.cache_token_bytes:,} bytes of the cache on a rank, in each layer"
    notes = (*notes_of(model, plan), *serving_notes(model, plan, workload), cache)
    return Explanation(model.name, plan.label, plan.label, plan.label, rows, notes=notes)


def _splits(operators: Sequence[Operator], plan: Plan) -> dict[str, dict[Axis, str | None]]:
    """Along which dimension each operator is split on each axis."""
    rules, named, mesh = split_rules(plan), named_rules(plan), mesh_of(plan)
    return {op.name: dict(operator_splits(op, named.get(op.rules, rules), mesh)) for op in operators}


def _saved_by_operator(program: Program) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for saved in program.saved:
        if saved.category in ("activation", "mask"):
            totals[saved.operator] += saved.bytes
    return totals


def _explain_operator(
    op: Operator, program: Program, placed: Mapping[Any, str | None], without: int, with_: int
) -> OperatorExplanation:
    applies, why = applies_alone(op)
    work = [
        item
        for step in program.forward
        if isinstance(step, Compute) and step.operator == op.name and step.part == "forward"
        for item in step.work[:1]
        if item is not None
    ]
    return OperatorExplanation(
        operator=op.name, subscripts=op.subscripts, mixes=tuple(sorted(op.mixes)),
        contracts=tuple(sorted(op.contracted)), applies=applies, why=why, placed=dict(placed),
        flops=sum(item.flops for item in work), bytes_moved=sum(item.bytes_moved for item in work),
        saved_bytes_without=without, saved_bytes_with=with_, communication=tuple(_communication(program, op)),
    )  # fmt: skip


def _communication(program: Program, op: Operator) -> list[InsertedCommunication]:
    """Collectives inserted for an operator, counted."""
    counts: Counter[tuple[str, str, str, str]] = Counter(
        (step.part, step.collective, step.axis, step.purpose)
        for step in program.instructions
        if isinstance(step, Communication) and step.operator == op.name
    )
    return [InsertedCommunication(*key, count) for key, count in counts.items()]


def _savings(
    rows: tuple[OperatorExplanation, ...],
    operators: tuple[Operator, ...],
    splits: Mapping[str, Mapping[Any, str | None]],
) -> dict[str, dict[str, float]]:
    """Saved bytes of the norms and dropouts around the blocks, of the rest, and of the layer."""
    kinds = {op.name: op.kind for op in operators}
    around = {
        name for name, placed in splits.items()
        if kinds[name] in ("norm", "elementwise") and "s" in placed.values()
        and name.startswith(("norm", "residual"))
    }  # fmt: skip
    groups = {
        "norms and dropouts": [row for row in rows if row.operator in around],
        "other operators": [row for row in rows if row.operator not in around],
        "layer": list(rows),
    }
    return {name: _saving(group) for name, group in groups.items() if group}


def _saving(rows: list[OperatorExplanation]) -> dict[str, float]:
    without = sum(row.saved_bytes_without for row in rows)
    with_ = sum(row.saved_bytes_with for row in rows)
    percent = 100 * (1 - with_ / without) if without else 0.0
    return {"without_bytes": without, "with_bytes": with_, "saving_percent": percent}
