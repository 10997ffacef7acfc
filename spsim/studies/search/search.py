"""The public entry: `plan_search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from spsim.costs.static_memory import capacity
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_options
from spsim.inputs.plan_words import plan_options
from spsim.inputs.presets import load_model, model_of
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Workload
from spsim.studies.search.candidates import Candidate, Given, candidates
from spsim.studies.search.longest import longest_length
from spsim.studies.search.outcome import PlanSearch
from spsim.studies.search.rounds import fits, rows_of, simulated
from spsim.studies.search.space import Space, check_count
from spsim.units import GIB

BEST = 10
"""Plans that are shown."""


def plan_search(
    *,
    hardware: Given,
    model: Model | Mapping[str, Any] | str | Path,
    gpus: int,
    workload: Workload | Mapping[str, Any],
    plan: Plan | Mapping[str, Any] | str = "",
    values: Mapping[str, Sequence[Any]] | None = None,
    longest: bool = False,
    best: int = BEST,
    tokens: int | None = None,
    executor: Executor | None = None,
) -> PlanSearch:
    """The plans with the shortest step of a model on some GPUs, and the front of time and memory.

    `workload` has the sequence and the global batch; a micro-batch, if it is given, is the only one. What `plan` says
    is fixed; `values` has values to search, by option, in the place of those of `space`. With `longest` the sequence is
    the longest that fits, not shorter than that of the workload. `tokens` asks for GPU-hours. Of an `executor` of
    processes both cores are used; what is found is the same.

    Raises `InputError` for inputs that break a rule, where no combination is a plan, and where none fits.
    """
    for name, count in {"best": best, **({} if tokens is None else {"tokens": tokens})}.items():
        check_count(name, count)
    space = _space(hardware, model, gpus, workload, plan, values or {})
    if longest and space.is_served:
        raise InputError(
            f"plan: the longest sequence of phase {space.workload.phase!r} is not searched yet; compare plans at a "
            "seq_len, which say the largest_micro_batch"
        )
    room = capacity(space.hardware) / GIB
    if longest:
        length = longest_length(space, hardware, room, executor)
        if length is not None:
            space = replace(space, workload=space.workload.model_copy(update={"seq_len": length}))
    every = [*candidates(hardware, space.families(), executor)]
    if not every:
        raise _none(space)
    rows = simulated(every, room, hardware, best, executor)
    if not any(map(fits, rows.values())):
        raise _too_large(space, every, hardware, room)
    return PlanSearch(space.hardware, gpus, every, rows, space.refused, best, tokens)


def _space(
    hardware: Given, model: Any, gpus: int, workload: Any, plan: Any, values: Mapping[str, Sequence[Any]]
) -> Space:
    """The plans that are asked for, from what a user gives."""
    for name, table, example in (("workload", workload, '{"seq_len": 8192}'), ("values", values, '{"tp": [2, 4]}')):
        if not isinstance(table, Mapping | Workload):
            raise InputError(f"plan: {name} = {table!r} is no table; write for instance {example}")
    found = model if isinstance(model, Model) else model_of(model) if isinstance(model, Mapping) else load_model(model)
    return Space(
        hardware if isinstance(hardware, HardwareProfile) else load_profile(hardware),
        found,
        workload if isinstance(workload, Workload) else Workload.of_table(workload),
        gpus,
        _options(plan),
        values,
    )


def _options(plan: Plan | Mapping[str, Any] | str) -> dict[str, Any]:
    """What a plan says, checked by itself."""
    if isinstance(plan, Plan):
        return {"library": plan.library, **plan.differing}
    if not isinstance(plan, str | Mapping):
        raise InputError(f"plan: {plan!r} is no plan; write for instance 'tp=8,recompute=full'")
    options = parse_options(plan) if isinstance(plan, str) else plan_options(plan, Plan.model_fields.keys())
    Plan(**options)
    return {**options}


def _none(space: Space) -> InputError:
    """No combination is a plan."""
    if not space.refused:
        return InputError(
            f"plan: gpus = {space.gpus} is no product of degrees that are searched; give others, such as pp=1,2,4, or "
            "another number of GPUs"
        )
    rule, _ = space.refused.most_common(1)[0]
    return InputError(f"plan: none of {space.refused.total()} combinations keeps the rules; most often: {rule}")


def _too_large(space: Space, every: Sequence[Candidate], given: Given, room: float) -> InputError:
    """No plan fits: the one that comes nearest, and what would help."""
    nearest = min(every, key=lambda own: own.memory_gib)
    row = rows_of([nearest], given, None)[0]
    if row["error"]:
        return InputError(f"plan: {nearest.plan.text}: {row['error']}")
    return InputError(
        f"plan: none of {len(every)} plans fits: the nearest, {nearest.plan.text} with micro_batch = "
        f"{nearest.micro_batch}, takes {row['device_memory_gib']:.1f} of {room:.1f} GiB; use more GPUs than "
        f"{space.gpus}, a sequence shorter than {nearest.seq_len}, or hardware with more memory"
    )
