"""The datasheet of a fitted profile: that of the base, where what was measured does not contradict it.

Nothing is faster than the peak of its device. Where it is, the base is another device: for a GPU that is an
error, while a CPU has no datasheet, and what it was measured to reach takes the place of the figure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from spsim.errors import InputError
from spsim.inputs.hardware import Datasheet, HardwareProfile
from spsim.inputs.quantities import Bandwidth, Quantity
from spsim.measuring.calibrate.collective_fit import algorithm_of, measured_series
from spsim.measuring.calibrate.records import Measurement, RowError
from spsim.measuring.calibrate.samples import attention_samples, gemm_samples, memory_samples, timed
from spsim.measuring.calibrate.session import title
from spsim.measuring.calibrate.solver import rounded
from spsim.units import GB, MIB, TERA, US_PER_S

SOURCE = "calibrate-highest-rate"
CITATION = "Highest rate that spsim calibrate measured on this device, above the figure of the base profile"
PROCESSOR = "calibrate-processor"
PROCESSOR_CITATION = "Last-level cache that the operating system reports, divided among the ranks of a node"
BEYOND_CACHE = 2
"""Traffic, in sizes of the last-level cache, from which a kernel must take it from memory."""
IMPOSSIBLE = 1e6
"""Times the rate of the base from which a time is a mistake: no two devices lie that far apart."""
SAMPLES = 3
"""The median of so many of the highest rates counts: one wrong time does not make a peak."""


def datasheet_for(rows: Sequence[Measurement], base: HardwareProfile) -> tuple[HardwareProfile, list[str]]:
    """The base with a datasheet that allows every measured rate, and what changed in it.

    Raises `InputError` where a GPU exceeds a figure of its own.
    """
    cpu = any(row.clock == "thread_cpu" for row in rows)
    sheet = _with_processor(rows, base.datasheet) if cpu else base.datasheet
    stated = _stated(sheet)
    exceeded = {what: rate for what, rate in _highest(rows, base).items() if rate > stated.get(what, 0.0)}
    changed = [f"{what} {stated.get(what, 0.0):g} → {rate:g}" for what, rate in exceeded.items()]
    if exceeded and not cpu:
        raise InputError(
            f"--base {base.name}: measured above its datasheet ({', '.join(changed)}); "
            "it is another device, give the base profile of the one that was measured"
        )
    if exceeded:
        sheet = _raised(sheet, exceeded)
    sources = {**base.sources, SOURCE: CITATION, PROCESSOR: PROCESSOR_CITATION}
    return base.model_copy(update={"datasheet": sheet, "sources": sources}), changed


def _with_processor(rows: Sequence[Measurement], sheet: Datasheet) -> Datasheet:
    """Name and last-level cache of the processor that was measured, the cache shared by the ranks of a node."""
    facts = {row.name: row.text for row in rows if row.kind == "environment"}
    memory = sheet.memory
    if facts.get("cache_bytes", "").isdecimal() and int(facts["cache_bytes"]):
        ranks = int(facts.get("ranks", "1")) // int(facts.get("nodes", "1"))
        mib = int(facts["cache_bytes"]) / max(1, ranks) / MIB
        memory = memory.model_copy(update={"l2_mib": Quantity(value=rounded(mib), source=PROCESSOR)})
    return sheet.model_copy(update={"device": facts.get("device", sheet.device), "memory": memory})


def _stated(sheet: Datasheet) -> dict[str, float]:
    """The figures that a rate is held against, in their own units."""
    return {
        **{f"peak_tflops.{dtype}": peak.value for dtype, peak in sheet.peak_tflops.items()},
        "bandwidth_gb_per_s": sheet.memory.bandwidth_gb_per_s.value,
        **{f"{level.name} GB/s": level.bandwidth / GB for level in sheet.topology},
    }


def _highest(rows: Sequence[Measurement], base: HardwareProfile) -> dict[str, float]:
    """The highest measured rate for each figure."""
    rates: dict[str, list[float]] = defaultdict(list)
    peak = max(quantity.value for quantity in base.datasheet.peak_tflops.values()) * TERA
    products = zip(
        [*timed(rows, "gemm"), *timed(rows, "attention")], [*gemm_samples(rows), *attention_samples(rows)], strict=True
    )
    for row, sample in products:
        _check_possible(row, sample.work.flops / sample.seconds / peak)
        rates[f"peak_tflops.{sample.dtype}"].append(sample.work.flops / sample.seconds / TERA)
    beyond = BEYOND_CACHE * base.datasheet.memory.l2_mib.value * MIB
    for row, sample in zip(timed(rows, "memory_bound"), memory_samples(rows, beyond), strict=True):
        _check_possible(row, sample.work.bytes_moved / sample.seconds / base.memory_bandwidth)
        if sample.work.bytes_moved >= beyond:
            rates["bandwidth_gb_per_s"].append(sample.work.bytes_moved / sample.seconds / GB)
    levels = {level.name: level for level in base.datasheet.topology}
    all_series = measured_series(rows, base)
    for row in timed(rows, "collective"):
        size, seconds = row.message_bytes or 0, (row.time_us or 0.0) / US_PER_S
        _check_possible(row, size / seconds / levels[row.level].adapter_bandwidth)
    for series in all_series:
        level = levels[series.level]
        curves = base.coefficients.collectives.get(series.level, {}).get(series.collective, ())
        if algorithm_of(series, curves, level) != "nvls":
            rates[f"{series.level} GB/s"] += [bandwidth for _, bandwidth in series.points]
    return {what: rounded(float(np.median(sorted(found)[-SAMPLES:]))) for what, found in rates.items()}


def _check_possible(row: Measurement, share: float) -> None:
    """Raise `RowError` for a rate, as a share of the base's, that no device comes near."""
    if share > IMPOSSIBLE:
        raise RowError(
            row,
            f"{title(row)}: {row.time_us:g} us is {share:.0e} times as fast as the base allows; it is no measurement, "
            "remove its row",
        )


def _raised(sheet: Datasheet, exceeded: Mapping[str, float]) -> Datasheet:
    """Measured rates in the place of figures that they exceed; peaks stay units x FLOP per clock x clock."""
    peaks = dict(sheet.peak_tflops)
    for what, rate in exceeded.items():
        if what.startswith("peak_tflops."):
            peaks[what.removeprefix("peak_tflops.")] = Quantity(value=rate, source=SOURCE)
    reference = next(dtype for dtype in ("bf16", "fp16", "fp32") if dtype in peaks)
    top = max(peaks.values(), key=lambda peak: peak.value)
    peaks[reference] = top
    per_clock = top.value * 1e6 / (sheet.compute_units.value * sheet.clock_tensor_mhz.value)
    changed = top.source == SOURCE
    memory = sheet.memory
    if "bandwidth_gb_per_s" in exceeded:
        bandwidth = Bandwidth(value=exceeded["bandwidth_gb_per_s"], source=SOURCE)
        memory = memory.model_copy(update={"bandwidth_gb_per_s": bandwidth})
    topology = [
        level.model_copy(update={"links_per_gpu": Quantity(value=1, source=SOURCE),
                                 "link_gb_per_s": Bandwidth(value=exceeded[f"{level.name} GB/s"], source=SOURCE)})
        if f"{level.name} GB/s" in exceeded else level
        for level in sheet.topology
    ]  # fmt: skip
    update = {"peak_tflops": peaks, "memory": memory, "topology": tuple(topology)}
    if changed:
        update["flop_per_clock_per_unit"] = Quantity(value=per_clock, source=SOURCE)
    return sheet.model_copy(update=update)
