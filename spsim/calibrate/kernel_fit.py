"""Coefficients of kernels: matrix products, flash attention, memory-bound kernels, and their start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from spsim.calibrate.coefficients import leaf_at, with_leaves, with_values
from spsim.calibrate.outcome import ClassFit, Seconds
from spsim.calibrate.records import Measurement
from spsim.calibrate.samples import (
    NO_ACCUMULATION,
    Batch,
    Sample,
    attention_samples,
    gemm_samples,
    memory_samples,
    timed,
)
from spsim.calibrate.solver import Parameter, held_out_times, rounded, solve
from spsim.hardware import AttentionCurve, Fraction, HardwareProfile, Leaf
from spsim.units import MIB, US_PER_S
from spsim.work import FlashAttention, Gemm

MIN_SHAPES = 4
"""Shapes of a class from which half of them can be left out."""
WORTHWHILE = 0.98
"""Share of the held-out error to which an optional term has to bring it."""
LOWEST = 1e-4
"""Smallest share of a peak that is looked for."""


@dataclass(frozen=True)
class Fit:
    """Classes fitted together: the profile with their coefficients, and each class."""

    profile: HardwareProfile
    classes: tuple[ClassFit, ...]


def fit_samples(samples: Sequence[Sample], profile: HardwareProfile, parameters: Sequence[Parameter]) -> Fit:
    """Final coefficients from all samples, and the errors of each class by halves of the shapes."""
    batch = Batch(samples)
    held_out = _where_enough(samples, held_out_times(samples, profile, parameters))
    final = solve(batch, profile, parameters)
    fitted = batch.times(final)
    values = {parameter.path: float(leaf_at(final, parameter.path).value) for parameter in parameters}
    classes = []
    for group in dict.fromkeys(sample.group for sample in samples):
        own = np.array([sample.group == group for sample in samples])
        paths = tuple(_paths_of([s for s in samples if s.group == group], values))
        found = {path: values[path] for path in paths}
        classes.append(ClassFit(group, found, batch.seconds[own], fitted[own], held_out[own], paths))
    return Fit(final, tuple(classes))


def _where_enough(samples: Sequence[Sample], times: Seconds) -> Seconds:
    shapes: dict[str, set[object]] = {}
    for sample in samples:
        shapes.setdefault(sample.group, set()).add(sample.shape)
    return np.where([len(shapes[sample.group]) >= MIN_SHAPES for sample in samples], times, np.nan)


def _paths_of(samples: Sequence[Sample], values: Mapping[str, float]) -> Iterator[str]:
    """The fitted coefficients that some of these samples take their time from."""
    return (path for path in values if any(_uses(sample, path) for sample in samples))


def _uses(sample: Sample, path: str) -> bool:
    work, name = sample.work, path.split(".")
    match work:
        case Gemm():
            if name[1] == "fraction":
                return name[2] == sample.dtype
            return name[0] == "gemm" and (work.accumulated > 0 or name[1] not in ACCUMULATING)
        case FlashAttention():
            return name[:4] == ["attention", work.direction, _mask(work), str(work.head_dim)]
    return name[-1] == work.operator_class or path == "l2_bandwidth_gb_per_s"


ACCUMULATING = ("weight_gradient_rate", "accumulation_exposed")


def _mask(work: FlashAttention) -> str:
    return "causal" if work.causal else "full"


def fit_start(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """The start of a kernel in a busy stream: the median over kernels too small to take time."""
    path = "kernel_overhead_us"
    times = [row.time_us for row in timed(rows, "launch") if row.time_us is not None and row.name.startswith("stream")]
    if not times:
        return Fit(profile, ())
    value = rounded(float(np.median(times)))
    others = [float(np.median(np.delete(times, index))) for index in range(len(times))] if len(times) > 2 else [np.nan]
    measured = np.array(times) / US_PER_S
    fitted, held_out = (np.broadcast_to(np.array(time) / US_PER_S, len(times)) for time in ([value], others))
    return Fit(
        with_values(profile, {path: value}),
        (ClassFit("kernel start", {path: value}, measured, fitted, held_out, (path,)),),
    )


def fit_memory_bound(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Share of the bandwidth by operator class, and the rate of kernels that stay in the last-level cache."""
    samples = memory_samples(rows)
    if not samples:
        return Fit(profile, ())
    paths = [f"memory_bound.{group}" for group in dict.fromkeys(sample.group for sample in samples)]
    profile = _with_missing(profile, {path: Fraction(value=0.5, source="unknown") for path in paths})
    parameters = [Parameter(path, LOWEST, 1) for path in paths]
    cache = profile.datasheet.memory.l2_mib.value * MIB
    if any(sample.work.bytes_moved < cache for sample in samples):
        parameters.append(Parameter("l2_bandwidth_gb_per_s", 0.1, 1e5))
    return fit_samples(samples, profile, parameters)


