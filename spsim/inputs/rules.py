"""The rules between model, plan, workload and hardware; each error names the value, the rule and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import RECOMPUTE_MODULES, Plan
from spsim.inputs.workload import Workload, Workloads

if TYPE_CHECKING:
    from spsim.inputs.hardware import HardwareProfile

_PENDING = (
    "pp_schedule", "pp_group", "pp_layout", "pp_sends", "pp_overlap", "pp_warmup_flush", "pp_deallocate", "dp_library",
    "shard_group", "bucket_elements", "grad_dtype", "moment_dtype", "precision_aware_optimizer", "loss_fusion",
    "recompute_layers", "recompute_method", "cpu_offload_layers", "cuda_graphs",
)  # fmt: skip
"""Options that are not simulated yet."""
MAX_MICRO_BATCHES = 100_000
"""Of one step; more take seconds and say nothing new."""
MAX_DIFFERING = 256
"""Ranks that are simulated one by one, since none does what another does; more take minutes and gigabytes."""


def check_shapes(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules between model, plan and workload, whatever the hardware; `InputError` names the first broken."""
    checks = (
        _check_scope, _check_recompute, _check_heads, _check_widths, _check_window, _check_sequence, _check_batch
    )  # fmt: skip
    for check in checks:
        check(model, plan, workload)


def without_effect(model: Model, plan: Plan) -> Iterator[str]:
    """Options of a plan that differ from their defaults and change nothing under it, each with the reason."""
    ring_cut = "without ring" if plan.ring == 1 else "without a causal mask" if not model.causal else ""
    if not ring_cut and model.attention == "unfused":
        ring_cut = "with unfused attention, which computes what it masks"
    one_shard = "with one rank along dp x ulysses x ring" if plan.dp * plan.ulysses * plan.ring == 1 else ""
    reasons = {
        "sequence_parallel": "with tp = 1" if plan.tp == 1 else "",
        "ring_kind": "without ring" if plan.ring == 1 else "",
        "ring_cut": ring_cut,
        "tp_backward_overlap": "with tp = 1" if plan.tp == 1 else "",
        "tp_overlap": "with tp = 1" if plan.tp == 1 else "",
        "dp_overlap": "with dp = 1" if plan.dp == 1 else "",
        "keep_gathered": "" if plan.tp > 1 and plan.sequence_parallel else "without sequence_parallel over tp",
        "zero": one_shard,
        "distributed_optimizer": one_shard or ("beside zero, which shards the optimizer too" if plan.zero else ""),
    }
    defaults = type(plan).model_fields
    for name, reason in reasons.items():
        value = getattr(plan, name)
        if reason and value != defaults[name].default:
            yield f"{_setting(name, value)} has no effect {reason}"


def _setting(name: str, value: Any) -> str:
    return name if value is True else f"{name} = {value!r}"


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
        *((plan, name, getattr(plan, name) != Plan.model_fields[name].default) for name in _PENDING),
    )
    for owner, name, used in pending:
        if used:
            setting = _setting(name, getattr(owner, name))
            raise InputError(f"{setting}: not simulated yet; leave it at its default")


def _check_recompute(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.recompute_modules is None:
        return
    if plan.recompute != "selective":
        raise InputError(
            f"plan: recompute_modules = {plan.recompute_modules!r} with recompute = {plan.recompute!r}: "
            "modules are for recompute=selective; use that, or leave them out"
        )
    for name in plan.recompute_modules.split("+"):
        if name not in RECOMPUTE_MODULES:
            raise InputError(
                f"plan: recompute_modules = {plan.recompute_modules!r}: {name!r} is no module; "
                f"use some of {', '.join(RECOMPUTE_MODULES)} with + between them"
            )


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
    if plan.ring > MAX_DIFFERING and plan.ring_cut == "contiguous" and model.causal and model.attention != "unfused":
        raise InputError(
            f"plan: ring = {plan.ring} with ring_cut 'contiguous': under a causal mask every rank does something else, "
            f"and at most {MAX_DIFFERING} are simulated; use ring_cut=zigzag or a smaller ring"
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


def keeps_sizes(model: Model, plan: Plan, workloads: Workloads, global_batch: Any) -> Any:
    """Which of many workloads keep the rules for their sizes, where others of their kind keep all others."""
    unit = workloads.micro_batch * plan.dp
    whole = (workloads.seq_len % sequence_unit(model, plan) == 0) & (global_batch % unit == 0)
    if model.sliding_window is not None:
        whole &= workloads.seq_len <= model.sliding_window
    return whole & (global_batch // unit <= MAX_MICRO_BATCHES)


def _check_window(model: Model, plan: Plan, workload: Workload) -> None:
    window = model.sliding_window
    if window is not None and workload.seq_len > window:
        raise InputError(
            f"workload: seq_len = {workload.seq_len} is above sliding_window = {window} of the model: local attention "
            f"is not simulated yet; use at most {window}, or a model without sliding_window"
        )


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


def gpus_per_node(hardware: HardwareProfile, plan: Plan, nodes: int | None = None) -> int:
    """GPUs of each node that a plan uses: spread evenly over `nodes`, or over the fewest that hold them."""
    gpus = plan.gpus
    if nodes is not None:
        return gpus // nodes
    return next(n for n in range(min(gpus, hardware.gpus_per_node), 0, -1) if gpus % n == 0)


def check_nodes(hardware: HardwareProfile, plan: Plan, nodes: int | None = None) -> None:
    """The rules between a plan, the nodes it is spread over and their hardware; `InputError` names the broken one."""
    gpus, per_node = plan.gpus, hardware.gpus_per_node
    needed = -(-gpus // per_node)
    if nodes is not None and nodes < needed:
        raise InputError(
            f"nodes = {nodes}: the plan needs {gpus} GPUs, {needed} nodes of {per_node}; "
            f"use at least {needed} or smaller degrees"
        )
    if nodes is not None and gpus % nodes:
        raise InputError(
            f"nodes = {nodes} does not divide the {gpus} GPUs of the plan evenly; "
            f"use {gpus // gpus_per_node(hardware, plan)} or another divisor"
        )
    used = gpus_per_node(hardware, plan, nodes)
    if used < gpus:
        _check_levels(hardware, plan)
        _check_groups(plan, used)


def _check_levels(hardware: HardwareProfile, plan: Plan) -> None:
    """Plans over several nodes need curves of a level between nodes."""
    measured = [level.name for level in hardware.datasheet.topology[1:2]]
    if not any(hardware.coefficients.collectives.get(name) for name in measured):
        raise InputError(
            f"plan: {plan.gpus} GPUs span several nodes, but {hardware.name} has no collective curves between "
            f"nodes; use at most {hardware.gpus_per_node} GPUs of one node, or a profile with such a level"
        )


def _check_groups(plan: Plan, per_node: int) -> None:
    """Every group has as many ranks on each of its nodes as on the others."""
    degree = 1
    for name in ("tp", "ulysses", "ring", "dp"):
        degree *= getattr(plan, name)
        if degree % per_node and per_node % degree:
            raise InputError(
                f"plan: {name} = {getattr(plan, name)} makes blocks of {degree} ranks, which nodes of {per_node} GPUs "
                f"cut unevenly; use degrees whose product divides {per_node} or is a multiple of it, or set nodes"
            )
