"""The end of a step: gradients that were not reduced behind the backward pass, their norm, Adam, and the new weights.

Bytes of an element, in mixed precision with fp32 gradients: the norm reads 4, clipping reads and writes 8, Adam reads
the gradient (4), reads and writes the fp32 weight and two moments (24) and writes the 16-bit weight (2): 42 on the
rank that keeps its state, and 4 for each gradient that Megatron sets to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spsim.engine.recording import COMPUTE_LANE, TaskInfo
from spsim.engine.tasks import Task
from spsim.inputs.plan import Plan
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.step.replicas import FP32_BYTES, Message, Synchronisation
from spsim.step.segments import Added, Call, Segment
from spsim.step.weaving import Groups, in_a_row, info_of, lane_of
from spsim.work import MemoryBound

REMAINDER_BYTES = 2
"""Of the fp32 weight, beside a 16-bit one (`precision_aware_optimizer`)."""


def update_kernels(
    elements: int, plan: Plan, precision: Precision, *, accumulated: int = 0
) -> tuple[tuple[str, MemoryBound], ...]:
    """Name and work of the kernels that update so many weights of a rank; `accumulated` are the gradients that it sets
    to zero for the next step, those of all its weights if Megatron keeps them in a buffer.
    """
    gradient = gradient_bytes(plan, precision)
    weight = ELEMENT_BYTES[precision]
    moments = 4 * (FP32_BYTES if plan.moment_dtype == "fp32" else ELEMENT_BYTES["bf16"])
    if weight == FP32_BYTES or plan.dp_library == "fsdp":
        weights = 2 * FP32_BYTES
    elif plan.precision_aware_optimizer:
        weights = 2 * (weight + REMAINDER_BYTES)
    else:
        weights = 2 * FP32_BYTES + weight
    zeroed = (("zero gradients", MemoryBound("optimizer", gradient * accumulated)),) if accumulated else ()
    return (
        ("gradient norm", MemoryBound("optimizer", gradient * elements)),
        ("clip gradients", MemoryBound("optimizer", 2 * gradient * elements)),
        ("adam", MemoryBound("optimizer", (gradient + moments + weights) * elements, "adam")),
        *zeroed,
    )


def gradient_bytes(plan: Plan, precision: Precision) -> int:
    """Of a gradient as it is accumulated: DDP and DeepSpeed do so in the type of the weights."""
    in_weights = plan.dp_library in ("ddp", "deepspeed") or plan.grad_dtype != "fp32"
    return ELEMENT_BYTES[precision] if in_weights and plan.dp_library != "fsdp" else FP32_BYTES


def closing_segments(
    sync: Synchronisation, groups: Groups, kernels: Sequence[tuple[str, MemoryBound]], name: str = ""
) -> tuple[Segment, ...]:
    """What follows the last backward pass of a rank: messages, then kernels of its optimizer with the small messages
    between norm and clipping, and the gathers of what they wrote.
    """
    reductions = () if sync.behind_backward else (message for row in sync.reductions for message in row)
    shared = (message for message in sync.before_update if message.group == "embedding")
    before = [m for own in (reductions, shared) for m in own if groups[m.group].ranks > 1]
    joins = frozenset({"dp", "replicate"})
    synced = (in_a_row(before, f"{name} weight_sync".strip(), "weight_sync", groups, joins=joins),) if before else ()
    return (*synced, _update(sync, groups, kernels, f"{name} optimizer".strip(), joins))


def _update(
    sync: Synchronisation,
    groups: Groups,
    kernels: Sequence[tuple[str, MemoryBound]],
    name: str,
    joins: frozenset[str],
) -> Segment:
    """Each task waits for the one before it, and a gather for the last kernel."""
    small = [m for m in sync.before_update if m.group != "embedding" and groups[m.group].ranks > 1]
    gathers = [m for m in sync.after_update if groups[m.group].ranks > 1]
    added: list[tuple[str, Added]] = [*kernels[:1], *((m.what, m) for m in small), *kernels[1:]]
    added += [(message.what, message) for message in gathers]
    tasks = [
        Task(i, lane_of(what) if isinstance(what, Message) else COMPUTE_LANE, needs=(i - 1,) if i else ())
        for i, (_, what) in enumerate(added)
    ]
    return Segment(
        name=name,
        phase="optimizer",
        tasks=tuple(tasks),
        labels=tuple(_labels(added, groups)),
        calls={i: Call(groups[what.group].axes) for i, (_, what) in enumerate(added) if isinstance(what, Message)},
        joins=joins,
        added={i: what for i, (_, what) in enumerate(added)},
    )


def _labels(added: Sequence[tuple[str, Added]], groups: Groups) -> Iterator[TaskInfo]:
    for name, what in added:
        yield info_of(what, groups) if isinstance(what, Message) else TaskInfo(name, "optimizer", "optimizer")
