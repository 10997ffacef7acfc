"""The scenario: the only place where hardware, model, plan and workload are checked together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, InstanceOf, field_validator, model_validator

from spsim.errors import InputError
from spsim.inputs.configuration import Configuration
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model, load_model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import read_toml
from spsim.inputs.rules import check_nodes, check_shapes, gpus_per_node, without_effect
from spsim.inputs.workload import Workload

_SINGLE_GPU = Plan()


class Shapes(Configuration):
    """A model under a plan for a workload, known to fit each other whatever the hardware; names are resolved."""

    model: InstanceOf[Model]
    plan: InstanceOf[Plan]
    workload: InstanceOf[Workload]

    def __init__(
        self,
        *,
        model: Model | Mapping[str, Any] | str | Path,
        plan: Plan | Mapping[str, Any] | str,
        workload: Workload | Mapping[str, Any],
        **further: Any,
    ) -> None:
        """Names, paths and tables are resolved; `InputError` says which rule of which input is broken."""
        super().__init__(model=model, plan=plan, workload=workload, **further)

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
    def _check_shapes(self) -> Self:
        check_shapes(self.model, self.plan, self.workload)
        return self


class Scenario(Shapes):
    """One simulation: names and paths are resolved, and the four inputs are known to fit each other."""

    hardware: InstanceOf[HardwareProfile]
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

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        check_nodes(self.hardware, self.plan, self.nodes)
        self.hardware.peak(self.workload.precision)
        if kernel := self.model.attention_kernel:
            self.hardware.attention_kernel(kernel)
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
        return gpus_per_node(self.hardware, self.plan, self.nodes)

    @cached_property
    def summary(self) -> tuple[str, ...]:
        """Sequence, micro-batch, ring cut and recomputation, for subtitles."""
        sizes = (f"sequence {self.workload.seq_len:,}", f"micro-batch {self.workload.micro_batch}")
        return (*sizes, *self.plan.summary)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Settings without effect, said once."""
        return tuple(without_effect(self.model, self.plan))


def _from_table(kind: type[BaseModel], value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else value


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
