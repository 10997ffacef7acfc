"""DeepSpeed's JSON as settings of a scenario, both ways, as `deepspeed/runtime` of 0.19.8 reads it.

It has no model and no length of sequences: both come from elsewhere. Three numbers of sequences give the replicas:
`train_batch_size` = micro-batch x accumulation x replicas. `"auto"`, which Hugging Face's Trainer fills in, is open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.options import Options, beginning_with, flat_items, settings_named
from spsim.inputs.resources import parse_json

if TYPE_CHECKING:
    from spsim.inputs.scenario import Scenario

LIBRARY = "deepspeed"
CALLED = "DeepSpeed"
VERSION = "0.19.8"

AUTO = "auto"
NO_MATTER = beginning_with(
    "aio", "autotuning", "checkpoint", "comet", "comms_logger", "csv_monitor", "curriculum_learning", "dump_state",
    "elasticity", "flops_profiler", "fp16.auto_cast", "fp16.hysteresis", "fp16.initial_scale_power", "fp16.loss_scale",
    "fp16.loss_scale_window", "fp16.min_loss_scale", "gradient_clipping", "memory_breakdown", "monitor_config",
    "optimizer.params.betas", "optimizer.params.eps", "optimizer.params.lr", "optimizer.params.weight_decay",
    "prescale_gradients", "scheduler", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization.contiguous_gradients",
    "zero_optimization.elastic_checkpoint", "zero_optimization.load_from_fp32_weights",
    "zero_optimization.reduce_scatter", "zero_optimization.round_robin_gradients",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.sub_group_size",
)  # fmt: skip
"""Keys of logs, checkpoints, rates and losses; `reduce_scatter` changes nothing of what stages 1 and 2 send."""

_ZERO = "zero_optimization"
_DEFAULTS = {
    "allgather_partitions": True, "allgather_bucket_size": 500_000_000, "use_multi_rank_bucket_allreduce": True,
    "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000,
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
}  # fmt: skip
"""What a simulation assumes of stages; another value is listed."""
NUMBERS = settings_named((f"{_ZERO}.reduce_bucket_size", "train_micro_batch_size_per_gpu"))
_GRADIENTS: Mapping[str | None, str] = {
    None: "fp32", "fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "bf16",
}  # fmt: skip
_STAGES = {number: number for number in range(4)}


def read(options: Options) -> Draft:
    """The settings that a JSON says; `InputError` names the first key that says none."""
    draft = Draft()
    _leave_open(options)
    draft.read(options, NUMBERS, int)
    plan = draft.plan
    zero = options.choice(f"{_ZERO}.stage", _STAGES, 0)
    if zero:
        plan["zero"] = zero
    if zero == 1 and options.flag(f"{_ZERO}.overlap_comm"):
        plan["dp_overlap"] = "gradients"
    options.leave(f"{_ZERO}.overlap_comm", (zero > 1,))
    options.leave(f"{_ZERO}.reduce_bucket_size", (500_000_000,))
    for name, value in _DEFAULTS.items():
        options.leave(f"{_ZERO}.{name}", (value,))
    for name in ("offload_optimizer", "offload_param"):
        options.leave(f"{_ZERO}.{name}.device", ("none",))
    _read_degrees(options, draft)
    _read_precision(options, draft)
    _read_batch(options, draft)
    draft.ask("model", f"{options.where}: DeepSpeed's JSON has no model", "--model MODEL")
    draft.ask("workload.seq_len", f"{options.where}: DeepSpeed's JSON has no length of sequences", "--seq-len TOKENS")
    return draft


def _leave_open(options: Options) -> None:
    """What the Trainer fills in is as if it were not there."""
    for name, item in [*options.items.items()]:
        if item.value == AUTO:
            del options.items[name]
            options.aside.append(f"{item.where}: {item.shown}: left open, the Trainer fills it in")


def _read_degrees(options: Options, draft: Draft) -> None:
    plan = draft.plan
    ulysses = options.number("sequence_parallel_size", 1)
    if ulysses != 1:
        plan["ulysses"] = ulysses
    for name in ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size", "tensor_parallel.tp_size"):
        size = options.number(name, 1, least=0)
        if size > 1:
            plan["tp"] = size
    shards = options.number(f"{_ZERO}.mics_shard_size", -1, least=-1)
    if shards > 0:
        options.say(
            f"{_ZERO}.mics_shard_size", "groups that share shards are not simulated yet; all replicas share them"
        )
    options.leave("optimizer.type", ("Adam", "AdamW"))


def _read_precision(options: Options, draft: Draft) -> None:
    half = {name: options.flag(f"{name}.enabled") for name in ("bf16", "fp16")}
    half["bf16"] = half["bf16"] or options.flag("bfloat16.enabled")
    if all(half.values()):
        raise options.wrong("fp16.enabled", "one of bf16 and fp16")
    draft.workload["precision"] = next((name for name, on in half.items() if on), "fp32")
    if options.choice("data_types.grad_accum_dtype", _GRADIENTS, "fp32") == "bf16":
        draft.plan["grad_dtype"] = "bf16"


def _read_batch(options: Options, draft: Draft) -> None:
    """Two of the three numbers say the third, where the replicas are known; all three say the replicas."""
    micro = draft.workload.get("micro_batch")
    steps = options.number("gradient_accumulation_steps", None)
    whole = options.number("train_batch_size", None)
    if micro is None:
        draft.ask(
            "workload.micro_batch",
            f"{options.where}: train_micro_batch_size_per_gpu is open",
            "--micro-batch SEQUENCES",
        )
    if whole is not None:
        draft.workload["global_batch"] = whole
    if micro is None or steps is None or whole is None:
        text = (
            "the replicas follow from train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps"
        )
        draft.ask("plan.dp", f"{options.where}: {text}, which are not all there", "them: --set plan.dp=N")
        if whole is None and steps not in (None, 1):
            draft.ask("workload.global_batch", f"{options.where}: train_batch_size is open", "--global-batch SEQUENCES")
        return
    unit = micro * steps
    if whole % unit:
        raise options.wrong("train_batch_size", f"a multiple of micro-batch x accumulation = {unit}")
    draft.plan["dp"] = whole // unit
    if steps == 1:
        del draft.workload["global_batch"]


def document(scenario: Scenario) -> dict[str, Any]:
    """Keys and values; what has no key there is not in it."""
    plan, workload = scenario.plan, scenario.workload
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage > 0:
        zero["overlap_comm"] = plan.zero_stage > 1 or plan.dp_overlap in (True, "gradients")
    if plan.bucket_elements is not None:
        zero["reduce_bucket_size"] = plan.bucket_elements
    found: dict[str, Any] = {
        "train_batch_size": scenario.global_batch,
        "train_micro_batch_size_per_gpu": workload.micro_batch,
        "gradient_accumulation_steps": scenario.num_micro_batches,
        "bf16": {"enabled": workload.precision not in ("fp16", "fp32")},
        "fp16": {"enabled": workload.precision == "fp16"},
        _ZERO: zero,
    }
    if plan.grad_dtype != "fp32":
        found["data_types"] = {"grad_accum_dtype": plan.grad_dtype}
    if plan.ulysses > 1:
        found["sequence_parallel_size"] = plan.ulysses
    if plan.tp > 1:
        found["tensor_parallel"] = {"autotp_size": plan.tp}
    return found


def drafted(text: str, path: Path) -> tuple[Draft, Options]:
    """What the text of a file says."""
    options = Options(str(path), flat_items(parse_json(text, str(path)), str(path)))
    return read(options), options


def text(scenario: Scenario) -> str:
    """The JSON of a scenario."""
    return json.dumps(document(scenario), indent=2) + "\n"
