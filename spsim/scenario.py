"""The scenario: the only place where hardware, model, plan and workload are checked together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, InstanceOf, field_validator, model_validator

from spsim.configuration import Configuration
from spsim.errors import InputError
from spsim.hardware import HardwareProfile
from spsim.model import Model, load_model
from spsim.plan import Plan, parse_plan
from spsim.profiles import load_profile
from spsim.resources import read_toml
from spsim.workload import Workload

_SINGLE_GPU = Plan()

MAX_MICRO_BATCHES = 100_000
"""Of one step; more take seconds and say nothing new."""


class Scenario(Configuration):
    """One simulation: names and paths are resolved, and the four inputs are known to fit each other."""

    hardware: InstanceOf[HardwareProfile]
    model: InstanceOf[Model]
    plan: InstanceOf[Plan]
    workload: InstanceOf[Workload]
    nodes: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Nodes to spread the GPUs over evenly; the fewest that hold them unless given."""

    def __init__(
        self,
        *,
        hardware: HardwareProfile | str | Path,
        model: Model | Mapping[str, Any] | str | Path,
        plan: Plan | Mapping[str, Any] | str = _SINGLE_GPU,
        workload: Workload | Mapping[str, Any],
        nodes: int | None = None,
    ) -> None:
        """Names, paths and tables are resolved; `InputError` says which rule of which input is broken."""
        super().__init__(hardware=hardware, model=model, plan=plan, workload=workload, nodes=nodes)

    @field_validator("hardware", mode="before")
    @classmethod
    def _load_hardware(cls, value: Any) -> Any:
        return load_profile(value) if isinstance(value, str | Path) else value

    @field_validator("model", mode="before")
    @classmethod
    def _load_model(cls, value: Any) -> Any:
        return load_model(value) if isinstance(value, str | Path) else _from_table(Model, value)

    @field_validator("plan", mode="before")
    @classmethod
    def _load_plan(cls, value: Any) -> Any:
        return parse_plan(value) if isinstance(value, str) else _from_table(Plan, value)

    @field_validator("workload", mode="before")
    @classmethod
    def _load_workload(cls, value: Any) -> Any:
        return _from_table(Workload, value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_shapes(self.model, self.plan, self.workload)
        check_nodes(self)
        self.hardware.peak(self.workload.precision)
        return self

    @property
    def global_batch(self) -> int:
        """Sequences of a step over all replicas."""
        return self.workload.global_batch or self.workload.micro_batch * self.plan.dp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that one replica accumulates in a step."""
        return self.global_batch // (self.workload.micro_batch * self.plan.dp)

    @cached_property
    def gpus_per_node(self) -> int:
        """GPUs of each node that the plan uses."""
        return self.plan.gpus // (self.nodes or fewest_nodes(self))

    @cached_property
    def summary(self) -> tuple[str, ...]:
        """Sequence, micro-batch, ring cut and recomputation, for subtitles."""
        sizes = (f"sequence {self.workload.seq_len:,}", f"micro-batch {self.workload.micro_batch}")
        return (*sizes, *self.plan.summary)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Settings without effect, said once."""
        notes = []
        if self.plan.sequence_parallel and self.plan.tp == 1:
            notes.append("sequence_parallel has no effect with tp = 1")
        return tuple(notes)


def _from_table(kind: type[BaseModel], value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else value


def check_shapes(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules between model, plan and workload, whatever the hardware; `InputError` names the first broken."""
    for check in (_check_scope, _check_heads, _check_widths, _check_sequence, _check_batch):
        check(model, plan, workload)


def _check_scope(model: Model, plan: Plan, workload: Workload) -> None:
    sharded = plan.ulysses * plan.ring > 1 or (plan.sequence_parallel and plan.tp > 1)
    if workload.phase == "decode" and sharded:
        raise InputError(
            f"plan: {plan.label} with phase 'decode': one new token has no sequence to shard; "
            "use tp without sequence_parallel, ulysses or ring"
        )
    pending = (
        (workload, "phase", workload.phase != "training"),
        (workload, "precision", workload.precision == "fp8"),
        (plan, "pp", plan.pp > 1),
        (plan, "virtual_pp", plan.virtual_pp > 1),
        (plan, "dp", plan.dp > 1),
        (plan, "zero", plan.zero > 1),
        (plan, "tp_overlap", plan.tp_overlap and plan.tp > 1),
    )
    for owner, name, used in pending:
        if used:
            value = getattr(owner, name)
            setting = name if value is True else f"{name} = {value!r}"
            raise InputError(f"{setting}: not simulated yet; leave it at its default")


def _check_heads(model: Model, plan: Plan, workload: Workload) -> None:
    degree = plan.tp * plan.ulysses
    if model.heads % degree:
        raise InputError(
            f"plan: tp x ulysses = {degree} does not divide heads = {model.heads}; "
            f"use a divisor of it, such as {math.gcd(model.heads, degree)}"
        )
    if model.kv_heads % degree and degree % model.kv_heads:
        raise InputError(
            f"plan: tp x ulysses = {degree} neither divides kv_heads = {model.kv_heads} nor is a multiple of it; "
            f"use {model.kv_heads} or a divisor of it"
        )
    if model.attention == "unfused" and plan.ring > 1 and plan.ring_kind == "p2p":
        raise InputError(
            "plan: ring_kind = 'p2p' needs attention = 'flash', since an unfused softmax mixes all keys; "
            "use flash attention or ring_kind = 'all_gather'"
        )


def _check_widths(model: Model, plan: Plan, workload: Workload) -> None:
    if model.ffn_hidden % plan.tp:
        raise InputError(
            f"plan: tp = {plan.tp} does not divide ffn_hidden = {model.ffn_hidden}; "
            f"use a divisor of it, such as {math.gcd(model.ffn_hidden, plan.tp)}"
        )


def sequence_unit(model: Model, plan: Plan) -> int:
    """What must divide the sequence length: the product of the sequence shards, twice for a zigzag ring."""
    zigzag = 2 if plan.ring > 1 and plan.ring_cut == "zigzag" and model.causal else 1
    return plan.ulysses * plan.ring * zigzag * (plan.tp if plan.sequence_parallel else 1)


def _check_sequence(model: Model, plan: Plan, workload: Workload) -> None:
    seq_len = workload.seq_len
    unit = sequence_unit(model, plan)
    if seq_len % unit:
        below, above = seq_len // unit * unit, -(-seq_len // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"workload: seq_len = {seq_len} is not divisible by {unit}, the product of the sequence shards "
            f"(x 2 for a zigzag ring); use {near}"
        )


def _check_batch(model: Model, plan: Plan, workload: Workload) -> None:
    unit = workload.micro_batch * plan.dp
    if workload.global_batch is not None and workload.global_batch // unit > MAX_MICRO_BATCHES:
        raise InputError(
            f"workload: global_batch = {workload.global_batch} makes over {MAX_MICRO_BATCHES} micro-batches of "
            f"micro_batch x dp = {unit}; they are alike, so use a smaller global_batch"
        )
    if workload.global_batch is not None and workload.global_batch % unit:
        raise InputError(
            f"workload: global_batch = {workload.global_batch} is not divisible by micro_batch x dp = {unit}; "
            f"use a multiple of {unit}"
        )


def fewest_nodes(scenario: Scenario) -> int:
    """Nodes that hold the plan, each with as many GPUs as the others."""
    gpus = scenario.plan.gpus
    return gpus // next(n for n in range(min(gpus, scenario.hardware.gpus_per_node), 0, -1) if gpus % n == 0)


def check_nodes(scenario: Scenario) -> None:
    gpus, per_node = scenario.plan.gpus, scenario.hardware.gpus_per_node
    needed = -(-gpus // per_node)
    if scenario.nodes is not None and scenario.nodes < needed:
        raise InputError(
            f"nodes = {scenario.nodes}: the plan needs {gpus} GPUs, {needed} nodes of {per_node}; "
            f"use at least {needed} or smaller degrees"
        )
    if scenario.nodes is not None and gpus % scenario.nodes:
        raise InputError(
            f"nodes = {scenario.nodes} does not divide the {gpus} GPUs of the plan evenly; "
            f"use {fewest_nodes(scenario)} or another divisor"
        )
    if scenario.gpus_per_node < gpus:
        _check_levels(scenario)
        _check_groups(scenario)


def _check_levels(scenario: Scenario) -> None:
    """Plans over several nodes need curves of a level between nodes."""
    hardware = scenario.hardware
    measured = [level.name for level in hardware.datasheet.topology[1:2]]
    if not any(hardware.coefficients.collectives.get(name) for name in measured):
        raise InputError(
            f"plan: {scenario.plan.gpus} GPUs span several nodes, but {hardware.name} has no collective curves between "
            f"nodes; use at most {hardware.gpus_per_node} GPUs of one node, or a profile with such a level"
        )


def _check_groups(scenario: Scenario) -> None:
    """Every group has as many ranks on each of its nodes as on the others."""
    plan, per_node = scenario.plan, scenario.gpus_per_node
    degree = 1
    for name in ("tp", "ulysses", "ring", "dp"):
        degree *= getattr(plan, name)
        if degree % per_node and per_node % degree:
            raise InputError(
                f"plan: {name} = {getattr(plan, name)} makes blocks of {degree} ranks, which nodes of {per_node} GPUs "
                f"cut unevenly; use degrees whose product divides {per_node} or is a multiple of it, or set nodes"
            )


def load_scenario(path: Path) -> Scenario:
    """The scenario of a case file: `hardware`, `model`, `[plan]` and `[workload]`, TOML."""
    return scenario_from(read_toml(path), str(path))


def scenario_from(settings: Mapping[str, Any], where: str) -> Scenario:
    """A scenario from its settings by name; `where` names their origin in messages."""
    for name in ("hardware", "model", "workload"):
        if name not in settings:
            raise InputError(f"{where}: {name} is missing; give hardware, model, plan and workload")
    for name in settings:
        if name not in Scenario.model_fields:
            raise InputError(f"{where}: {name!r}: unknown key; remove it or correct its spelling")
    return Scenario(**settings)
