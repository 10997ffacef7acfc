"""What a plan cannot be better than, in time and in memory, from its blocks; nothing is simulated.

**Time.** A stage runs the passes of all micro-batches one after another. Its first waits for the first chunks of the
stages before it, and behind its last one run the backward passes of these, if backward passes are whole. So for each
stage, with m micro-batches and t_r of one of them in the first chunk of stage r, forward and backward,

    step >= m x (all its chunks, forward and backward) + sum of t_r over the stages r before it

which for equal stages is the step of 1F1B with free messages (Narayanan et al. 2021, section 2.2). What follows the
last micro-batch, messages between stages and those of replicas are left out.

**Memory.** Weights, gradients and optimizer state; the activations of the micro-batches that a stage holds at its first
backward pass; what that takes at its fullest; and what the framework takes beside tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spsim.costs.static_memory import outside_tensors, static_memory
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.schedules import HALVED, Schedule
from spsim.inputs.stages import chunks_of
from spsim.program.mesh import mesh_of
from spsim.step.pipeline.orders import forwards, warm_up
from spsim.studies.search.blocks import Blocks, Numbers, layers_are_alike
from spsim.studies.search.space import Family
from spsim.units import GIB, PS_PER_S

LAYERS, HEAD = 1, 2
"""Places in `BLOCKS`."""


@dataclass(frozen=True)
class Bounds:
    """Of the sizes of a family, an array each: no step is shorter, and the fullest GPU takes no less memory."""

    step_s: Numbers
    memory_gib: Numbers
    """With context, communicator buffers and reserve."""


def bounds_of(family: Family, blocks: Blocks) -> Bounds:
    """The bounds of a family, from its blocks at its sizes."""
    plan, scenario = family.plan, family.scenario
    counts = _counts(scenario.model, plan.pp, plan.virtual_pp, plan.pp_schedule, plan.pp_layout)
    first, last = (_memory(family, blocks, counts[rank], rank) for rank in (0, -1))
    outside = outside_tensors(scenario.hardware, mesh_of(plan))
    return Bounds(_time(family, blocks, counts) / PS_PER_S, (np.maximum(first, last) + outside) / GIB)


@lru_cache(maxsize=256)
def _counts(model: Model, pp: int, virtual_pp: int, schedule: Schedule, layout: str | None) -> Numbers:
    """How many of each of `BLOCKS` each chunk of each stage has; of layers those whose block it is, others left out."""
    plan, own = Plan(pp=pp, virtual_pp=virtual_pp, pp_schedule=schedule, pp_layout=layout), min(model.types)

    def alike(layers: range) -> int:
        return sum(model.type_of(layer) == own for layer in layers) if len(model.types) > 1 else len(layers)

    return np.array(
        [[[chunk.embedding, alike(chunk.layers), chunk.loss] for chunk in stage] for stage in chunks_of(model, plan)],
        dtype=np.float64,
    )


def _time(family: Family, blocks: Blocks, counts: Numbers) -> Numbers:
    """Picoseconds."""
    first = counts[:, 0]
    before = 0.0 * first if family.plan.pp_schedule in HALVED else first.cumsum(axis=0) - first
    stages: Numbers = family.micro_batches * (counts.sum(axis=1) @ blocks.passes_ps) + before @ blocks.passes_ps
    least: Numbers = stages.max(axis=0)
    return least


def _memory(family: Family, blocks: Blocks, chunks: Numbers, rank: int) -> Numbers:
    """Bytes of tensors of a stage, whose chunks have so many of each block."""
    plan = family.plan
    every = chunks.sum(axis=0)
    parameters, weights = int(every @ blocks.parameters), int(every @ blocks.weight_bytes)
    static = static_memory(parameters, plan, family.scenario.workload.element_bytes, weights).total
    if not layers_are_alike(plan):
        return np.full(len(family.micro_batches), float(static))
    group = plan.pp_group or plan.pp
    sizes = [
        _held(plan.pp_schedule, plan.pp, plan.virtual_pp, group, rank % plan.pp, count)
        for count in family.micro_batches.tolist()
    ]
    held: Numbers = (np.array(sizes) @ chunks * blocks.saved_bytes.T).sum(axis=1)
    if plan.pp_schedule in HALVED:
        return static + held
    last = HEAD if chunks[-1, HEAD] and blocks.parameters[HEAD] else LAYERS
    return static + held + (blocks.beyond_bytes[last] if chunks[-1, last] else 0.0)


@lru_cache(maxsize=4096)
def _held(schedule: Schedule, pp: int, chunks: int, group: int, rank: int, micro_batches: int) -> tuple[int, ...]:
    """Of each chunk, micro-batches that a stage has run forward before its first backward pass, that of the last chunk;
    of schedules other than these one at least, since a backward pass follows all chunks of its micro-batch. One stage
    alone accumulates, whatever the schedule.
    """
    if schedule == "gpipe" and pp > 1:
        return (micro_batches,)
    if schedule != "1f1b":
        return (1,) * chunks
    passes = min(warm_up(pp, rank, chunks, micro_batches, group) + 1, chunks * micro_batches)
    order = forwards(chunks, micro_batches, group)[0][:passes]
    return tuple(np.bincount(order, minlength=chunks).tolist())
