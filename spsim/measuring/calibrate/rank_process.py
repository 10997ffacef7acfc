"""What one rank does: rank 0 leads the session, the others wait for what all measure together."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.measuring.calibrate.attention_backends import attention_kernels
from spsim.measuring.calibrate.base import base_profile, check_ranks
from spsim.measuring.calibrate.catalogue import Machine
from spsim.measuring.calibrate.communication import join, measure_collective, measure_interference
from spsim.measuring.calibrate.devices import Device, open_device
from spsim.measuring.calibrate.kernels import measure_kernel, measure_launch
from spsim.measuring.calibrate.memory import measure_communicator, measure_memory
from spsim.measuring.calibrate.ranks import Ranks
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.session import (
    KEPT,
    RawFile,
    Report,
    Session,
    Settings,
    environment_rows,
    sections,
    time_limit,
    title,
)
from spsim.measuring.processes.at_hand import reason
from spsim.units import MIB

Fail = Callable[[str], None]
"""Says why the calibration cannot go on, and ends the process; called from any thread."""


def run_rank(ranks: Ranks, settings: Settings, report: Report, fail: Fail) -> None:
    """Measure as one of `ranks`; returns when all is measured."""
    absent = f"calibrate: not all of {ranks.world} ranks came together within {settings.time_limit:g} s; {KEPT}"
    with time_limit(settings.time_limit, lambda: fail(absent)):
        device = _open(ranks)
        ranks.connect(device.backend)
    if ranks.rank == 0:
        try:
            _lead(ranks, device, settings, report, fail)
        finally:
            ranks.command(None)
    else:
        for row in ranks.commands():
            late = f"calibrate: rank {ranks.rank} did not end {title(row)} within {2 * settings.time_limit:g} s; {KEPT}"
            with time_limit(2 * settings.time_limit, partial(fail, late)):
                _measure(ranks, device, settings, row)
    if dist.is_initialized():
        dist.destroy_process_group()


def _open(ranks: Ranks) -> Device:
    """This rank's device; `InputError` where it has none, or the others have another sort."""
    try:
        device = open_device(ranks.local_rank, ranks.per_node)
    except (InputError, RuntimeError) as error:
        why = reason(error)
        if ranks.rank:
            ranks.check_alike(f"no device: {why}")  # rank 0 says so
        raise InputError(f"calibrate: {why}") from None
    ranks.check_alike(device.name, device.uuid)
    return device


def _lead(ranks: Ranks, device: Device, settings: Settings, report: Report, fail: Fail) -> None:
    profile = base_profile(settings.base, device.name, gpu=device.kind == "cuda")
    machine = _machine(ranks, device, profile)
    device.warm_up()
    picked = {"attention_kernel": next(iter(machine.attention_kernels), "")}
    raw = RawFile(settings.file, environment_rows({**_facts(ranks, device), **picked}))

    def guard(row: Measurement) -> AbstractContextManager[None]:
        def expired() -> None:
            why = f"did not end within {settings.time_limit:g} s"
            try:
                raw.add([row.model_copy(update={"skipped": why})])
            finally:
                fail(f"calibrate: {title(row)} {why}; {KEPT}")

        return time_limit(settings.time_limit, expired)

    def measure(row: Measurement) -> Measurement:
        if _is_common(row):
            ranks.command(row)
        return _measure(ranks, device, settings, row)

    Session(settings, profile, raw, report, guard).run(sections(machine, quick=settings.quick), measure)


def _machine(ranks: Ranks, device: Device, profile: HardwareProfile) -> Machine:
    levels = tuple(level.name for level in profile.datasheet.topology)
    check_ranks(profile, ranks.per_node, ranks.nodes)
    if device.kind == "cuda":
        device.cache_bytes = max(device.cache_bytes, round(profile.datasheet.memory.l2_mib.value * MIB))
    return Machine(
        device=device.kind, dtypes=device.dtypes, cache_bytes=device.cache_share, ranks=ranks.world,
        nodes=ranks.nodes, levels=levels, attention_kernels=attention_kernels(device),
    )  # fmt: skip


def _facts(ranks: Ranks, device: Device) -> dict[str, str]:
    return {
        "device": device.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": device.backend if ranks.world > 1 else "",
        "ranks": str(ranks.world),
        "nodes": str(ranks.nodes),
        "cache_bytes": str(device.cache_bytes),
        **device.facts(),
    }


def _is_common(row: Measurement) -> bool:
    """Whether all ranks measure it together."""
    return row.kind in ("collective", "interference") or row.name == "communicator"


def _measure(ranks: Ranks, device: Device, settings: Settings, row: Measurement) -> Measurement:
    """One row with its result, or with the reason why it has none."""
    if _is_common(row):
        return _measure_together(ranks, device, settings, row)
    try:
        if row.kind == "launch":
            return measure_launch(device, row, settings.effort)
        if row.kind == "memory":
            return measure_memory(device, row)
        return measure_kernel(device, row, settings.effort)
    except (RuntimeError, TypeError) as error:  # a TypeError where an older torch lacks an argument
        return row.model_copy(update={"skipped": reason(error)})


def _measure_together(ranks: Ranks, device: Device, settings: Settings, row: Measurement) -> Measurement:
    try:
        if row.kind == "memory":
            return measure_communicator(ranks, device, row)
        party = join(ranks, device, row)
        if party is None:
            return row
        measure = measure_collective if row.kind == "collective" else measure_interference
        return measure(party, row, settings.effort)
    except RuntimeError as error:
        raise InputError(f"calibrate: a rank was lost during {title(row)} ({reason(error)}); {KEPT}") from None
