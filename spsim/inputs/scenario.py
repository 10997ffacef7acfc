"""The scenario: the only place where hardware, model, plan and workload are checked together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, InstanceOf, field_validator, model_validator

from spsim.errors import InputError
from spsim.inputs.configuration import Configuration
from spsim.inputs.effects import notes_of, on_nodes, unfused_softmax
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.libraries import module_defaults
from spsim.inputs.model import Model
from spsim.inputs.perturbations import Perturbations
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.presets import load_model, model_of
from spsim.inputs.profiles import load_profile
from spsim.inputs.rules import check_nodes, check_scope, check_shapes, gpus_per_node
from spsim.inputs.serving_rules import serving_notes
from spsim.inputs.words import unknown_key
from spsim.inputs.workload import Workload


class Shapes(Configuration):
    """A model under a plan for a workload, known to fit each other whatever the hardware; names are resolved."""

    model: InstanceOf[Model]
    plan: InstanceOf[Plan] = Plan()
    workload: InstanceOf[Workload]

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model: Model | Mapping[str, Any] | str | Path,
            plan: Plan | Mapping[str, Any] | str = "",
            workload: Workload | Mapping[str, Any],
            **further: Any,
        ) -> None:
            """Names, paths and tables are resolved; `InputError` says which rule of which input is broken."""

    @classmethod
    def called(cls) -> str:
        """A scenario without hardware."""
        return "scenario"

    @field_validator("model", mode="before")
    @classmethod
    def _load_model(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return load_model(value)
        return model_of(value) if isinstance(value, Mapping) else value

    @field_validator("plan", mode="before")
    @classmethod
    def _load_plan(cls, value: Any) -> Any:
        return parse_plan(value) if isinstance(value, str) else _from_table(Plan, value)

    @field_validator("workload", mode="before")
    @classmethod
    def _load_workload(cls, value: Any) -> Any:
        return _from_table(Workload, value)

    @model_validator(mode="after")
    def _with_modules(self) -> Self:
        """The modules of a model run as those of the plan's library, unless it says how."""
        model = self.model.as_in(module_defaults(self.plan.library))
        self.__dict__["model"] = model.masked(self.workload.documents)
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        check_shapes(self.model, self.plan, self.workload)
        return self


Network = Literal["closed_form", "flows"]
"""Whether each transfer has its links alone, or flows share them."""


class Scenario(Shapes):
    """One simulation: names and paths are resolved, and the four inputs are known to fit each other."""

    hardware: InstanceOf[HardwareProfile]
    nodes: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Nodes to spread the GPUs over evenly; the fewest that hold them unless given."""
    scope: Literal["step", "layers"] = "step"
    """The whole training step, or the layers of one stage alone: no embedding, head, loss, optimizer."""
    network: Network = "closed_form"
    """Each transfer has its links alone, or flows share them."""
    perturbations: InstanceOf[Perturbations] = Perturbations()
    """Slow ranks, jitter, slow or failing links; whatever `Perturbations.of` takes."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            hardware: HardwareProfile | str | Path,
            model: Model | Mapping[str, Any] | str | Path,
            plan: Plan | Mapping[str, Any] | str = "",
            workload: Workload | Mapping[str, Any],
            nodes: int | None = None,
            scope: Literal["step", "layers"] = "step",
            network: Network = "closed_form",
            perturbations: Any = (),
        ) -> None:
            """Names, paths and tables are resolved; `InputError` says which rule of which input is broken."""

    @classmethod
    def example(cls) -> str:
        """Of all that is required."""
        return "Scenario(hardware='dgx-h100', model='llama-3-8b', plan='tp=8', workload={'seq_len': 8192})"

    @field_validator("hardware", mode="before")
    @classmethod
    def _load_hardware(cls, value: Any) -> Any:
        return load_profile(value) if isinstance(value, str | Path) else value

    @field_validator("perturbations", mode="before")
    @classmethod
    def _load_perturbations(cls, value: Any) -> Any:
        return Perturbations.of(value)

    @model_validator(mode="after")
    def _check_scope(self) -> Self:
        if self.scope == "layers" and self.workload.phase != "training":
            raise InputError(
                f"scope = 'layers' with phase {self.workload.phase!r}: of inference the whole step is simulated; "
                "use scope = 'step'"
            )
        if self.scope == "layers" and self.plan.pp > 1:
            raise InputError(
                f"scope = 'layers' with pp = {self.plan.pp}: layers alone are those of one stage; use scope = 'step'"
            )
        return self

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        check_scope(self.model, self.plan, self.scope)
        check_nodes(self.hardware, self.plan, self.nodes)
        self.hardware.peak(self.workload.product_type)
        if self.plan.cuda_graphs != "none":
            _ = self.hardware.graph_overhead_us
        if kernel := self.model.attention_kernel:
            self.hardware.attention_kernel(kernel)
        self.perturbations.check(self.plan.gpus, self.gpus_per_node)
        return self

    def perturbed(self, perturbations: Any) -> Scenario:
        """The same under other perturbations, whatever `Perturbations.of` takes; of none it is unperturbed."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return Scenario(**{**own, "perturbations": perturbations})

    @property
    def is_served(self) -> bool:
        """Whether it is inference, not training."""
        return self.workload.phase != "training"

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
        """Phase of inference, sequence, micro-batch, nodes if several, ring cut and recomputation, for subtitles."""
        phase = () if self.workload.phase == "training" else (self.workload.phase,)
        sizes = (*phase, f"sequence {self.workload.seq_len:,}", f"micro-batch {self.workload.micro_batch}")
        nodes, documents = self.plan.gpus // self.gpus_per_node, self.workload.documents
        packed = (f"{len(documents)} document{'s' * (len(documents) > 1)} each",) if documents else ()
        return (*sizes, *packed, *([f"{nodes} nodes"] if nodes > 1 else []), *self.plan.summary)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Parts of the model that are left out, and settings without effect, said once."""
        return (
            *notes_of(self.model, self.plan, self.scope),
            *serving_notes(self.model, self.plan, self.workload),
            *on_nodes(self.plan, self.plan.gpus // self.gpus_per_node),
            *unfused_softmax(self.model, self.plan, self.workload),
            *(("network = 'flows': transfers that are under way at once share links",) * (self.network == "flows")),
        )


def _from_table(kind: type[Configuration], value: Any) -> Any:
    return kind.of_table(value) if isinstance(value, Mapping) else value


def scenario_from(settings: Mapping[str, Any], where: str) -> Scenario:
    """A scenario from its settings by name; `where` names their origin in messages."""
    for name in settings:
        if name not in Scenario.model_fields:
            raise unknown_key(where, name, Scenario.model_fields)
    for name in ("hardware", "model", "workload"):
        if name not in settings:
            raise InputError(f"{where}: {name} is missing; give hardware, model, plan and workload")
    return Scenario(**settings)
