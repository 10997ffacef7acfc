"""Published measurements, one row per measured value, as scenarios.

The columns of a measured case: a label and a family; hardware by profile name; the dimensions of the model;
the plan; the workload; the metric with its unit in the name; the measured value. `docs/validation.md` says
what each means. Nothing here knows a case by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spsim.errors import InputError, first_problem
from spsim.inputs.configuration import Name
from spsim.inputs.csvrows import csv_rows
from spsim.inputs.model import Model
from spsim.inputs.plan import Dispatcher, Plan
from spsim.inputs.presets import load_model
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import measured_cases, read_text
from spsim.inputs.scenario import Scenario
from spsim.inputs.workload import Workload

Metric = Literal["step_time_s", "layer_forward_ms", "layer_backward_ms", "peak_memory_gib"]

_NEMO_2024 = {"grad_dtype": "bf16", "tp_scatter": "pipeline", "fp8": "fp8_delayed", "attention": "cudnn_2024"}
_FLASH = {"attention": "flash_attention_2"}
SOFTWARE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("Megatron-Bridge", ""): {"grad_dtype": "bf16", "loss_fusion": True, "bucket_elements": 2**27},
    ("NeMo recipe v24", "GPT3"): _NEMO_2024 | _FLASH,
    ("NeMo recipe v24", "340B"): _NEMO_2024 | _FLASH,
    ("NeMo recipe v24", "405B"): _NEMO_2024 | {"tp_scatter": "pipeline_fp8"},
    ("NeMo recipe v24", ""): _NEMO_2024,
    ("NeMo", ""): {"grad_dtype": "bf16", "fp8": "fp8_delayed"},
    ("MLPerf Training v3", ""): _NEMO_2024 | _FLASH,
    ("MLPerf", ""): {"grad_dtype": "bf16", "fp8": "fp8_delayed", "attention": "cudnn_2024"},
    ("Megatron-LM 23e00ed0", ""): {"loss_fusion": True},
    ("Megatron-LM 2022", ""): {"pp_overlap": False},
}
"""What a software sets by itself and rows do not say, by parts of its name and of the model's; the first that fits.

NVIDIA's NeMo, with which its MLPerf submissions ran, reduces gradients in 16 bits (`grad_sync_dtype`). The performance
recipes of Megatron-Bridge do so too, close buckets at 128 Mi elements and take Transformer Engine's cross-entropy
(`training/comm_overlap.py` and `scripts/performance/utils/overrides.py`, v0.3.0). SimuMax's launcher of Megatron-LM at
that commit does the latter, too (its `docs/b200`, where `_cef` means so). Megatron-LM of 2022 had no
`overlap_p2p_communication`. Where Megatron-Bridge overlaps exchanges with experts it delays weight gradients, too.

