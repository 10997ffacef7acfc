"""Spans of a run on GPUs: kernels and copies by stream, NCCL's kernels by process group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spsim.engine.recording import COMPUTE_LANE
from spsim.pytorch.kineto.events import Event, ProfiledRank
from spsim.pytorch.kineto.names import COMMUNICATION, ITEMSIZES, collective, operator_class, short_name
from spsim.results.measured import MeasuredSpan

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "privateuse1_runtime")
UNNAMED = ("", "undefined")


def device_spans(profile: ProfiledRank) -> list[MeasuredSpan]:
    """Spans of one rank in the order in which they were launched; none for a run without a device."""
    kernels = profile.of(*KERNELS)
    launches = {event.arguments["correlation"]: event for event in profile.of(*LAUNCHES) if _correlated(event)}
    metadata = {
        event.arguments.get("External id"): event.arguments
        for event in profile.of("cpu_op")
        if event.name == "record_param_comms"
    }
    main = _busiest_stream(kernels)
    issued = []
    for kernel in kernels:
        launch = launches.get(kernel.arguments.get("correlation"), kernel)
        phase = profile.phase_at(launch.thread, launch.start)
        if operator_class(kernel.name) == COMMUNICATION:
            span = _communication(profile.rank, kernel, metadata)
        else:
            stream = kernel.arguments.get("stream")
            lane = COMPUTE_LANE if stream == main else f"{COMPUTE_LANE}, stream {stream}"
            span = MeasuredSpan(
                profile.rank, lane, short_name(kernel.name), operator_class(kernel.name), kernel.start, kernel.end
            )
        issued.append((launch.start, kernel.start, phase, span))
    issued.sort(key=lambda entry: entry[:2])
    return [replace(span, phase=phase) for _, _, phase, span in issued]


def _correlated(event: Event) -> bool:
    return "correlation" in event.arguments


def _busiest_stream(kernels: list[Event]) -> Any:
    busy: Counter[Any] = Counter()
    for kernel in kernels:
        if operator_class(kernel.name) != COMMUNICATION:
            busy[kernel.arguments.get("stream")] += round(kernel.end - kernel.start)
    return max(busy, key=busy.__getitem__, default=None)


def _communication(rank: int, kernel: Event, metadata: Mapping[Any, dict[str, Any]]) -> MeasuredSpan:
    """A kernel of NCCL with what torch wrote about its call, on the kernel or on the operator that issued it."""
    call = kernel.arguments
    if "Collective name" not in call:
        call = metadata.get(kernel.arguments.get("External id"), {})
    kind = collective(str(call.get("Collective name", ""))) or collective(kernel.name)
    description, name = str(call.get("Process Group Description", "")), str(call.get("Process Group Name", ""))
    lane = description if description not in UNNAMED else f"group {name}" if name else "nccl"
    elements = max((int(call.get(f"{side} msg nelems", 0)) for side in ("In", "Out")), default=0)
    return MeasuredSpan(
        rank, lane, kind or short_name(kernel.name), COMMUNICATION, kernel.start, kernel.end, collective=kind,
        message_bytes=elements * ITEMSIZES.get(str(call.get("dtype", "")), 0), group=_group(call),
    )  # fmt: skip


def _group(call: Mapping[str, Any]) -> tuple[int, ...]:
    """The ranks of a call's group; none where the list was shortened, as torch does for large groups."""
    try:
        ranks = tuple(int(rank) for rank in json.loads(str(call.get("Process Group Ranks", "[]"))))
    except ValueError:
        return ()
    return ranks if len(ranks) == call.get("Group size", len(ranks)) else ()
