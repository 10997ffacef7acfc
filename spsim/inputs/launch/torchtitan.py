"""torchtitan's TOML as settings of a scenario, both ways, as `torchtitan/config/job_config.py` of 0.2.2 has it.

A key that is left out has the default of that file: all ranks that are left shard parameters, every second layer is
recomputed, 8 sequences a rank. Over a pipeline embedding and output take the place of a layer each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import WAYS, Draft, stages_as
from spsim.inputs.launch.flavors import FLAVORS, SIZES
from spsim.inputs.launch.options import Options, beginning_with, flat_items, settings_named
from spsim.inputs.plan_words import ROTATES, SCHEDULES
from spsim.inputs.resources import parse_toml
from spsim.inputs.stages import all_chunks
from spsim.inputs.words import plain

if TYPE_CHECKING:
    from spsim.inputs.model import Model
    from spsim.inputs.plan import Plan
    from spsim.inputs.scenario import Scenario

LIBRARY = "torchtitan"
CALLED = "torchtitan"
VERSION = "0.2.2"

NUMBERS = settings_named((
    "training.seq_len", "parallelism.tensor_parallel_degree", "parallelism.pipeline_parallel_degree",
))  # fmt: skip
_NAMES = ("1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Of schedules, as torch.distributed.pipelining spells them."""
_SINGLE = ("1F1B", "GPipe")
"""Those of one chunk a rank; the others have two unless their layers are given."""
NO_MATTER = beginning_with(
    "checkpoint", "comm", "debug", "experimental", "fault_tolerance", "job", "lr_scheduler", "memory_estimation",
    "metrics", "model.hf_assets_path", "model.print_after_conversion", "model.tokenizer_path", "optimizer.beta1",
    "optimizer.beta2", "optimizer.eps", "optimizer.lr", "optimizer.weight_decay", "profiling", "training.dataloader",
    "training.dataset", "training.dataset_path", "training.gc_debug", "training.gc_freq", "training.max_norm",
    "training.steps", "validation",
)  # fmt: skip
"""Tables and keys of paths, logs, checkpoints, seeds, rates and numbers of steps."""

_MASKED = ("_flex", "_varlen")
"""Endings of flavors whose mask ends at documents."""
_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}
_FLOAT8 = "quantize.linear.float8"
_MX = "quantize.linear.mx"


# ------------------------------------------------------------ from tables to settings


def read(options: Options) -> Draft:
    """The settings that tables say; `InputError` names the first key that says none."""
    draft = Draft()
    draft.read(options, NUMBERS, int)
    draft.workload.setdefault("seq_len", 2048)
    _read_model(options, draft)
    _read_precision(options, draft)
    _read_compile(options, draft)
    _read_parallelism(options, draft)
    _read_replicas(options, draft)
    _read_stages(options, draft)
    _read_batch(options, draft)
    _read_recompute(options, draft)
    return draft


def _read_model(options: Options, draft: Draft) -> None:
    name, flavor = str(options.take("model.name", "llama3")), str(options.take("model.flavor", "debugmodel"))
    base = re.sub(rf"({'|'.join(_MASKED)})$", "", flavor)
    if (name, base) in FLAVORS:
        draft.preset = FLAVORS[name, base]
    elif (name, base) in SIZES:
        draft.model |= {"name": f"{name}-{base}", **SIZES[name, base]}
    else:
        where = "model.flavor" if "model.flavor" in options else "model.name"
        known = ", ".join(f"{other} {size}" for other, size in (*FLAVORS, *SIZES))
        draft.ask("model", f"{options.where}: {where}: {name} {flavor} is none of {known}", "--model MODEL")
    if base != flavor and "model.flavor" in options:
        options.say("model.flavor", "its mask ends at documents; simulated as causal over the sequence")


def _read_precision(options: Options, draft: Draft) -> None:
    precision = options.choice("training.mixed_precision_param", _PRECISIONS, "bf16")
    options.leave("training.mixed_precision_reduce", ("float32",))
    options.leave("training.dtype", ("float32",))
    options.leave("training.enable_cpu_offload", (False,))
    converters = options.take("model.converters", [])
    converters = converters if isinstance(converters, list) else [converters]
    for converter in converters:
        if converter in (_FLOAT8, "float8"):
            precision = "fp8"
            if options.take(f"{_FLOAT8}.recipe_name", "tensorwise") != "tensorwise":
                options.say(f"{_FLOAT8}.recipe_name", "simulated with one scale a tensor")
        elif converter in (_MX, "mx"):
            precision = "mxfp8"
            options.leave(f"{_MX}.recipe_name", ("mxfp8_cublas",))
        else:
            raise options.wrong("model.converters", f"{_FLOAT8} or {_MX}")
    for table in (_FLOAT8, _MX):
        options.leave(f"{table}.filter_fqns", (["output"],))
    off = precision not in ("fp8", "mxfp8")
    for name, item in options.items.items():
        if name.startswith("quantize.") and (off or item.value is False):
            options.taken.add(name)
    draft.workload["precision"] = precision


