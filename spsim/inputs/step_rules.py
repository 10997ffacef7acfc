"""The rules among the options of a whole step: pipeline, replicas, optimizer, recomputation.

Each error names the value, the rule and the fix.

What libraries refuse is refused: Megatron-Core 0.16, torch.distributed.pipelining 2.13, DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.stages import V_SHAPED, chunks_of
from spsim.inputs.workload import Workload

MAX_GPUS = 2**20
"""Of a plan; ten times the largest that trained anything."""
MODULES = ("core_attn", "layernorm", "mlp")
"""What a selective recomputation may run again (`recompute_modules` of Megatron-LM)."""
_MODULES_ELSEWHERE = {
    **dict.fromkeys(("moe", "moe_act", "shared_experts"), "experts are"),
    "mla_up_proj": "latent attention is",
}
"""Those of models that spsim does not have."""


def check_step(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules among options of the whole step; `InputError` names the first broken."""
    for check in (_check_world, _check_pipeline, _check_replicas, _check_optimizer, _check_recompute, _check_host):
        check(model, plan, workload)


def _refused(text: str) -> InputError:
    return InputError(f"plan: {text}")


def _check_world(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.gpus > MAX_GPUS:
        raise _refused(f"{plan.gpus:,} GPUs are over {MAX_GPUS:,}; use smaller degrees")
    if plan.tp_overlap and plan.tp > 1 and not plan.sequence_parallel:
        raise _refused(
            f"tp_overlap with tp = {plan.tp} hides the gathers and scatters of sequence parallelism; "
            "add sequence_parallel or leave it out"
        )


# ------------------------------------------------------------ pipeline


def _check_pipeline(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.virtual_pp > 1 and plan.pp == 1:
        raise _refused(
            f"virtual_pp = {plan.virtual_pp} without pp: chunks take turns on several stages; add pp=N or leave it out"
        )
    if plan.pp > 1:
        _check_schedule(plan)
        _check_messages(plan)
    if plan.pp > 1 or plan.pp_layout is not None:
        chunks_of(model, plan)
    global_batch = workload.global_batch or workload.micro_batch * plan.dp
    count = global_batch // (workload.micro_batch * plan.dp)
    for holds, rule in micro_batch_rules(plan, count):
        if not holds:
            raise InputError(f"plan: {count} micro-batches (global_batch / (micro_batch x dp)) {rule}")


def _check_schedule(plan: Plan) -> None:
    schedule, virtual = plan.pp_schedule, plan.virtual_pp
    if schedule in V_SHAPED and virtual != 2:
        raise _refused(
            f"pp_schedule = {schedule!r} has two chunks a stage, but virtual_pp = {virtual}; use virtual_pp=2"
        )
    if schedule == "gpipe" and virtual > 1:
        raise _refused(
            f"pp_schedule = 'gpipe' has one chunk a stage, but virtual_pp = {virtual}; use pp_schedule=looped_bfs"
        )
    if schedule != "1f1b" and plan.pp_sends == "megatron":
        raise _refused(
            f"pp_sends = 'megatron' with pp_schedule = {schedule!r}, which Megatron-LM lacks; use pp_sends=torch"
        )
    if interleaved_by_megatron(plan) and (plan.pp_group or plan.pp) < plan.pp:
        raise _refused(
            f"pp_group = {plan.pp_group} is below pp = {plan.pp}: stages would wait for their own output; "
            f"use at least {plan.pp}"
        )


def _check_messages(plan: Plan) -> None:
    """Of Megatron's two ways to send, batched and overlapped, interleaved schedules may have both, 1F1B the first."""
    if sends(plan) == "torch":
        return
    if plan.pp_overlap is True and plan.virtual_pp == 1:
        raise _refused(
            "pp_overlap needs an interleaved schedule: 1F1B waits for each message where it is used; "
            "add virtual_pp or leave it out"
        )
    if plan.pp_overlap is False and plan.virtual_pp > 1 and plan.pp == 2:
        raise _refused(
            "pp_overlap = False with pp = 2 and virtual_pp: an activation and a gradient to the same peer in one batch "
            "are mixed up, silently; leave pp_overlap out or use more stages"
        )
    if plan.pp_warmup_flush and not overlaps_messages(plan):
        raise _refused(
            "pp_warmup_flush overlaps the messages of warm-up and cool-down where others overlap; "
            "add virtual_pp, without pp_overlap=false, or leave it out"
        )


def sends(plan: Plan) -> str:
    """Whose way to post messages and wait for them a plan has."""
    return plan.pp_sends or ("megatron" if plan.pp_schedule == "1f1b" else "torch")


def overlaps_messages(plan: Plan) -> bool:
    """Whether passes go on while messages of Megatron's kind are under way."""
    return plan.virtual_pp > 1 if plan.pp_overlap is None else plan.pp_overlap


def interleaved_by_megatron(plan: Plan) -> bool:
    """Whether the schedule is Megatron's interleaved one, the only one that lets the user choose its groups."""
    return plan.pp > 1 and plan.virtual_pp > 1 and plan.pp_schedule == "1f1b" and sends(plan) == "megatron"


def micro_batch_rules(plan: Plan, count: Any) -> Iterator[tuple[Any, str]]:
    """Whether so many micro-batches a replica, a number or an array, keep each rule of the schedule; and the rule."""
    stages = plan.pp
    if stages == 1:
        return
    if interleaved_by_megatron(plan):
        group = plan.pp_group or stages
        rule = f"do not make groups of {group}, of which the last may have fewer but not below pp = {stages}"
        near = f"use a global_batch that makes a multiple of {group}"
        yield (count >= group) & ((count % group == 0) | (count % group >= stages)), f"{rule}; {near}"
    elif plan.pp_schedule == "interleaved_zero_bubble" or (plan.pp_schedule == "1f1b" and plan.virtual_pp > 1):
        rounds = count // stages + (count < stages)
        rule = f"are not a multiple of the rounds that torch makes of them, one for {stages} stages"
        yield count % rounds == 0, f"{rule}; use a global_batch that makes a multiple of {stages}"
    least = _least_micro_batches(plan)
    yield count >= least, f"are below the {least} that fill the pipeline; use a global_batch that makes {least} or more"


def _least_micro_batches(plan: Plan) -> int:
    if plan.pp_schedule == "dualpipev":
        return 2 * plan.pp
    return plan.pp if plan.pp_schedule == "1f1b" and plan.virtual_pp == 1 and sends(plan) == "torch" else 1


# ------------------------------------------------------------ replicas and the optimizer


def _check_replicas(model: Model, plan: Plan, workload: Workload) -> None:
    library, zero = plan.dp_library, plan.zero_stage
    if zero == 3 and plan.distributed_optimizer:
        raise _refused("distributed_optimizer is ZeRO stage 1, but zero = 3 is given, too; keep one")
    if library == "fsdp" and zero < 2:
        raise _refused(
            f"dp_library = 'fsdp' with zero = {zero}: fully_shard shards parameters; use zero=3, "
            "or zero=2 to keep them whole between the passes"
        )
    if library == "ddp" and zero > 1:
        raise _refused(
            f"zero = {zero} with dp_library = 'ddp', which keeps all gradients on all replicas; use dp_library=fsdp"
        )
    if zero > 1 and plan.pp > 1 and library in ("megatron", "deepspeed"):
        raise _refused(
            f"zero = {zero} with pp = {plan.pp}: under dp_library = {library!r} stages accumulate whole gradients; "
            "use zero=1 or dp_library=fsdp"
        )
    _check_shard_group(plan)
    if plan.dp_overlap == "parameters" and zero == 0:
        raise _refused(
            "dp_overlap = 'parameters' without a sharded optimizer: there are none to gather; add distributed_optimizer"
        )


def _check_shard_group(plan: Plan) -> None:
    group = plan.shard_group
    if group is None:
        return
    if plan.zero_stage < 2:
        raise _refused(f"shard_group = {group} without sharded parameters; add zero=3 or leave it out")
    if plan.dp % group > 0:
        raise _refused(f"shard_group = {group} does not divide dp = {plan.dp} replicas; use a divisor of them")


def _check_optimizer(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.precision_aware_optimizer and plan.zero_stage == 0:
        raise _refused(
            "precision_aware_optimizer is a kind of distributed optimizer; add distributed_optimizer or leave it out"
        )
    if plan.moment_dtype == "bf16" and not plan.precision_aware_optimizer:
        raise _refused(
            "moment_dtype = 'bf16' without precision_aware_optimizer, which alone reads moments in 16 bits; add it"
        )
    if workload.precision == "fp32":
        if plan.grad_dtype == "bf16":
            raise _refused("grad_dtype = 'bf16' with precision = 'fp32', whose gradients are fp32; leave it out")
        if plan.precision_aware_optimizer:
            raise _refused(
                "precision_aware_optimizer with precision = 'fp32', which has no 16-bit weights; leave it out"
            )


# ------------------------------------------------------------ recomputation and the host


def _check_recompute(model: Model, plan: Plan, workload: Workload) -> None:
    layers = plan.recompute_layers
    if layers is not None and plan.recompute != "full":
        raise _refused(
            f"recompute_layers = {layers} with recompute = {plan.recompute!r} counts whole layers; use recompute=full"
        )
    if plan.recompute_method == "uniform" and (plan.recompute != "full" or layers is None):
        raise _refused(
            "recompute_method = 'uniform' makes units of layers; give recompute=full and their size as recompute_layers"
        )
    if layers is not None:
        most = most_layers(model, plan)
        if layers > most:
            raise _refused(f"recompute_layers = {layers}, but a chunk has {most} layers at most; use at most {most}")
    if plan.recompute_modules is not None and plan.recompute != "selective":
        raise _refused(
            f"recompute_modules with recompute = {plan.recompute!r}: they are what a selective one runs again; "
            "use recompute=selective"
        )
    names = plan.recomputed_modules
    if len({*names}) < len(names):
        raise _refused(f"recompute_modules = {plan.recompute_modules!r}: names one twice; keep one")
    for name in names:
        absent = _MODULES_ELSEWHERE.get(name)
        if absent is not None:
            raise _refused(f"recompute_modules: {name}: {absent} not simulated yet; leave it out")
        if name not in MODULES:
            raise _refused(f"recompute_modules: {name!r} is none; use {', '.join(MODULES)}, joined by +")


def most_layers(model: Model, plan: Plan) -> int:
    """Layers of the largest chunk."""
    return max(len(chunk.layers) for stage in chunks_of(model, plan) for chunk in stage)


def _check_host(model: Model, plan: Plan, workload: Workload) -> None:
    offloaded = plan.cpu_offload_layers
    if offloaded > 0 and plan.pp > 1:
        raise _refused(
            f"cpu_offload_layers = {offloaded} with pp = {plan.pp}, which Megatron-LM refuses; use recompute"
        )
    if offloaded >= model.layers and offloaded > 0:
        raise _refused(
            f"cpu_offload_layers = {offloaded}, but the last of the {model.layers} layers runs backward at once; "
            f"use at most {model.layers - 1}"
        )
    if offloaded > 0 and plan.cuda_graphs != "none":
        raise _refused(
            f"cpu_offload_layers = {offloaded} with cuda_graphs = {plan.cuda_graphs!r}: no graph copies to the host; "
            "leave one out"
        )
