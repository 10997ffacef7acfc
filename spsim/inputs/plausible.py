"""What no device is: the numbers of a hardware profile held against each other.

Each number has bounds of its own (`quantities`), within which one in another unit, a thousand times off, often lies; it
does not fit the others. A CPU, whose numbers are measured, may be slower than anything sold as an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from spsim.inputs.quantities import Bandwidth, Fraction, NonNegative, Provenance, Quantity
from spsim.units import GB, MIB, TERA

if TYPE_CHECKING:
    from spsim.inputs.collective_curves import CollectiveCurve
    from spsim.inputs.hardware import Datasheet, HardwareProfile, Level

REPORTED_SHARE = (0.8, 1.2)
"""Of the label: A100 report 7 % more, since theirs is in GiB."""
FLOP_PER_BYTE = (0.1, 5000)
"""Highest peak over memory bandwidth: 11 of a CPU core, 160 to 640 of GPUs."""
LEAST_PEAK = 1 / 200
"""Share of the highest peak that any other has; fp32 on B200 is 1/60 of fp8."""
LARGEST_CACHE = 1 / 4
"""Share of the memory."""
LEAST_SHARE = 1e-3
"""Of a peak or a bandwidth that any kernel reaches on a GPU."""
LEAST_LINK = 2e-3
"""Share of a link that the largest message of any collective reaches on a GPU."""
LIMITS = {
    "start_us": 1e3, "join_us": 1e3, "block_us": 1e3, "traffic_exposed": 10, "join_traffic": 10, "rate": 10,
    "accumulation_exposed": 10, "accumulation_half_k": 1e6, "full_rate_side": 4096, "block_rows": 4096,
    "block_tokens": 4096, "blocks_per_unit": 64, "dropout_instructions": 1e3,
}  # fmt: skip
"""Of coefficients of kernels on a GPU by their names."""
ON_PROCESSOR = 100
"""Times these limits that those of a CPU may be."""
CHUNK_MIB, BLEND = (1 / 16, 1024), (0.5, 50)
ACCESSES_PER_NS = (1, 1e5)
FASTER, SLOWER = 0.1, 20
"""Larger messages take no less than a tenth of the time of the next smaller one, nor a twentieth of its bandwidth."""
LATENCY = 10
"""Times the time of the smallest measured message that the latency may be."""
LATENCY_US = (0.5, 5000)
"""Of any collective on GPUs."""
LARGEST_NODE = 1024
"""GPUs of the innermost level."""


def check_profile(profile: HardwareProfile) -> None:
    """Raise `ValueError` naming two numbers that do not fit each other."""
    sheet = profile.datasheet
    processor = sheet.topology[0].kind == "shared_memory"
    _check_levels(sheet)
    _check_memory(profile)
    _check_products(profile)
    _check_peaks(sheet)
    _check_rates(profile, *((0.0, ON_PROCESSOR) if processor else (LEAST_SHARE, 1)))
    for name, table in profile.coefficients.collectives.items():
        level = next(level for level in sheet.topology if level.name == name)
        for collective, curves in table.items():
            where = f"collectives.{name}.{collective}"
            for curve in curves:
                if where not in profile.inherited:
                    _check_ranks(where, level, curve)
                _check_curve(where, level, collective, curve, processor=processor)
    _check_sends(profile)
    _check_range("adapter_chunk_mib", profile.coefficients.adapter_chunk_mib, CHUNK_MIB)
    _check_range("accesses_per_ns", profile.coefficients.accesses_per_ns, ACCESSES_PER_NS)


def _check_levels(sheet: Datasheet) -> None:
    sizes = [level.gpus for level in sheet.topology]
    if sizes[0] is None:
        raise ValueError(f"topology: level {sheet.topology[0].name!r} needs gpus, those of a node; add it")
    if sizes[0] > LARGEST_NODE:
        raise ValueError(
            f"topology: level {sheet.topology[0].name!r} has gpus = {sizes[0]}, over {LARGEST_NODE}; check it"
        )
    known = [size for size in sizes if size is not None]
    if None in sizes[:-1] or any(outer <= inner for inner, outer in pairwise(known)):
        raise ValueError(
            "topology: each level joins more gpus than the one inside it, only the last may leave them out"
        )


def _check_memory(profile: HardwareProfile) -> None:
    memory, taken = profile.datasheet.memory, profile.coefficients.memory
    reported, label = memory.reported_mib.value * MIB, memory.label_gb.value * GB
    if not REPORTED_SHARE[0] <= reported / label <= REPORTED_SHARE[1]:
        raise ValueError(
            f"memory: reported_mib {memory.reported_mib.value:g} is {reported / GB:.3g} GB, but label_gb is "
            f"{memory.label_gb.value:g}; check the units"
        )
    if profile.datasheet.topology[0].kind != "shared_memory" and memory.l2_mib.value < 1:
        raise ValueError(f"memory: l2_mib {memory.l2_mib.value:g} is under 1, less than any GPU has; check the unit")
    if memory.l2_mib.value > LARGEST_CACHE * memory.reported_mib.value:
        raise ValueError(f"memory: l2_mib {memory.l2_mib.value:g} is over a quarter of the memory; check the unit")
    for name in ("context_mib", "communicator_mib", "reserve_mib"):
        if getattr(taken, name).value > memory.reported_mib.value / 2:
            raise ValueError(f"memory.{name} {getattr(taken, name).value:g} is over half of the memory; check the unit")


def _check_products(profile: HardwareProfile) -> None:
    gemm = profile.coefficients.gemm
    missing = [dtype for dtype in profile.datasheet.peak_tflops if dtype not in gemm.fraction]
    if missing:
        raise ValueError(f"gemm.fraction has no {missing[0]}, of which there is a peak; add the share that is reached")


def _check_peaks(sheet: Datasheet) -> None:
    peaks = {name: peak.value for name, peak in sheet.peak_tflops.items()}
    top = max(peaks.values())
    processor = sheet.topology[0].kind == "shared_memory"
    for name, peak in peaks.items() if not processor else ():
        if peak < LEAST_PEAK * top:
            raise ValueError(f"peak_tflops.{name} {peak:g} is too far below {top:g} of another type; check the unit")
    bandwidth = sheet.memory.bandwidth_gb_per_s.value
    if not FLOP_PER_BYTE[0] <= top * TERA / (bandwidth * GB) <= FLOP_PER_BYTE[1]:
        raise ValueError(
            f"a peak of {top:g} TFLOP/s beside {bandwidth:g} GB/s of memory is {top * TERA / (bandwidth * GB):.3g} "
            "FLOP a byte, which no device has; check the units"
        )
    tensor, vector = sheet.clock_tensor_mhz.value, sheet.clock_vector_mhz.value
    if not 1 / 4 <= vector / tensor <= 4:
        raise ValueError(f"clock_vector_mhz {vector:g} does not fit clock_tensor_mhz {tensor:g}; check the units")


def _check_rates(profile: HardwareProfile, least: float, slack: float) -> None:
    """The rate of the cache; of kernels, shares of peaks and bandwidths, of which `least` is too few, and all else."""
    memory = profile.datasheet.memory.bandwidth_gb_per_s.value
    coefficients = profile.coefficients
    cache = coefficients.l2_bandwidth_gb_per_s.value
    if not memory / 20 <= cache <= 200 * memory:
        raise ValueError(f"l2_bandwidth_gb_per_s {cache:g} does not fit {memory:g} GB/s of memory; check the units")
    for table in (
        "gemm",
        "attention",
        "attention_by_dtype",
        "memory_bound",
        "kernel_rates",
        "row_rates",
        "fused_rates",
    ):
        for path, number in _numbers(getattr(coefficients, table), table):
            name = next((part for part in reversed(path.split(".")) if part in LIMITS), "")
            if name and number.value > slack * LIMITS[name]:
                raise ValueError(
                    f"{path} {number.value:g} is over {slack * LIMITS[name]:g}, more than any kernel has; check it"
                )
            share = number.value / memory if isinstance(number, Bandwidth) else number.value
            if share <= least and not number.flagged and isinstance(number, Fraction | Bandwidth):
                raise ValueError(f"{path} {number.value:g} is a thousandth of what there is, or less; check the unit")


def _numbers(table: Any, path: str) -> Iterator[tuple[str, Fraction | NonNegative | Quantity]]:
    """The numbers in a table by their dotted path."""
    if isinstance(table, Fraction | NonNegative | Quantity):
        yield path, table
    elif not isinstance(table, Provenance) and table is not None:
        items = table.items() if isinstance(table, dict) else ((n, getattr(table, n)) for n in type(table).model_fields)
        for name, item in items:
            yield from _numbers(item, f"{path}.{name}")


def _check_curve(where: str, level: Level, collective: str, curve: CollectiveCurve, *, processor: bool) -> None:
    fastest = max(bandwidth for _, bandwidth in curve.points) * GB
    least = LEAST_SHARE / 10 if processor else LEAST_LINK
    adapter = level.adapter_bandwidth
    if not least * adapter <= fastest <= 2 * adapter:
        raise ValueError(
            f"{where}: bus bandwidth {fastest / GB:g} GB/s does not fit {adapter / GB:g} GB/s of the link; "
            "check the units"
        )
    for (size, bandwidth), (larger, other) in pairwise(curve.points):
        if larger / other < FASTER * size / bandwidth or other < bandwidth / SLOWER:
            raise ValueError(
                f"{where}: from {size:g} to {larger:g} bytes the bus bandwidth jumps from {bandwidth:g} to "
                f"{other:g} GB/s; check both"
            )
    size, bandwidth = curve.points[0]
    factor = 2 if collective == "all_reduce" else 1
    if curve.latency_us > LATENCY * factor * size / bandwidth / 1e3:
        raise ValueError(
            f"{where}: latency_us {curve.latency_us:g} is over the time of {size:g} bytes at {bandwidth:g} GB/s; "
            "check the units"
        )
    if not processor and not LATENCY_US[0] <= curve.latency_us <= LATENCY_US[1]:
        raise ValueError(f"{where}: latency_us {curve.latency_us:g} is not from 0.5 to 5000; check the unit")
    steps = 0 if curve.algorithm in ("nvls", "send_receive") else factor * (curve.ranks - max(curve.min_ranks, 2))
    if max(steps, 1) * curve.step_latency_us > curve.latency_us * (1 + 1e-6):
        raise ValueError(
            f"{where}: latency_us {curve.latency_us:g} at {curve.ranks} ranks is less than {max(steps, 1)} steps of "
            f"step_latency_us {curve.step_latency_us:g}; nothing would be left for fewer ranks"
        )


def _check_ranks(where: str, level: Level, curve: CollectiveCurve) -> None:
    if level.gpus is not None and max(curve.ranks, curve.min_ranks) > level.gpus:
        raise ValueError(f"{where}: ranks or min_ranks are more than the {level.gpus} GPUs of the level; correct them")


def _check_sends(profile: HardwareProfile) -> None:
    bandwidths = {level.name: level.adapter_bandwidth / GB for level in profile.datasheet.topology}
    for name, sends in profile.coefficients.sends.items():
        link, channel = sends.link_gb_per_s.value, sends.channel_gb_per_s.value
        if not LEAST_LINK * bandwidths[name] <= link <= 1.1 * bandwidths[name]:
            raise ValueError(
                f"sends.{name}: link_gb_per_s {link:g} does not fit {bandwidths[name]:g} GB/s of the link; "
                "check the unit"
            )
        if not link / 500 <= channel <= link:
            raise ValueError(f"sends.{name}: channel_gb_per_s {channel:g} does not fit {link:g} of the link")
        _check_range(f"sends.{name}.from_mib", sends.from_mib, CHUNK_MIB)
        _check_range(f"sends.{name}.blend", sends.blend, BLEND)


def _check_range(name: str, number: Quantity | NonNegative | None, limits: tuple[float, float]) -> None:
    low, high = limits
    if number is not None and not low <= number.value <= high:
        raise ValueError(f"{name} {number.value:g} is not from {low:g} to {high:g}; check the unit")