def _read_compile(options: Options, draft: Draft) -> None:
    parts = options.take("compile.components", ["model", "loss"])
    options.leave("compile.backend", ("inductor",))
    if options.flag("compile.enable") and "model" in parts:
        draft.model["kernels"] = "compiled"


def _read_parallelism(options: Options, draft: Draft) -> None:
    plan = draft.plan
    if options.flag("parallelism.enable_async_tensor_parallel"):
        plan["tp_overlap"] = True
    plan["loss_parallel"] = not options.flag("parallelism.disable_loss_parallel")
    ring = options.number("parallelism.context_parallel_degree", 1)
    kind = options.choice("parallelism.context_parallel_rotate_method", ROTATES, ROTATES["allgather"])
    if ring != 1:
        plan |= {"ring": ring, "ring_kind": kind}
    options.leave("parallelism.context_parallel_load_balancer", ("headtail",))
    _read_experts(options, draft)
    options.leave("optimizer.name", ("AdamW",))
    options.leave("optimizer.implementation", ("fused",))
    options.leave("optimizer.early_step_in_backward", (False,))


def _read_experts(options: Options, draft: Draft) -> None:
    """Experts are whole on a rank, unless they are split over tp."""
    plan = draft.plan
    spread = options.number("parallelism.expert_parallel_degree", 1)
    sharing = options.number("parallelism.expert_tensor_parallel_degree", 1)
    if spread > 1:
        plan["ep"] = spread
        if sharing != plan.get("tp", 1):
            plan["expert_tp"] = sharing
        options.leave("parallelism.expert_parallel_comm_backend", ("standard",))


def _read_replicas(options: Options, draft: Draft) -> None:
    """Copies of groups that shard: FSDP, HSDP, or DDP where nothing is sharded."""
    plan = draft.plan
    copies = options.number("parallelism.data_parallel_replicate_degree", 1)
    shards = options.number("parallelism.data_parallel_shard_degree", -1, least=-1)
    policies = {"default": plan.get("pp", 1) == 1, "always": True, "never": False}
    again = options.choice("parallelism.fsdp_reshard_after_forward", policies, policies["default"])
    if shards == 1 and copies > 1 and plan.get("ring", 1) == 1:
        plan |= {"zero": 0, "dp_library": "ddp"}
    elif not again:
        plan["zero"] = 2
    if shards == -1:
        text = f"{options.where}: parallelism.data_parallel_shard_degree = -1: the ranks that are left are not said"
        draft.ask("plan.dp", text, "all replicas: --set plan.dp=N")
        if copies > 1:
            draft.ask("plan.shard_group", text, "those that share parameters: --set plan.shard_group=N")
        return
    plan["dp"] = copies * shards
    if copies > 1 and shards > 1:
        plan["shard_group"] = shards


def _read_stages(options: Options, draft: Draft) -> None:
    plan = draft.plan
    pp, layers = plan.get("pp", 1), _layers(draft)
    names = {plain(name): name for name in _NAMES}
    schedule = options.take("parallelism.pipeline_parallel_schedule", "1F1B")
    if plain(str(schedule)) not in names:
        raise options.wrong("parallelism.pipeline_parallel_schedule", f"one of {', '.join(_NAMES)}")
    options.leave("parallelism.pipeline_parallel_schedule_csv", ("",))
    if pp > 1 and layers is None:
        return
    less = [
        options.number(f"parallelism.pipeline_parallel_{end}_stage_less_layers", 1, least=0)
        for end in ("first", "last")
    ]
    each = options.number("parallelism.pipeline_parallel_layers_per_stage", None)
    modules = options.take("parallelism.module_fqns_per_model_part")
    if pp == 1 or layers is None:
        return
    plan |= SCHEDULES[plain(str(schedule))]
    looped = names[plain(str(schedule))] not in _SINGLE
    counts = _chunks(options, layers, pp * 2 if looped else pp, less, each) if modules is None else _listed(options)
    if len(counts) % pp or sum(counts) != layers:
        key = "pipeline_parallel_layers_per_stage" if modules is None else "module_fqns_per_model_part"
        key = f"parallelism.{key}"
        key = key if key in options else "parallelism.pipeline_parallel_degree"
        raise options.wrong(key, f"what hands {layers} layers to a multiple of the {pp} stages")
    plan["virtual_pp"] = len(counts) // pp
    stages_as(draft, counts)


