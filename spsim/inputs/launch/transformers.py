"""A scenario as settings of transformers 5.24.0 and accelerate 1.12.0.

They are written only: `read` says what those that `settings` gives mean, and reads nobody's script. Model and length of
sequences come from a checkpoint and from data, plain data parallelism is DistributedDataParallel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.options import Options, flat_items
from spsim.inputs.plan_words import ROTATES

if TYPE_CHECKING:
    from spsim.inputs.plan import Plan
    from spsim.inputs.scenario import Scenario

LIBRARY = "transformers"
CALLED = "transformers"
VERSION = "5.24.0"

_KERNELS = {"unfused": "eager", **{name: name for name in ("flash_attention_2", "flash_attention_3")}}
"""Attention -> its implementation there; what torch picks by itself otherwise."""
_DTYPES = {"fp16": "float16", "fp32": "float32"}


def settings(scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Arguments by what takes them; what has none there is not in them."""
    plan, workload = scenario.plan, scenario.workload
    precision = workload.precision
    fully = plan.zero_stage > 1
    per_node = scenario.gpus_per_node
    found: dict[str, dict[str, Any]] = {
        "torchrun": {"nnodes": plan.gpus // per_node, "nproc_per_node": per_node},
        "from_pretrained": {
            "dtype": _DTYPES.get(precision, "bfloat16"),
            "attn_implementation": _KERNELS.get(scenario.model.attention, "sdpa"),
        },
        "DistributedConfig": {"tp_plan": "auto", "tp_size": plan.tp} if plan.tp > 1 else {},
        "ParallelismConfig": _degrees(plan),
        "TorchContextParallelConfig": (
            {"cp_comm_strategy": next((name for name, kind in ROTATES.items() if kind == plan.ring_kind), "allgather")}
            if plan.ring > 1
            else {}
        ),
        "TrainingArguments": {
            "per_device_train_batch_size": workload.micro_batch,
            "gradient_accumulation_steps": scenario.num_micro_batches,
            "bf16": precision not in _DTYPES or None,
            "fp16": precision == "fp16" or None,
            "gradient_checkpointing": plan.recompute == "full" or None,
            "torch_compile": scenario.model.kernels == "compiled" or None,
            "fsdp": fully or None,
            "fsdp_config": {"version": 2, "reshard_after_forward": plan.zero_stage == 3} if fully else None,
        },
    }
    return {part: {n: v for n, v in given.items() if v is not None} for part, given in found.items() if given}


def _degrees(plan: Plan) -> dict[str, Any]:
    group = plan.dp if plan.shard_group is None else plan.shard_group
    shards = group if plan.zero_stage > 1 else 1
    degrees = {
        "dp_replicate_size": plan.dp // shards if plan.zero_stage > 1 else 1,
        "dp_shard_size": shards, "tp_size": plan.tp, "cp_size": plan.ring, "sp_size": plan.ulysses,
    }  # fmt: skip
    return {name: degree for name, degree in degrees.items() if degree > 1}


def text(scenario: Scenario) -> str:
    """A snippet that names the settings, and the command that launches it."""
    given = settings(scenario)
    parts = [part for part in ("ParallelismConfig", "TorchContextParallelConfig") if part in given]
    names = [
        "AutoModelForCausalLM",
        *(["DistributedConfig"] if "DistributedConfig" in given else []),
        "TrainingArguments",
    ]
    lines = [
        f"# transformers {VERSION}, accelerate 1.12.0: {scenario.model.name}, {scenario.plan.label}.",
        f"# torchrun {' '.join(f'--{name} {value}' for name, value in given['torchrun'].items())} THIS_FILE",
        *(["from accelerate import ParallelismConfig"] if parts else []),
        *([f"from accelerate.utils import {parts[1]}"] if len(parts) > 1 else []),
        f"from transformers import {', '.join(names)}",
        "",
        "model = AutoModelForCausalLM.from_pretrained(",
        f'    "CHECKPOINT",  # of {scenario.model.name}',
        *_lines(given["from_pretrained"]),
    ]
    if "DistributedConfig" in given:
        lines.append(f"    distributed_config={_call('DistributedConfig', given['DistributedConfig'])},")
    lines += [")", "arguments = TrainingArguments(", *_lines(given["TrainingArguments"])]
    if parts:
        handler = [f"cp_handler={_call(part, given[part])}" for part in parts[1:]]
        degrees = [f"{name}={value}" for name, value in given["ParallelismConfig"].items()]
        lines.append(f"    parallelism_config=ParallelismConfig({', '.join([*degrees, *handler])}),")
    return "\n".join([*lines, ")"]) + "\n"


def _lines(arguments: dict[str, Any]) -> list[str]:
    return [f"    {name}={_literal(value)}," for name, value in arguments.items()]


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_literal(value)}' for key, value in arguments.items())})"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')


def drafted(scenario: Scenario) -> tuple[Draft, Options]:
    """What the settings of a scenario say."""
    options = Options(CALLED, flat_items(settings(scenario), CALLED))
    return read(options), options


def read(options: Options) -> Draft:
    """What settings say."""
    draft = Draft()
    plan = draft.plan
    for part, own in (("tp_size", "tp"), ("cp_size", "ring"), ("sp_size", "ulysses")):
        degree = options.number(f"ParallelismConfig.{part}", 1)
        if degree > 1:
            plan[own] = degree
    if "ring" in plan:
        plan["ring_kind"] = options.choice("TorchContextParallelConfig.cp_comm_strategy", ROTATES, ROTATES["allgather"])
    copies = options.number("ParallelismConfig.dp_replicate_size", 1)
    shards = options.number("ParallelismConfig.dp_shard_size", 1)
    if options.flag("TrainingArguments.fsdp"):
        again = options.flag("TrainingArguments.fsdp_config.reshard_after_forward")
        plan |= {"zero": 3 if again else 2, "dp_library": "fsdp", "dp": copies * shards}
        plan |= {"shard_group": shards} if copies > 1 else {}
    else:
        world = options.number("torchrun.nnodes", 1) * options.number("torchrun.nproc_per_node", 1)
        plan["dp"] = world // (plan.get("tp", 1) * plan.get("ring", 1) * plan.get("ulysses", 1))
    if options.flag("TrainingArguments.gradient_checkpointing"):
        plan["recompute"] = "full"
    micro = options.number("TrainingArguments.per_device_train_batch_size", 8)
    half = {name: options.flag(f"TrainingArguments.{name}") for name in ("bf16", "fp16")}
    steps = options.number("TrainingArguments.gradient_accumulation_steps", 1)
    if steps > 1:
        draft.workload["global_batch"] = micro * steps * plan["dp"]
    draft.workload |= {"micro_batch": micro, "precision": next((name for name, on in half.items() if on), "fp32")}
    return draft
