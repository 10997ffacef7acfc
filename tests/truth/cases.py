"""What real layers do and what the simulator says they do, in the same words."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from spsim import Model, Plan, Workload
from spsim.inputs.plan import parse_plan
from spsim.program.assembly import layer_program
from spsim.program.instructions import Communication, Program
from spsim.pytorch.layers import Groups, ParallelLayer, record_collectives, record_saved
from tests.truth.processes import groups_of

SIMULATED = torch.bfloat16
"""The precision of a workload unless given."""

GPT = {"attention": "unfused", "dropout": 0.1}
GPT_SDPA = {"attention": "flash"}
"""No dropout inside: with it torch leaves the flash kernel on CPU."""
LLAMA = {"gated_mlp": True, "ffn_hidden": 96, "kv_heads": 2}
QWEN = {"gated_mlp": True, "ffn_hidden": 96, "qk_norm": True, "qkv_bias": True}
NEOX = {"parallel_residual": True, "positions": "rope"}
NEMOTRON = {"activation": "squared_relu", "bias": False}
GEGLU = {"gated_mlp": True, "ffn_hidden": 96, "activation": "geglu", "bias": True, "kv_heads": 1, "dropout": 0.1}
MODELS = {
    "gpt": GPT, "gpt-sdpa": GPT_SDPA, "llama": LLAMA, "llama-unfused": {**LLAMA, "attention": "unfused"}, "qwen": QWEN,
    "neox": NEOX, "nemotron": NEMOTRON, "geglu-mqa": GEGLU, "not-causal": {**GPT_SDPA, "causal": False},
}  # fmt: skip

PLANS = (
    "tp=2", "tp=2,sequence_parallel", "tp=2,sequence_parallel,keep_gathered", "ulysses=2",
    "ring=2", "ring=2,ring_cut=contiguous", "ring=2,ring_kind=all_gather",
    "ring=2,ring_kind=all_gather,ring_cut=contiguous",
)  # fmt: skip
RECOMPUTE = (
    "tp=2,recompute=full", "tp=2,sequence_parallel,recompute=full", "tp=2,sequence_parallel,recompute=selective",
    "ulysses=2,recompute=selective", "ulysses=2,recompute=full", "ring=2,recompute=selective", "ring=2,recompute=full",
    "ring=2,ring_kind=all_gather,recompute=selective",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A layer, a plan and the shape of its input; the same object goes to every process."""

    plan: Plan
    model: Model
    workload: Workload

    @property
    def program(self) -> Program:
        """What the simulator derives."""
        return layer_program(self.model, self.plan, self.workload)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole input [s b h], of all replicas."""
        return self.workload.seq_len, self.workload.micro_batch * self.plan.dp, self.model.hidden


def case(plan: str, *, seq_len: int = 32, micro_batch: int = 3, **model: object) -> Case:
    """A small layer: hidden 64 and 4 heads unless changed."""
    changed = {"layers": 1, "hidden": 64, "heads": 4, "vocab": 8, **model}
    replicated = parse_plan(plan).model_copy(update={"few_kv_heads": "replicate"})  # as real layers have them
    return Case(replicated, Model(**changed), Workload(seq_len=seq_len, micro_batch=micro_batch))


def possible(plan: str, model: dict[str, object]) -> bool:
    """Unfused attention cannot be circulated; `Scenario` refuses it."""
    return model.get("attention") != "unfused" or "ring=" not in plan or "all_gather" in plan


COMBINATIONS = [
    (plan, name) for plan in (*PLANS, *RECOMPUTE) for name, model in MODELS.items() if possible(plan, model)
]


Calls = dict[str, list[tuple[str, int, int, str]]]
"""Axis -> (collective, message bytes, ranks, phase) in issue order: the axes are communicators of their own, and
lanes of their own in the simulator, so that order is a property of each.
"""


@dataclass(frozen=True)
class Observed:
    """One forward and backward pass of one rank in torch."""

    saved: dict[tuple[str, str], int]
    """(operator, category) -> bytes."""
    calls: Calls


def observe(
    case: Case, groups: Groups, dtype: torch.dtype = SIMULATED, kind: type[ParallelLayer] = ParallelLayer
) -> Observed:
    """Run a layer forward and backward under both recorders."""
    layer = kind(case.model, case.plan, groups, dtype=dtype)
    return observed(layer, layer.local_input(torch.ones(case.shape, dtype=dtype)))


def observed(layer: ParallelLayer, x: torch.Tensor) -> Observed:
    """The passes of a layer over the input of this rank."""
    x.requires_grad_()
    with record_collectives(layer.groups) as calls:
        with record_saved(layer) as saved:
            out = layer(x)
        out.backward(torch.ones_like(out))
    kept: Counter[tuple[str, str]] = Counter()
    for tensor in saved.tensors:
        kept[tensor.operator, tensor.category] += tensor.bytes
    by_axis: Calls = defaultdict(list)
    for call in calls:
        by_axis[call.axis].append((call.collective, call.message_bytes, call.ranks, call.phase))
    return Observed(dict(kept), dict(by_axis))


def observe_here(case: Case, dtype: torch.dtype, kind: type[ParallelLayer] = ParallelLayer) -> Observed:
    """`observe` in a process of `Processes`."""
    return observe(case, groups_of(case.plan), dtype, kind)


def expected_saved(case: Case, dtype: torch.dtype) -> dict[tuple[str, str], int]:
    """The simulator's bytes, whose activations are of 2 bytes, for another type.

    Masks and statistics have sizes of their own, with one habit of torch on CPU: LayerNorm keeps its statistics
    in the type of its weights, 2 bytes in bf16, where CUDA keeps fp32 as the simulator counts.
    """
    bytes_of: Counter[tuple[str, str]] = Counter()
    for kept in case.program.saved:
        itemsize = SIMULATED.itemsize if kept.category == "activation" else None
        if kept.category == "norm statistics" and case.model.norm == "layernorm" and kept.operator.startswith("norm"):
            itemsize = torch.float32.itemsize
        scaled = kept.bytes * dtype.itemsize // itemsize if itemsize else kept.bytes
        bytes_of[_operator(case, kept.operator), kept.category] += scaled
    return dict(bytes_of)


def _operator(case: Case, operator: str) -> str:
    """What a checkpoint keeps, it keeps outside of the operators."""
    full, selective = case.plan.recompute == "full", case.plan.recompute == "selective"
    return "" if full or (selective and operator in ("attention", "qk", "av")) else operator


def expected_calls(case: Case, dtype: torch.dtype) -> Calls:
    """The collectives that the simulator derives, in issue order."""
    by_axis: Calls = defaultdict(list)
    for step in case.program.instructions:
        if isinstance(step, Communication):
            message = step.message_bytes * dtype.itemsize // SIMULATED.itemsize
            by_axis[step.axis].append((step.collective, message, step.ranks, step.part))
    return dict(by_axis)
