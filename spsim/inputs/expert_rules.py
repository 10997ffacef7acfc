"""The rules between a model of experts and a plan that spreads them; each error names value, rule and fix."""

from __future__ import annotations

import math

from spsim.errors import InputError
from spsim.inputs.expert_loads import largest_load, load_of
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload


def check_experts(model: Model, plan: Plan, workload: Workload) -> None:
    """`InputError` names the first broken rule of Megatron-Core's, or what is not simulated yet."""
    if model.experts is None:
        if plan.ep > 1:
            raise InputError(f"plan: ep = {plan.ep} with {model.name}, which has no experts; use ep=1")
        return
    _check_degrees(model.experts, plan)
    _check_load(model, plan)
    _check_width(model, plan)
    _check_kernels(model, plan, workload)
    if plan.tp > 1 and not plan.sequence_parallel:
        raise InputError(
            f"plan: tp = {plan.tp} without sequence_parallel, under which each rank would route all tokens; "
            "Megatron-Core requires it with experts: add sequence_parallel"
        )
    replicas = plan.zero_stage > 1 or plan.dp_library != "megatron" or plan.shard_group is not None
    for given, what in (
        (plan.ep > 1 and replicas, "zero = 2 and 3, shard_group, or a dp_library other than megatron"),
        (plan.cpu_offload_layers > 0, "cpu_offload_layers"),
    ):
        if given:
            raise InputError(f"plan: {what} with experts: not simulated yet; leave it at its default")


