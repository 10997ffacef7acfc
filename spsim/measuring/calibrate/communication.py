"""Collectives, and what they and a product lose when both run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from spsim.measuring.calibrate.devices import Call, Device
from spsim.measuring.calibrate.ranks import Ranks
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.shapes import ITEMSIZE
from spsim.measuring.calibrate.timing import WARM_UP, Effort, choose_repeats, timed
from spsim.measuring.processes.at_hand import reason

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Their names from torch 2.13 on, or before."""

Start = Callable[[], Any]
"""Starts a collective and returns torch's work object."""


@dataclass
class Party:
    """One rank's part in a collective."""

    ranks: Ranks
    device: Device
    group: Any
    members: list[int]

    def starter(self, name: str, row: Measurement) -> Start:
        """The collective on buffers of this rank; the message is counted as nccl-tests count."""
        size, element = len(self.members), ITEMSIZE[row.dtype]
        part = max(1, (row.message_bytes or 1) // element // size)
        whole = part * size
        random = partial(self.device.random, dtype=row.dtype)
        options = {"group": self.group, "async_op": True}
        if name == "all_reduce":
            # In place, so that sums grow to infinity: as fast to add and to send as any other number.
            return partial(dist.all_reduce, random(whole), **options)
        if name == "all_gather":
            return partial(ALL_GATHER, random(whole), random(part), **options)
        if name == "reduce_scatter":
            return partial(REDUCE_SCATTER, random(part), random(whole), **options)
        if name == "all_to_all":
            return partial(dist.all_to_all_single, random(whole), random(whole), **options)
        return partial(self._exchange, random(whole), random(whole))

    def _exchange(self, sent: torch.Tensor, received: torch.Tensor) -> _All:
        """A ring: each rank sends to the next and receives from the one before."""
        place = self.members.index(self.ranks.rank)
        after, before = self.members[(place + 1) % len(self.members)], self.members[place - 1]
        operations = [
            dist.P2POp(dist.isend, sent, after, self.group), dist.P2POp(dist.irecv, received, before, self.group)
        ]  # fmt: skip
        return _All(dist.batch_isend_irecv(operations))

    def from_first(self, *values: int) -> list[int]:
        """Numbers as rank 0 has them."""
        tensor = torch.tensor(values, device=self.device.torch_device)
        dist.broadcast(tensor, src=self.members[0], group=self.group)
        return [int(value) for value in tensor]

    def samples(self, call: Call, effort: Effort) -> list[float]:
        """Seconds of one call, back to back as nccl-tests; rank 0 says how many."""
        calls: Iterator[Call] = repeat(call)
        for _ in range(WARM_UP):
            call()
        pilot = min(self.device.communication_samples(calls, 1, 3))
        return self.device.communication_samples(calls, *self.from_first(*choose_repeats(pilot, effort)))


@dataclass
class _All:
    """Several works as one."""

    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def join(ranks: Ranks, device: Device, row: Measurement) -> Party | None:
    """This rank's part in the group of a row; None for a rank outside it, which only helps to make it."""
    group = ranks.group(row)
    members = ranks.members(row)
    return Party(ranks, device, group, members) if ranks.rank in members else None


def prepared(party: Party, make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` allocates, and the reason why one of the members could not."""
    made, problem = None, ""
    try:
        made = make()
    except RuntimeError as error:
        problem = reason(error)
    return made, party.ranks.agree(problem, party.members)


def measure_collective(party: Party, row: Measurement, effort: Effort) -> Measurement:
    """Time a collective."""
    start, problem = prepared(party, lambda: party.starter(row.name, row))
    if problem:
        return row.model_copy(update={"skipped": problem})
    return timed(row, party.samples(lambda: start().wait(), effort), party.device.communication_clock)


def measure_interference(party: Party, row: Measurement, effort: Effort) -> Measurement:
    """Time one product, or the collective, with the other running all the while, against the same alone."""
    gemm_measured = row.name.startswith("gemm_beside_")
    name = row.name.removeprefix("gemm_beside_").removesuffix("_beside_gemm")
    buffers, problem = prepared(party, lambda: (party.starter(name, row), _product(party.device, row)))
    if problem:
        return row.model_copy(update={"skipped": problem})
    start, product = buffers
    alone = median(party.samples(lambda: start().wait(), effort))
    (products,) = party.from_first(max(1, int(alone / median(party.samples(product, effort)))))
    measure = _product_beside if gemm_measured else _collective_beside
    pairs = [measure(party.device, start, product, products) for _ in range(effort.min_rounds)]
    # More than twice as fast beside a collective is a disturbed measurement, which no raw file may hold.
    share = max(-1.0, 1 - median(apart / together for apart, together in pairs))
    done = timed(row, [together for _, together in pairs], party.device.communication_clock)
    return done.model_copy(update={"value": round(share, 4)})


def _product(device: Device, row: Measurement) -> Call:
    m, n, k = row.m or 1, row.n or 1, row.k or 1
    return partial(functional.linear, device.random(m, k, dtype=row.dtype), device.random(n, k, dtype=row.dtype))


def _product_beside(device: Device, start: Start, product: Call, products: int) -> tuple[float, float]:
    """Seconds of one product, alone and in the first half of a collective's time alone."""
    count = max(1, products // 2)

    def sequence() -> float:
        first = device.mark()
        for _ in range(count):
            product()
        return device.elapsed(first, device.mark()) / count

    _meet(device, start)
    return sequence(), _during(device, start, sequence)


def _meet(device: Device, start: Start) -> None:
    """On a GPU a collective goes before what is timed: all ranks begin at its end, and have started by then what comes
    after. Else the ranks that the last round left early would wait for the others, and every rank for its host.
    """
    if device.kind == "cuda":
        start().wait()


def _during(device: Device, start: Start, action: Callable[[], float]) -> float:
    _meet(device, start)
    work = start()
    seconds = action()
    work.wait()
    return seconds


def _collective_beside(device: Device, start: Start, product: Call, products: int) -> tuple[float, float]:
    """Seconds of a collective, alone and with products for as long as it takes, at most four times as many."""
    _meet(device, start)
    first = device.mark()
    start().wait()
    alone = device.elapsed(first, device.mark())
    _meet(device, start)
    first = device.mark()
    work = start()
    for _ in range(4 * products):
        if work.is_completed():
            break
        product()
    with device.beside():
        work.wait()
        last = device.mark()
    return alone, device.elapsed(first, last)
