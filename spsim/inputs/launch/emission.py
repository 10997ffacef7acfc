"""Writes a scenario as the flags or configuration of a training library: `emit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spsim.errors import InputError
from spsim.inputs.effects import reasons
from spsim.inputs.launch import deepspeed, megatron, torchtitan, transformers
from spsim.inputs.launch.draft import WAYS, Draft
from spsim.inputs.launch.options import Options
from spsim.inputs.libraries import library_defaults, module_defaults
from spsim.inputs.model import Model
from spsim.inputs.plan import MESH_ORDER, Plan
from spsim.inputs.presets import PRESET, load_model, model_of
from spsim.inputs.scenario import Scenario
from spsim.inputs.stages import all_chunks
from spsim.inputs.step_rules import overlaps_messages, sends
from spsim.inputs.workload import Workload

EMITTED = ("megatron", "torchtitan", "deepspeed", "transformers")
"""Libraries that a scenario is written for."""

_PASSED_OVER = frozenset({"name", "left_out", *WAYS})
"""Fields of a model that are no sizes or traits: what it is called, and how its modules run."""

_OF_SHARDS = ("zero", "distributed_optimizer", "dp_library")


@dataclass(frozen=True)
class Emission:
    """A scenario as a library takes it."""

    text: str
    """A script, a configuration file or a snippet."""
    unsaid: tuple[str, ...]
    """Settings that the text does not say, each with what the library does instead."""


def emit(scenario: Scenario, library: str) -> Emission:
    """A scenario as flags of `megatron`, or as the configuration of `torchtitan`, `deepspeed` or `transformers`.

    What is written is read back: every setting that does not come back as it was has no counterpart, and is listed.
    """
    if library not in EMITTED:
        raise InputError(
            f"--emit {library!r}: is no library that a plan is written for; use one of {', '.join(EMITTED)}"
        )
    if scenario.is_served:
        raise InputError(
            f"--emit {library!r}: a {scenario.workload.phase} is inference, and what is written trains; leave phase out"
        )
    plain = scenario.model_copy(update={"plan": _active(scenario.model, scenario.plan)})
    if library == "transformers":
        draft, options = transformers.drafted(plain)
        return Emission(transformers.text(plain), (*_unsaid(scenario, draft, options, transformers),))
    module = {"megatron": megatron, "torchtitan": torchtitan, "deepspeed": deepspeed}[library]
    written = module.text(plain)
    draft, options = module.drafted(written, Path(module.CALLED))
    return Emission(written, (*_unsaid(scenario, draft, options, module),))


def _active(model: Model, plan: Plan) -> Plan:
    """A plan without options that change nothing, which libraries refuse; an optimizer may need to know that it could
    be sharded.
    """
    usual = library_defaults(plan.library, plan.pp)
    idle = {name for name, reason in reasons(model, plan).items() if reason} - {*_OF_SHARDS}
    return plan.model_copy(
        update={name: usual.get(name, Plan.model_fields[name].default) for name in idle if name in Plan.model_fields}
    )


def _unsaid(scenario: Scenario, draft: Draft, options: Options, module: Any) -> Iterator[str]:
    called = module.CALLED
    yield from options.aside
    if scenario.scope == "layers":
        yield f"scope = 'layers' has no counterpart in {called}, which runs whole steps"
    yield from _of_model(scenario.model, draft, module)
    plan = Plan(**{**draft.plan, "library": module.LIBRARY})
    yield from _of_plan(scenario, plan, called)
    own, workload = scenario.workload, {"seq_len": None, **draft.workload}
    if workload["seq_len"] is None:
        yield f"workload.seq_len = {own.seq_len} is not in {called}'s configuration; it comes from the data"
        workload["seq_len"] = own.seq_len
    read = Workload(**workload)
    batches = {"global_batch": (scenario.global_batch, read.global_batch or read.micro_batch * plan.dp)}
    for name in Workload.model_fields:
        mine, other = batches.get(name, (getattr(own, name), getattr(read, name)))
        yield from _differing(f"workload.{name}", mine, other, called)


def _differing(path: str, own: Any, read: Any, called: str) -> Iterator[str]:
    if own != read:
        yield f"{path} = {own!r} has no counterpart in {called}, which has {read!r}"


def _of_model(model: Model, draft: Draft, module: Any) -> Iterator[str]:
    table = draft.settings().get("model")
    if table is None or not (isinstance(table, str) or {"layers", PRESET} & table.keys()):
        yield f"model = {model.name!r} is not in {module.CALLED}'s configuration; it comes with the code or checkpoint"
        return
    read = (load_model(table) if isinstance(table, str) else model_of(table)).as_in(module_defaults(module.LIBRARY))
    for name in Model.model_fields:
        if name not in _PASSED_OVER and (name != "max_positions" or model.positions == "learned"):
            yield from _differing(f"model.{name}", getattr(model, name), getattr(read, name), module.CALLED)
    for name, own, other in zip(WAYS, model.runs_as, read.runs_as, strict=False):
        yield from _differing(f"model.{name}", own, other, module.CALLED)


def _of_plan(scenario: Scenario, read: Plan, called: str) -> Iterator[str]:
    """Options that come back otherwise; those that another library's are by themselves in one line."""
    own, back = effective(scenario.model, scenario.plan), effective(scenario.model, read)
    differing = {name: value for name, value in own.items() if name != "library" and back.get(name, value) != value}
    usual = library_defaults(read.library, read.pp)
    by_itself = [name for name in differing if name in usual and back[name] == usual[name]]
    if read.library != scenario.plan.library:
        has = ", ".join(f"{name} = {back[name]!r}" for name in by_itself) or "nothing else"
        yield f"plan.library = {scenario.plan.library!r}, but {called} is {read.library!r}, which has {has}"
    else:
        by_itself = []
    for name, value in differing.items():
        if name not in by_itself:
            yield from _differing(f"plan.{name}", value, back[name], called)


def effective(model: Model, plan: Plan) -> dict[str, Any]:
    """What a plan does, by option: without those that change nothing, and of several ways to say one thing one."""
    idle = reasons(model, plan)
    found = {name: getattr(plan, name) for name in Plan.model_fields if not idle.get(name)}
    if {"zero", "distributed_optimizer"} & found.keys():
        found["zero"] = plan.zero_stage
    found.pop("distributed_optimizer", None)
    if plan.dp_overlap is True and plan.zero_stage == 0:
        found["dp_overlap"] = "gradients"
    found["shard_group"] = plan.shard_group or plan.dp
    if "expert_tp" in found:
        found["expert_tp"] = plan.expert_tp or plan.tp
    found["mesh_order"] = MESH_ORDER if idle["mesh_order"] else plan.mesh_order
    if plan.pp > 1:
        layers = tuple(len(chunk.layers) for chunk in all_chunks(model, plan))
        found |= {"pp_layout": layers, "pp_sends": sends(plan), "pp_overlap": overlaps_messages(plan)}
    if (plan.recompute, plan.recompute_method, plan.recompute_layers) == ("full", "uniform", 1):
        found |= {"recompute_method": "block", "recompute_layers": None}
    return found