`fp8` had delayed scaling: Transformer Engine knew no other before 2.2 of April 2025, and NeMo kept it as the default.
Until 2024 `ub_tp_comm_overlap_cfg` has `pipeline` for projection and fc2 in 8 bits too (NVIDIA's recipes for
DGX Cloud, v24.11.1; MLPerf v3.1), with `fp8_buf` for 405B. `attention` is the kernel, where a profile has it: recipes
of v24.11 with NeMo 24.05 switch cuDNN off (`NVTE_FUSED_ATTN=0`), MLPerf v3.1 installs flash-attn 2.0.8, and v3.0 had
flash-attn 1.0, to which that is the nearest; the others had cuDNN of 2024.
"""


class MeasuredCase(BaseModel):
    """One row of a file of measured cases; columns that are not named here are notes, an empty cell says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    case_id: Name = Field(min_length=1)
    family: Name = Field(min_length=1)
    hardware: str
    model: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    vocab: int
    gated_mlp: bool
    norm: str
    attention: str
    dropout: float
    seq_len: int
    micro_batch: int
    global_batch: int
    tp: int
    sequence_parallel: bool
    ulysses: int
    ring: int
    pp: int
    virtual_pp: int
    dp: int
    gpus: int
    distributed_optimizer: bool
    recompute: str
    precision: str
    tp_backward_overlap: bool
    tp_overlap: bool
    dp_overlap: bool
    metric: Metric
    measured: float = Field(gt=0)

    software: str = ""
    precision_recipe: str = ""
    head_dim: int | None = None
    sliding_window: int = 0
    experts: int = 0
    experts_per_token: int = 0
    token_drop: bool = False
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    moe_dispatcher: Dispatcher = "alltoall"
    moe_a2a_overlap: bool = False
    fused_grouped_mlp: bool = False
    mla: bool = False
    mtp: bool = False
    fp8_attention: bool = False
    fp8_lm_head: bool = False
    fsdp: int = 0
    """Replicas that share one set of parameters, gradients and optimizer state; 0 without."""
    pp_layout: str | None = None
    recompute_modules: str | None = None
    cpu_offload_layers: int = 0
    cuda_graphs: str = "none"
    userbuffers: bool = False
    grad_reduce_overlap: bool | None = None
    param_gather_overlap: bool | None = None
    grad_reduce_dtype: str = ""
    optimizer: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_cells(cls, row: Any) -> Any:
        return {name: value for name, value in row.items() if value not in ("", None)} if isinstance(row, dict) else row

    @field_validator("norm", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @property
    def scope(self) -> Literal["step", "layers"]:
        """What of a training step the metric is of."""
        return "layers" if self.metric.startswith("layer_") else "step"

    def scenario(self) -> Scenario:
        """The scenario of the row; `InputError` where it cannot be simulated."""
        return Scenario(**self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings of its scenario by name; `InputError` where one is none, or not simulated yet."""
        for name, what in _ABSENT.items():
            if getattr(self, name):
                raise InputError(f"{what} not simulated yet")
        plan = Plan(**self._plan())
        if plan.gpus != self.gpus:
            raise InputError(f"gpus = {self.gpus} is not the product of the degrees, {plan.gpus}; correct one")
        return {
            "hardware": self.hardware,
            "model": self._named() if self.experts else Model(**self._model()),
            "plan": plan,
            "workload": Workload(**{**self._given(Workload), "precision": self._precision()}),
            "scope": self.scope,
        }

    def _model(self) -> dict[str, Any]:
        window = {"sliding_window": self.sliding_window} if self.sliding_window else {}
        kernel = self._usual.get("attention")
        known = self.attention == "flash" and kernel in load_profile(self.hardware).coefficients.attention
        attention = {"attention": kernel} if known else {}
        return {
            **self._given(Model, "sliding_window", "experts", "experts_per_token"),
            **window,
            **attention,
            "name": self.model,
        }

    def _named(self) -> Model:
        """A model of experts is the preset of its name, for rows do not say all of it."""
        found = load_model(self.model.lower().replace(" ", "-"))
        for name in _OF_EXPERTS:
            if getattr(found, name) != getattr(self, name):
                raise InputError(f"{name} = {getattr(self, name)} of {self.model}, which has {getattr(found, name)}")
        return found.model_copy(update={"mtp_layers": 1}) if self.mtp else found

    @property
    def _usual(self) -> Mapping[str, Any]:
        """What its software sets by itself."""
        known = SOFTWARE.items()
        return next((own for (software, model), own in known if software in self.software and model in self.model), {})

    def _precision(self) -> str:
        return self.precision_recipe or self._usual.get(self.precision, self.precision)

    def _plan(self) -> dict[str, Any]:
        usual = {name: value for name, value in self._usual.items() if name in Plan.model_fields}
        options = {**usual, **self._given(Plan, "dp_overlap", "tp_overlap")}
        gradients = self.dp_overlap if self.grad_reduce_overlap is None else self.grad_reduce_overlap
        parameters = self.dp_overlap if self.param_gather_overlap is None else self.param_gather_overlap
        options["dp_overlap"] = gradients if gradients == parameters else "gradients" if gradients else "parameters"
        options["tp_overlap"] = self.tp_overlap or self.userbuffers
        options |= {"fp8_dot_product_attention": self.fp8_attention, "fp8_output_proj": self.fp8_lm_head}
        if self.experts:
            options |= {"ep": self.expert_parallel or 1, "delay_wgrad": self.moe_a2a_overlap}
            options["expert_tp"] = self.expert_tensor_parallel if self.tp > 1 else None
        if self.grad_reduce_dtype:
            options["grad_dtype"] = self.grad_reduce_dtype
        if self.fsdp:
            group = {"shard_group": self.fsdp} if self.fsdp != self.dp else {}
            options |= {"zero": 3, "dp_library": "fsdp", "distributed_optimizer": False, **group}
        return {**options, **_optimizer(self.optimizer)}

    def _given(self, kind: type[BaseModel], *but: str) -> dict[str, Any]:
        """Fields that the row shares with an input and says something about."""
        names = kind.model_fields.keys() & type(self).model_fields.keys() - {*but}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}


_ABSENT = {
    "token_drop": "tokens that are dropped and padded are",
}
"""Column -> what models and recipes of spsim do not have."""


_OF_EXPERTS = ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "experts", "experts_per_token")
"""Dimensions that a row of a model with experts shares with it."""


def _optimizer(text: str) -> dict[str, Any]:
    """What a description says of Adam, such as `Adam; precision-aware (bf16 master remainder), fp32 moments`."""
    aware = {"precision_aware_optimizer": True} if "precision-aware" in text else {}
    return {**aware, "moment_dtype": "bf16"} if "bf16 moments" in text else aware


def load_cases(path: Path | None = None) -> list[MeasuredCase]:
    """The measured cases of a CSV file, by default of all that are shipped; `InputError` names line and column."""
    return [case for where in ([path] if path else measured_cases()) for case in _cases(where)]


def _cases(where: Path) -> Iterator[MeasuredCase]:
    columns, rows = csv_rows(read_text(where), where)
    required = [name for name, field in MeasuredCase.model_fields.items() if field.is_required()]
    missing = [name for name in required if name not in columns]
    if missing:
        raise InputError(f"{where}: column {missing[0]!r} is missing; a measured case needs it")
    if not rows:
        raise InputError(f"{where}: no measured cases; give at least one row below the header")
    for line, row in rows:
        try:
            yield MeasuredCase.model_validate(row)
        except ValidationError as error:
            raise first_problem(error, f"{where}: line {line}") from None