def _with_missing(profile: HardwareProfile, starts: Mapping[str, Leaf | AttentionCurve]) -> HardwareProfile:
    return with_leaves(profile, {path: leaf for path, leaf in starts.items() if leaf_at(profile, path) is None})


def fit_gemm(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Share of the peak by data type, and of the other terms those that lower the held-out error.

    Tail and tile stand in one product, `tail_waves x tile_m x tile_n`: the tile stays that of the base.
    """
    samples = gemm_samples(rows)
    if not samples:
        return Fit(profile, ())
    dtypes = dict.fromkeys(sample.dtype for sample in samples)
    starts = {f"gemm.fraction.{dtype}": Fraction(value=0.5, source="unknown") for dtype in dtypes}
    profile = _with_missing(profile, starts)
    parameters = [Parameter(path, LOWEST, 1) for path in starts]
    if any(isinstance(s.work, Gemm) and s.work.accumulated > 0 for s in samples):
        parameters.append(Parameter("gemm.weight_gradient_rate", 0.05, 1))
    return fit_samples(samples, profile, _with_worthwhile(samples, profile, parameters))


def _with_worthwhile(
    samples: Sequence[Sample], profile: HardwareProfile, parameters: list[Parameter]
) -> list[Parameter]:
    """The parameters with those optional terms that lower the held-out error, as few as will do."""
    optional = [Parameter("gemm.k_pad", 0, 4096, 100), Parameter("gemm.tail_waves", 0, 4)]
    if any(isinstance(s.work, Gemm) and s.work.accumulated > NO_ACCUMULATION for s in samples):
        optional.append(Parameter("gemm.accumulation_exposed", 0, 4))
    best, chosen = np.inf, parameters
    for number in range(len(optional) + 1):
        for terms in combinations(optional, number):
            tried = [*parameters, *terms]
            error = _mean_error(samples, held_out_times(samples, profile, tried))
            if error < WORTHWHILE * best:
                best, chosen = error, tried
    return chosen


def _mean_error(samples: Sequence[Sample], times: Seconds) -> float:
    return float(np.mean(np.abs(np.log(times / np.array([sample.seconds for sample in samples])))))


def fit_attention(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Share of the peak and half-length by direction, masking and head size."""
    samples = attention_samples(rows)
    if not samples:
        return Fit(profile, ())
    lengths: dict[str, set[float]] = {}
    starts: dict[str, AttentionCurve] = {}
    for sample in samples:
        work = sample.work
        assert isinstance(work, FlashAttention)
        masks = f"attention.{work.direction}.{_mask(work)}"
        path = f"{masks}.{work.head_dim}"
        lengths.setdefault(path, set()).add(min(work.queries, work.keys))
        starts[path] = _nearest(leaf_at(profile, masks), work.head_dim)
    profile = _with_missing(profile, starts)
    parameters = []
    for path, own in lengths.items():
        parameters.append(Parameter(f"{path}.fraction", LOWEST, 1))
        if len(own) > 1:
            parameters.append(Parameter(f"{path}.half_tokens", 0, 1e5, 100))
    return fit_samples(samples, profile, parameters)


def _nearest(curves: Mapping[str, AttentionCurve], head_dim: int) -> AttentionCurve:
    return curves[min(curves, key=lambda size: abs(int(size) - head_dim))]
