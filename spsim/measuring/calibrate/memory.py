"""Memory that the framework takes beside the tensors that a program asks for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional

from spsim.measuring.calibrate.devices import Device
from spsim.measuring.calibrate.ranks import Ranks
from spsim.measuring.calibrate.records import Measurement
from spsim.units import MIB

ROWS, WIDTH = 64, 256
MESSAGE_ELEMENTS = 16 * MIB // 4
"""Of a collective that makes a communicator allocate its buffers."""


def measure_memory(device: Device, row: Measurement) -> Measurement:
    """Fill in a memory row of one rank."""
    if row.name == "norm_statistics":
        return _norm_statistics(device, row)
    value = _context(device) if row.name == "context" else _allocation(device, row.name, row.bytes_moved or 1)
    return row.model_copy(update={"value": value})


def _context(device: Device) -> int:
    """What is taken on the device beyond torch's allocator: context, kernels, libraries; nobody else on it assumed."""
    torch.cuda.empty_cache()
    return max(0, device.used_bytes() - torch.cuda.memory_reserved())


def _allocation(device: Device, name: str, request: int) -> int:
    """Bytes that a request adds to what the allocator counts as allocated, or has reserved.

    Segments belong to a stream: on one of its own, no room that the segment of another tensor has left serves.
    """
    count = torch.cuda.memory_allocated if name == "allocated" else torch.cuda.memory_reserved
    torch.cuda.empty_cache()
    before = count()
    with device.beside():
        kept = torch.empty(request, dtype=torch.uint8, device="cuda")
    added = count() - before
    del kept
    return int(added)


def _norm_statistics(device: Device, row: Measurement) -> Measurement:
    """Bytes of one mean or deviation that LayerNorm keeps, with weights in the row's type."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, weight, bias = (
        device.random(*shape, dtype=row.dtype).requires_grad_() for shape in ((ROWS, WIDTH), (WIDTH,), (WIDTH,))
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional.layer_norm(x, (WIDTH,), weight, bias)
    statistics = next(tensor for tensor in kept if tensor.numel() == ROWS)
    return row.model_copy(update={"value": statistics.element_size(), "text": str(statistics.dtype)})


def measure_communicator(ranks: Ranks, device: Device, row: Measurement) -> Measurement:
    """Bytes that a process group of the row's ranks takes once it has been used."""
    message = device.random(MESSAGE_ELEMENTS)
    device.synchronize()
    before = device.used_bytes() - torch.cuda.memory_reserved()
    group = ranks.new_group(row)
    if ranks.rank in ranks.members(row):
        dist.all_reduce(message, group=group)
    device.synchronize()
    added = max(0, device.used_bytes() - torch.cuda.memory_reserved() - before)
    dist.destroy_process_group(group)
    return row.model_copy(update={"value": added})