def _check_degrees(experts: int, plan: Plan) -> None:
    if experts % plan.ep:
        raise InputError(
            f"plan: ep = {plan.ep} does not divide experts = {experts}; "
            f"use a divisor of it, such as {math.gcd(experts, plan.ep)}"
        )
    if plan.expert_tp not in (None, 1, plan.tp):
        raise InputError(
            f"plan: expert_tp = {plan.expert_tp} with tp = {plan.tp}: only 1 and tp are simulated yet; use one of them"
        )
    if plan.tp > 1 and plan.expert_tp == 1 and plan.ep == 1:
        raise InputError(
            f"plan: expert_tp = 1 with tp = {plan.tp} and ep = 1: experts that are whole on each rank of tp are not "
            "simulated yet; use ep = tp times a divisor of dp, or leave expert_tp out"
        )
    within = math.prod(getattr(plan, axis) for axis in plan.expert_axes)
    if plan.ep > 1 and (plan.ep % within or plan.dp % (plan.ep // within)):
        what = " x ".join(axis for axis in plan.expert_axes if getattr(plan, axis) > 1)
        spread = f"{what} = {within} times a divisor" if what else "a divisor"
        over_tp = ", or expert_tp=1, which spreads them over tp too" if plan.tp > 1 and plan.expert_tp != 1 else ""
        raise InputError(
            f"plan: ep = {plan.ep} is not {spread} of dp = {plan.dp}, over which experts are spread; use another ep "
            f"or dp{over_tp}"
        )


def _check_load(model: Model, plan: Plan) -> None:
    """A token has one copy for each of its experts, so that no rank has more than all tokens send it."""
    most = largest_load(model, plan)
    if plan.ep > 1 and plan.expert_imbalance > most:
        raise InputError(
            f"plan: expert_imbalance = {plan.expert_imbalance:g} with ep = {plan.ep}: where all tokens go to one rank "
            f"it has {most:g} times the mean, as each goes to {model.experts_per_token} experts; use at most that"
        )
    if plan.moe_capacity_factor is None or model.experts is None or model.experts_per_token is None:
        return
    all_tokens = model.experts / model.experts_per_token
    if plan.moe_capacity_factor > all_tokens:
        raise InputError(
            f"plan: moe_capacity_factor = {plan.moe_capacity_factor:g}: at experts / experts_per_token = "
            f"{all_tokens:g} each expert has room for all tokens; use at most that"
        )


def _check_kernels(model: Model, plan: Plan, workload: Workload) -> None:
    whole = plan.tp > 1 and plan.expert_tp != 1
    if plan.moe_dispatcher != "alltoall" and whole:
        raise InputError(
            f"plan: moe_dispatcher = {plan.moe_dispatcher} with experts that {plan.tp} ranks of tp share: not "
            "simulated yet; use expert_tp=1 or moe_dispatcher=alltoall"
        )
    if plan.tp_overlap and whole:
        raise InputError(
            f"plan: tp_overlap with experts that {plan.tp} ranks of tp share: not simulated yet; use expert_tp=1, "
            "which spreads them over tp, or leave it out"
        )
    if plan.moe_a2a_overlap and plan.ep > 1:
        _check_overlap(plan)
    if plan.fused_grouped_mlp and (workload.precision != "mxfp8" or model.activation != "swiglu"):
        raise InputError(
            f"plan: fused_grouped_mlp with precision = {workload.precision} and {model.activation}: cuDNN has the "
            "kernel for mxfp8 and swiglu only; leave it out"
        )


def mlp_widths(model: Model, plan: Plan) -> dict[str, int]:
    """Of the MLPs of a model on a rank, by what they are divided from; those that it has."""
    dense = model.experts is None or any(own.dense for own in model.types)
    widths = {
        "ffn_hidden / tp": model.ffn_hidden // plan.tp if dense else 0,
        "shared_ffn_hidden / tp": model.shared_ffn_hidden // plan.tp,
        "expert_ffn_hidden / expert_tp": (model.expert_ffn_hidden or 0) // (plan.expert_tp or plan.tp),
    }
    return {name: width for name, width in widths.items() if width}


def _check_overlap(plan: Plan) -> None:
    """As Megatron-Core has it: passes that recompute experts, and stages of one chunk, have none beside them."""
    again = plan.recompute == "full" or "moe" in plan.recomputed_modules
    for given, what, fix in (
        (again, "recomputation of experts", "recompute other modules, or none"),
        (plan.pp > 1 and plan.virtual_pp == 1, f"pp = {plan.pp} of one chunk each", "use virtual_pp"),
        (plan.pp > 1 and plan.pp_schedule != "1f1b", f"pp_schedule = {plan.pp_schedule}", "use 1f1b"),
    ):
        if given:
            raise InputError(f"plan: moe_a2a_overlap with {what}: no other pass runs beside such; {fix}")


def _check_width(model: Model, plan: Plan) -> None:
    shares = 1 if plan.expert_tp == 1 else plan.tp
    shared = "shared_ffn_hidden", model.shared_ffn_hidden, plan.tp
    for name, width, ranks in (("expert_ffn_hidden", model.expert_ffn_hidden or 0, shares), shared):
        if width % ranks:
            raise InputError(
                f"plan: {ranks} ranks of tp do not divide {name} = {width}; use a divisor of it, such as "
                f"{math.gcd(width, ranks)}"
            )


def expert_notes(model: Model, plan: Plan) -> tuple[str, ...]:
    """What is not modelled of experts, and what that means."""
    if model.experts is None:
        return ()
    found, load = [], load_of(model, plan)
    if plan.moe_capacity_factor is not None:
        found.append(f"each expert has {load:g} times the mean of tokens, dropped or padded to that")
    elif load > 1:
        found.append(f"the rank whose experts have the most tokens has {load:.3g} times the mean, and paces the others")
    if plan.cuda_graphs != "full_iteration":
        waits = "what the host takes to start kernels of experts one after another, and its wait for counts of tokens, "
        taken = "are not simulated: published steps in 8 bits without full_iteration take up to a third longer"
        biased = ", those of experts with biases, in 16 bits too, up to two thirds" if model.mlp_bias else ""
        found.append(waits + taken + biased)
    return tuple(found)


def _of_loads(plan: Plan, alone: str) -> dict[str, str]:
    even = alone or ("" if plan.moe_capacity_factor is None else "with moe_capacity_factor")
    drawn = even or ("without expert_concentration" if plan.expert_concentration is None else "")
    given = even or ("" if plan.expert_concentration is None else "with expert_concentration")
    return {"expert_imbalance": given, "expert_concentration": even, "routing_seed": drawn}


def expert_reasons(model: Model, plan: Plan) -> dict[str, str]:
    """Why options of experts would change nothing; empty where they do."""
    none = "" if model.experts else "without experts"
    usual = "with tp = 1" if plan.tp == 1 else "as it is tp anyhow" if plan.expert_tp == plan.tp else ""
    alone = none or ("with ep = 1" if plan.ep == 1 else "")
    return {
        "expert_tp": none or usual,
        "moe_dispatcher": alone,
        "fused_grouped_mlp": none,
        "moe_capacity_factor": none,
        **_of_loads(plan, alone),
        "moe_a2a_overlap": alone,
        "delay_wgrad": alone or ("" if plan.moe_a2a_overlap else "without moe_a2a_overlap"),
    }
