"""The rules among the options of a whole step: pipeline, replicas, optimizer, recomputation.

Each error names the value, the rule and the fix.

What libraries refuse is refused: Megatron-Core 0.16, torch.distributed.pipelining 2.13, DeepSpeed 0.19.
"""

from __future__ import annotations

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.schedules import GROUPED, Library, refused_exchange, refused_schedule
from spsim.inputs.stages import chunks_of
from spsim.inputs.workload import Workload

MAX_GPUS = 2**20
"""Of a plan; ten times the largest that trained anything."""
KEPT_CHUNKS = 3
"""Of a stage, whose weights torch's pipelines keep gathered (`max_active_stages` of `_add_unshard_reshard`)."""
MAX_STEPS_OF_RINGS = 50_000
"""Of several pipeline stages whose ranks are simulated one by one; more take minutes."""
OF_EXPERTS = ("moe", "moe_act", "shared_experts")
MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "mlp_act", *OF_EXPERTS)
"""What a selective recomputation may run again (`recompute_modules` of Megatron-LM)."""

CAST_ATTENTION = ("fp8", "mxfp8")
"""Recipes in which core attention may run in 8 bits."""


def check_step(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules among options of the whole step; `InputError` names the first broken."""
    for check in _CHECKS:
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
    if plan.pp > 1 or plan.pp_layout is not None:
        chunks_of(model, plan)
    if plan.pp > 1:
        _check_messages(plan)
        global_batch = workload.global_batch or workload.micro_batch * plan.dp
        count = global_batch // (workload.micro_batch * plan.dp)
        if reason := refused_count(plan, count):
            raise _refused(f"{plan.label} with {count} micro-batches (global_batch / (micro_batch x dp)): {reason}")
        _check_differing(model, plan, count)


def _check_differing(model: Model, plan: Plan, micro_batches: int) -> None:
    """Ranks of a stage that differ end their passes apart, so that none stands for another."""
    apart = plan.ring_cut == "contiguous" and model.causal and model.attention != "unfused"
    steps = model.layers * micro_batches * plan.ring**2
    if plan.ring > 1 and apart and steps > MAX_STEPS_OF_RINGS:
        raise _refused(
            f"ring_cut = 'contiguous' with pp = {plan.pp}: under a causal mask every rank does something else, and of "
            f"layers x micro-batches x ring x ring at most {MAX_STEPS_OF_RINGS:,} are simulated, not {steps:,}; "
            "use ring_cut=zigzag, a smaller ring or a smaller global_batch"
        )


def refused_count(plan: Plan, micro_batches: int) -> str | None:
    """Why a schedule does not run so many micro-batches of a replica, or None."""
    if plan.pp == 1:
        return None
    return refused_schedule(
        plan.pp_schedule, sends(plan), plan.pp, plan.virtual_pp, micro_batches, plan.pp_group if grouped(plan) else None
    )


def grouped(plan: Plan) -> bool:
    """Whether a chunk runs a group of micro-batches before the next takes over."""
    return plan.pp > 1 and plan.virtual_pp > 1 and plan.pp_schedule in GROUPED


def _check_messages(plan: Plan) -> None:
    """Of Megatron's two ways to send, overlapped and batched, which are one option here."""
    if sends(plan) == "torch":
        return
    overlap = overlaps_messages(plan)
    if reason := refused_exchange(plan.virtual_pp, plan.pp, overlap=overlap, batched=not overlap):
        raise _refused(f"{plan.label} with pp_overlap = {plan.pp_overlap}: {reason}")
    if plan.pp_warmup_flush and not overlap:
        raise _refused(
            "pp_warmup_flush overlaps the messages of warm-up and cool-down where others overlap; "
            "add virtual_pp, without pp_overlap=false, or leave it out"
        )


def sends(plan: Plan) -> Library:
    """Whose way to post messages and wait for them a plan has."""
    return plan.pp_sends or ("megatron" if plan.pp_schedule == "1f1b" else "torch")


def overlaps_messages(plan: Plan) -> bool:
    """Whether passes go on while messages of Megatron's kind are under way."""
    return plan.virtual_pp > 1 if plan.pp_overlap is None else plan.pp_overlap


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
    if library == "ddp" and zero > 0:
        raise _refused(
            f"zero = {zero} with dp_library = 'ddp', which shards nothing; use dp_library=megatron or dp_library=fsdp"
        )
    if plan.pp > 1:
        _check_replicas_of_stages(model, plan)
    _check_shard_group(plan)
    if plan.dp_overlap == "parameters" and zero == 0:
        raise _refused(
            "dp_overlap = 'parameters' without a sharded optimizer: there are none to gather; add distributed_optimizer"
        )


def _check_replicas_of_stages(model: Model, plan: Plan) -> None:
    """What libraries have of replicas of several stages: Megatron-Core and DeepSpeed's `PipelineEngine` ZeRO-1 at most,
    torch `fully_shard` with weights that stay gathered (torchtitan's default with stages) and DDP.
    """
    library, zero, given = plan.dp_library, plan.zero_stage, f"with pp = {plan.pp}"
    if zero > 1 and library in ("megatron", "deepspeed"):
        raise _refused(
            f"zero = {zero} {given}: under dp_library = {library!r} stages accumulate whole gradients; "
            "use zero=1, or dp_library=fsdp with zero=2"
        )
    if zero == 3:
        raise _refused(
            f"zero = 3 {given} and dp_library = 'fsdp' gathers weights for each micro-batch: not simulated yet; use "
            "zero=2, which keeps them gathered from the first micro-batch to the last, as torchtitan does"
        )
    if library == "fsdp" and plan.virtual_pp > KEPT_CHUNKS:
        raise _refused(
            f"virtual_pp = {plan.virtual_pp} with dp_library = 'fsdp': torch keeps the weights of {KEPT_CHUNKS} chunks "
            f"and gathers others again, which is not simulated yet; use virtual_pp={KEPT_CHUNKS} or less"
        )
    if library in ("fsdp", "ddp") and model.tied_embeddings and model.head_rows == model.vocab:
        raise _refused(
            f"dp_library = {library!r} {given}: torch's stages share no embedding, which the model ties; "
            "use dp_library=megatron or a model with tied_embeddings = false"
        )
    if library == "deepspeed" and (plan.virtual_pp > 1 or plan.pp_schedule != "1f1b"):
        raise _refused(f"dp_library = 'deepspeed' {given} runs 1f1b alone; leave out pp_schedule and virtual_pp")
    if library == "ddp" and (plan.pp_schedule not in ("1f1b", "gpipe") or plan.virtual_pp > 1):
        raise _refused(
            f"dp_library = 'ddp' {given}: torch's DDP loses its buckets where chunks or halves of passes take turns; "
            "use dp_library=fsdp, or 1f1b or gpipe without virtual_pp"
        )


def _check_shard_group(plan: Plan) -> None:
    group = plan.shard_group
    if group is None:
        return
    if plan.zero_stage < 2:
        raise _refused(f"shard_group = {group} without sharded parameters; add zero=3 or leave it out")
    if plan.dp_library == "deepspeed":
        raise _refused(f"shard_group = {group} with dp_library = 'deepspeed': not simulated yet; use dp_library=fsdp")
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
        _check_units(model, plan, layers)
        most = most_layers(model, plan)
        if layers > most:
            raise _refused(f"recompute_layers = {layers}, but a chunk has {most} layers at most; use at most {most}")
    if plan.recompute_modules is not None and plan.recompute != "selective":
        raise _refused(
            f"recompute_modules with recompute = {plan.recompute!r}: they are what a selective one runs again; "
            "use recompute=selective"
        )
    _check_modules(model, plan)


def _check_units(model: Model, plan: Plan, size: int) -> None:
    """Units of layers are made of the program of one."""
    chunks = [chunk.layers for stage in chunks_of(model, plan) for chunk in stage] if len(model.types) > 1 else []
    units = [own[place : place + size] for own in chunks for place in range(0, len(own), size)]
    mixed = next((unit for unit in units if len({*map(model.type_of, unit)}) > 1), None)
    if plan.recompute_method == "uniform" and mixed:
        raise _refused(
            f"recompute_layers = {size} makes a unit of layers {mixed[0]} to {mixed[-1]}, which are not alike: not "
            "simulated; use recompute_layers=1"
        )


def _check_modules(model: Model, plan: Plan) -> None:
    names = plan.recomputed_modules
    if len({*names}) < len(names):
        raise _refused(f"recompute_modules = {plan.recompute_modules!r}: names one twice; keep one")
    for name in names:
        if name == "mla_up_proj" and model.kv_lora_rank is None:
            raise _refused(f"recompute_modules: {name}: {model.name} has no latent attention; leave it out")
        if name in OF_EXPERTS and model.experts is None:
            raise _refused(f"recompute_modules: {name}: {model.name} has no experts; leave it out")
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
    if offloaded > 0 and plan.recompute != "none":
        raise _refused(
            f"cpu_offload_layers = {offloaded} with recompute = {plan.recompute!r}, which Megatron-LM refuses; keep one"
        )
    if offloaded > 0 and plan.cuda_graphs != "none":
        raise _refused(
            f"cpu_offload_layers = {offloaded} with cuda_graphs = {plan.cuda_graphs!r}: no graph copies to the host; "
            "leave one out"
        )


def _check_casts(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.fp8_output_proj and workload.precision != "mxfp8":
        raise _refused(
            f"fp8_output_proj with precision = {workload.precision!r}: Megatron-Core casts the output layer under "
            "mxfp8 only; use mxfp8 or leave it out"
        )
    if not plan.fp8_dot_product_attention:
        return
    if workload.precision not in CAST_ATTENTION:
        raise _refused(
            f"fp8_dot_product_attention with precision = {workload.precision!r}: simulated under "
            f"{' and '.join(CAST_ATTENTION)} only; use one of them or leave it out"
        )
    if model.attention == "unfused" or plan.ring > 1 or plan.ulysses > 1:
        raise _refused(
            "fp8_dot_product_attention with unfused attention, ring or ulysses: not simulated yet; use tp or leave it "
            "out"
        )


_CHECKS = (
    _check_world, _check_pipeline, _check_replicas, _check_optimizer, _check_recompute, _check_host, _check_casts,
)  # fmt: skip