def _layers(draft: Draft) -> int | None:
    from spsim.inputs.presets import PRESETS

    return PRESETS[draft.preset].layers if draft.preset is not None else draft.model.get("layers")


def _listed(options: Options) -> list[int]:
    """Layers of each chunk whose modules are listed."""
    name = "parallelism.module_fqns_per_model_part"
    modules = options.take(name)
    if not isinstance(modules, list) or not all(isinstance(part, list) for part in modules):
        raise options.wrong(name, "a list of names for each chunk")
    return [sum(str(module).startswith("layers.") for module in part) for part in modules]


def _chunks(options: Options, layers: int, usual: int, less: list[int], each: int | None) -> list[int]:
    """Layers of each chunk where embedding and output take the place of some."""
    weighted = layers + sum(less)
    chunks = usual if each is None else -(-weighted // each)
    if chunks > weighted or (chunks > 1 and max(less) > weighted // chunks):
        name = f"parallelism.pipeline_parallel_{'degree' if each is None else 'layers_per_stage'}"
        raise options.wrong(name, f"at most {weighted} chunks, with embedding and output in one layer's place each")
    return _spread(layers, chunks, less)


def _spread(layers: int, chunks: int, less: list[int]) -> list[int]:
    """Of so many chunks (`generate_llm_fqn_per_model_part`): what is over goes to the first ones."""
    each, more = divmod(layers + sum(less), chunks)
    counts = [each + (number < more) for number in range(chunks)]
    counts[0] -= less[0]
    counts[-1] -= less[1]
    return counts


def _read_batch(options: Options, draft: Draft) -> None:
    """Without a pipeline a micro-batch is what a rank takes at once; a pipeline cuts that."""
    local = options.number("training.local_batch_size", 8)
    whole = options.number("training.global_batch_size", -1, least=-1)
    piece = options.number("parallelism.pipeline_parallel_microbatch_size", 1)
    pipeline, dp = draft.plan.get("pp", 1) > 1, draft.plan.get("dp")
    draft.workload["micro_batch"] = piece if pipeline else local
    if whole > 0:
        draft.workload["global_batch"] = whole
        if pipeline and dp is not None and whole != local * dp:
            options.say("training.global_batch_size", "simulated as one pipeline of all micro-batches of a step")
    elif pipeline and dp is None:
        text = f"{options.where}: training.global_batch_size is that of ranks that are not said"
        draft.ask("workload.global_batch", text, "--global-batch SEQUENCES")
    elif pipeline and dp is not None and local != piece:
        draft.workload["global_batch"] = local * dp


def _read_recompute(options: Options, draft: Draft) -> None:
    modes = {name: name for name in ("none", "full", "selective", "memory_budget")}
    mode = options.choice("activation_checkpoint.mode", modes, "selective")
    every = str(options.take("activation_checkpoint.selective_ac_option", "2"))
    draft.plan["recompute_early_stop"] = options.flag("activation_checkpoint.early_stop")
    for name in ("preserve_rng_state", "determinism_check", "debug", "visualize_memory_budget_pareto"):
        options.leave(f"activation_checkpoint.{name}", (True, False, "default"))
    layers = _layers(draft)
    if mode == "full" or (mode == "selective" and every == "1"):
        draft.plan["recompute"] = "full"
        return
    if mode == "none":
        return
    text = f"activation_checkpoint.mode = {mode!r} with selective_ac_option = {every!r}"
    if mode == "selective" and every.isdecimal() and layers is not None:
        chunks = draft.plan.get("pp", 1) * draft.plan.get("virtual_pp", 1)
        count = -(-layers // chunks) // max(int(every), 1)
        if count:
            draft.plan |= {"recompute": "full", "recompute_layers": count}
        options.aside.append(f"{options.where}: {text}: simulated as the first {count} layers of a chunk, not each nth")
    else:
        options.aside.append(
            f"{options.where}: {text}: its choice of operators is not simulated; nothing is recomputed"
        )


# ------------------------------------------------------------ from a scenario to tables


def tables(scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Tables by name; what has no key there is not in them."""
    model, plan, workload = scenario.model, scenario.plan, scenario.workload
    pipeline = plan.pp > 1
    local = scenario.global_batch // plan.dp if pipeline else workload.micro_batch
    training: dict[str, Any] = {"local_batch_size": local, "seq_len": workload.seq_len}
    if workload.global_batch is not None and not pipeline:
        training["global_batch_size"] = workload.global_batch
    training["mixed_precision_param"] = "float32" if workload.precision == "fp32" else "bfloat16"
    converter = {"fp8": _FLOAT8, "mxfp8": _MX}.get(workload.precision)
    name, flavor = _flavor(model)
    found: dict[str, dict[str, Any]] = {
        "model": {"name": name, "flavor": flavor, **({"converters": [converter]} if converter else {})},
        "training": training,
        "parallelism": {**_degrees(plan), **(_stages(plan, model, workload.micro_batch) if pipeline else {})},
        "activation_checkpoint": {**_recompute(plan, model), "early_stop": plan.recompute_early_stop or None},
    }
    if model.kernels == "compiled":
        found["compile"] = {"enable": True, "components": ["model", "loss"]}
    return found | ({converter: {"filter_fqns": ["output"]}} if converter else {})


def drafted(text: str, path: Path) -> tuple[Draft, Options]:
    """What the text of a file says."""
    options = Options(str(path), flat_items(parse_toml(text, str(path)), str(path)))
    return read(options), options


def text(scenario: Scenario) -> str:
    """The TOML of a scenario, and the command that launches it."""
    per_node = scenario.gpus_per_node
    launch = f"torchrun --nnodes {scenario.plan.gpus // per_node} --nproc_per_node {per_node} -m torchtitan.train"
    lines = [
        f"# torchtitan {VERSION}: {scenario.model.name}, {scenario.plan.label}.",
        f"# {launch} --job.config_file THIS_FILE",
    ]
    for name, table in tables(scenario).items():
        lines += [
            "",
            f"[{name}]",
            *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None),
        ]
    return "\n".join(lines) + "\n"


def _flavor(model: Model) -> tuple[str, str]:
    """Name and flavor of a model's sizes, or its name for a flavor that is to be added."""
    from spsim.inputs.model import Model
    from spsim.inputs.presets import PRESETS

    sizes = {**{key: PRESETS[name] for key, name in FLAVORS.items()}, **{k: Model(**v) for k, v in SIZES.items()}}
    apart = {"name", "left_out", "attention", "max_positions", *WAYS}
    own = model.model_dump(exclude=apart)
    return next((key for key, other in sizes.items() if other.model_dump(exclude=apart) == own), ("llama3", model.name))


def _degrees(plan: Plan) -> dict[str, Any]:
    group = plan.dp if plan.shard_group is None else plan.shard_group
    shards = group if plan.zero_stage > 1 else 1
    again = {2: "never", 3: "always" if plan.pp > 1 else None}.get(plan.zero_stage)
    rotate = next((name for name, kind in ROTATES.items() if kind == plan.ring_kind), "allgather")
    return {
        "data_parallel_replicate_degree": plan.dp // shards,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": again,
        "tensor_parallel_degree": plan.tp,
        "enable_async_tensor_parallel": plan.tp_overlap or None,
        "disable_loss_parallel": not plan.loss_parallel or None,
        "pipeline_parallel_degree": plan.pp,
        "context_parallel_degree": plan.ring,
        "expert_parallel_degree": plan.ep if plan.ep > 1 else None,
        "expert_tensor_parallel_degree": plan.tp if plan.ep > 1 and plan.expert_tp in (None, plan.tp) else None,
        "context_parallel_rotate_method": rotate if plan.ring > 1 else None,
    }


def _stages(plan: Plan, model: Model, micro_batch: int) -> dict[str, Any]:
    schedule = next(
        (name for name in _NAMES if SCHEDULES[plain(name)]["pp_schedule"] == plan.pp_schedule
         and (name in _SINGLE) == (plan.virtual_pp == 1)), "1F1B",
    )  # fmt: skip
    counts = [len(chunk.layers) for chunk in all_chunks(model, plan)]
    found: dict[str, Any] = {"pipeline_parallel_schedule": schedule, "pipeline_parallel_microbatch_size": micro_batch}
    for less in ([1, 1], [0, 0]):
        each = -(-(model.layers + sum(less)) // len(counts))
        if _spread(model.layers, len(counts), less) == counts and -(-(model.layers + sum(less)) // each) == len(counts):
            ends = {f"pipeline_parallel_{end}_stage_less_layers": less[0] for end in ("first", "last")}
            return {**found, **ends, "pipeline_parallel_layers_per_stage": each}
    return {**found, "module_fqns_per_model_part": _modules(counts)}


def _modules(counts: list[int]) -> list[list[str]]:
    names = [f"layers.{number}" for number in range(sum(counts))]
    parts = [[names.pop(0) for _ in range(count)] for count in counts]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return parts


def _recompute(plan: Plan, model: Model) -> dict[str, Any]:
    if plan.recompute == "full" and plan.recompute_layers is None:
        return {"mode": "full"}
    layers = plan.recompute_layers
    if plan.recompute == "full" and layers is not None and plan.pp == 1 and plan.recompute_method == "block":
        every = model.layers // layers
        if every > 1 and model.layers // every == layers:
            return {"mode": "selective", "selective_ac_option": str(every)}
    return {"mode": "none"}
