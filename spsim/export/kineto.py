"""Traces as torch.profiler writes them (Kineto): a file a rank, for tools that read those of real runs.

Kernels stand on the streams of a device, a communication from when its rank has come to it, as a kernel of NCCL runs
while it waits for its peers. A kernel's name says its class, which is all that such tools read from it; the operator is
the host's, which launches it. The host runs ahead of the device: each launch comes before the next one, and none after
its kernel begins. Backward passes and the synchronisation of gradients are launched inside autograd's engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from spsim.engine.recording import TaskInfo
from spsim.export.events import Event, complete, process, thread, write_events
from spsim.export.slices import Slice, Slices, nanoseconds
from spsim.program.instructions import OFFLOAD
from spsim.results.result import Result
from spsim.results.selection import Selection, lane_order

HOST, HOST_THREAD, DEVICE, FIRST_STREAM = 1, 2, 3, 7
"""Numbers of processes and threads; streams follow each other, that of kernels first."""
LAUNCH_NS = 5000
"""From one operator of the host to the next, about as torch takes without compilation."""
OPERATOR, BEFORE_LAUNCH, LAUNCH, BESIDE = 4000, 1000, 2000, 250
"""Nanoseconds of an operator, in it before its launch, of the launch, and of autograd before the first and after the
last operator.
"""
AUTOGRAD = "autograd::engine::evaluate_function: LayerBackward"

KERNELS = {"attention": "flash_attention", "norm": "layer_norm"}
"""Names of kernels that are not those of their class."""
COLLECTIVES = {
    "all_reduce": ("AllReduce", "allreduce"),
    "all_gather": ("AllGather", "_allgather_base"),
    "reduce_scatter": ("ReduceScatter", "_reduce_scatter_base"),
    "all_to_all": ("AllToAll", "all_to_all"),
    "send_receive": ("SendRecv", "send"),
}
"""What a collective is called in the name of NCCL's kernel, and by torch."""


def write_kineto_traces(result: Result, directory: Path, selection: Selection) -> None:
    """Write `rank_<n>.json.gz` for each rank of a selection; their clocks agree."""
    slices = Slices(result, selection)
    own = {rank: list(slices.of(rank)) for rank in selection.ranks}
    launches = {rank: _launches(shown) for rank, shown in own.items()}
    lead = -min(min(times, default=0) for times in launches.values())
    lanes = lane_order(result.trace)
    for rank, shown in own.items():
        file = _Rank(result, rank, lanes, lead)
        write_events(directory / f"rank_{rank}.json.gz", file.head(), file.events(shown, launches[rank]))


def _launches(shown: Sequence[Slice]) -> list[int]:
    """When the host launches each of some slices: before the next one, and not after any of them begins."""
    posted = np.array([nanoseconds(own.span.posted_ps) for own in shown], dtype=np.int64)
    before = LAUNCH_NS * np.arange(len(shown))
    earliest = np.minimum.accumulate((posted - before)[::-1])[::-1]
    return [int(time) for time in earliest + before - LAUNCH_NS]


class _Rank:
    """The file of one rank."""

    def __init__(self, result: Result, rank: int, lanes: Sequence[str], lead: int) -> None:
        self.result = result
        self.rank = rank
        self.lead = lead
        """Nanoseconds by which the host begins before the device."""
        self.device = rank % result.scenario.gpus_per_node
        self.streams = {lane: FIRST_STREAM + place for place, lane in enumerate(lanes)}
        self.groups: dict[str, tuple[int, ...]] = {}

    def head(self) -> dict[str, Any]:
        """What stands before the events."""
        return {
            "schemaVersion": 1,
            "deviceProperties": [{"id": self.device, "name": self.result.scenario.hardware.name}],
            "distributedInfo": {
                "backend": "nccl", "rank": self.rank, "world_size": self.result.scenario.plan.gpus
            },
            "baseTimeNanoseconds": 0,
            "displayTimeUnit": "ms",
        }  # fmt: skip

    def events(self, shown: Sequence[Slice], launches: Sequence[int]) -> Iterator[Event]:
        """Host and device, and the names of their threads."""
        yield from process(HOST, f"spsim, rank {self.rank}", 0)
        yield from thread(HOST, HOST_THREAD, "host", 0)
        yield from process(DEVICE, f"GPU {self.device}", 1)
        for place, (lane, stream) in enumerate(self.streams.items()):
            yield from thread(DEVICE, stream, f"stream {stream} {lane}", place)
        numbered = enumerate(zip(shown, launches, strict=True), start=1)
        for gradients, group in groupby(numbered, key=lambda entry: _of_autograd(entry[1][0])):
            run = list(group)
            if gradients is not None:
                (_, (_, first)), (_, (_, last)) = run[0], run[-1]
                yield self._host("cpu_op", AUTOGRAD, first - BESIDE, last + OPERATOR + BESIDE)
            for number, (own, launch) in run:
                yield from self._task(number, own, launch)

    def _host(self, category: str, name: str, start: int, end: int) -> Event:
        return complete(name, category, start + self.lead, end + self.lead, HOST, HOST_THREAD)

    def _task(self, number: int, own: Slice, launch: int) -> Iterator[Event]:
        """An operator of the host, its launch and the kernel."""
        info, stream = own.info, self.streams[own.span.lane]
        name = "record_param_comms" if info.collective else f"{info.name} {info.part}"
        yield {**self._host("cpu_op", name, launch, launch + OPERATOR), "args": {"External id": number}}
        start = launch + BEFORE_LAUNCH
        copies = info.purpose == OFFLOAD
        call = "cudaMemcpyAsync" if copies else "cudaLaunchKernel"
        runtime = self._host("cuda_runtime", call, start, start + LAUNCH)
        yield {**runtime, "args": {"External id": number, "correlation": number}}
        begin = nanoseconds(own.span.posted_ps) if info.collective else own.start_ns
        category = "gpu_memcpy" if copies else "kernel"
        kernel = complete(_name(info), category, begin + self.lead, own.end_ns + self.lead, DEVICE, stream)
        arguments = {"External id": number, "correlation": number, "device": self.device, "stream": stream}
        yield {**kernel, "args": {**arguments, **self._call(info), "operator": info.name, **own.arguments}}

    def _call(self, info: TaskInfo) -> Mapping[str, Any]:
        """What torch notes of a call of NCCL; elements are bytes, which any type of element is made of."""
        if not info.collective:
            return {}
        if info.axis not in self.groups:
            self.groups[info.axis] = self.result.trace.groups[info.axis][self.rank]
        group = self.groups[info.axis]
        return {
            "Collective name": COLLECTIVES[info.collective][1], "dtype": "Byte",
            "In msg nelems": info.message_bytes, "Out msg nelems": info.message_bytes,
            "Process Group Name": info.axis, "Process Group Description": info.axis,
            "Process Group Ranks": str([*group]), "Group size": len(group),
        }  # fmt: skip


def _of_autograd(own: Slice) -> int | None:
    """The first task of the piece, if its launches are inside autograd's engine."""
    return None if own.piece.phase == "forward" else own.piece.first_task


def _name(info: TaskInfo) -> str:
    if info.collective:
        return f"ncclDevKernel_{COLLECTIVES[info.collective][0]}"
    if info.purpose == OFFLOAD:
        return "Memcpy DtoH (Device -> Pinned)" if info.part == "forward" else "Memcpy HtoD (Pinned -> Device)"
    return KERNELS.get(info.operator_class, info.operator_class)
