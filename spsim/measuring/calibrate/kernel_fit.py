"""Coefficients of kernels that compute: matrix products and flash attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile, Leaf
from spsim.inputs.kernel_coefficients import AttentionCurve
from spsim.inputs.quantities import Fraction, NonNegative
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves, with_values
from spsim.measuring.calibrate.outcome import ClassFit, Seconds
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import (
    HALF_PRECISION,
    NO_ACCUMULATION,
    Batch,
    Sample,
    attention_samples,
    gemm_samples,
)
from spsim.measuring.calibrate.solver import Parameter, held_out_times, solve
from spsim.work import FlashAttention, Gemm

MIN_SHAPES = 4
"""Shapes of a class from which half of them can be left out."""
WORTHWHILE = 0.95
"""Share of the held-out error to which an optional term of products has to bring it."""
OTHER_SHAPE = 0.8
"""The same of coefficients that describe a class in another way."""
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
    final = solve(batch, profile, parameters)
    held_out = _where_enough(samples, held_out_times(samples, final, parameters))
    fitted = batch.times(final)
    values = {parameter.path: float(leaf_at(final, parameter.path).value) for parameter in parameters}
    classes = []
    for group in dict.fromkeys(sample.group for sample in samples):
        own = np.array([sample.group == group for sample in samples])
        paths = _paths_of([s for s in samples if s.group == group], final, values)
        found = {short_name(path): f"{values[path]:g}" for path in paths}
        names = tuple(sample.name for sample in samples if sample.group == group)
        classes.append(ClassFit(group, found, batch.seconds[own], fitted[own], held_out[own], paths, names))
    return Fit(final, tuple(classes))


def _where_enough(samples: Sequence[Sample], times: Seconds) -> Seconds:
    shapes: dict[str, set[object]] = {}
    for sample in samples:
        shapes.setdefault(sample.group, set()).add(sample.shape)
    return np.where([len(shapes[sample.group]) >= MIN_SHAPES for sample in samples], times, np.nan)


def _paths_of(samples: Sequence[Sample], profile: HardwareProfile, fitted: Iterable[str]) -> tuple[str, ...]:
    """The fitted coefficients that some of these samples take their time from."""
    used = {path for s in samples for path in ComputeCost(profile, s.dtype).coefficients_of(s.work)}
    return tuple(path for path in fitted if any(path == name or path.startswith(f"{name}.") for name in used))


def short_name(path: str) -> str:
    """The end of a dotted path, with the head size that it is of."""
    *_, owner, name = ("", *path.split("."))
    return f"{name} at {owner}" if owner.isdecimal() else name


def with_missing(profile: HardwareProfile, starts: Mapping[str, Leaf]) -> HardwareProfile:
    """The profile with coefficients to begin with, at paths where it has none."""
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
    profile = with_missing(profile, starts)
    parameters = [Parameter(path, LOWEST, 1) for path in starts]
    accumulated = [s.work.accumulated for s in samples if isinstance(s.work, Gemm)]
    if any(accumulated):
        parameters.append(Parameter("gemm.weight_gradient_rate", 0.05, 1))
    optional = [Parameter("gemm.k_pad", 0, 4096, 100), Parameter("gemm.tail_waves", 0, 4)]
    if max(accumulated) > NO_ACCUMULATION:
        optional.append(Parameter("gemm.accumulation_exposed", 0, 4))
    measured_only = [Parameter("gemm.traffic_exposed", 0, 4), Parameter("gemm.start_us", 0, 1e3, 10)]
    zero = {parameter.path: NonNegative(value=0, source="unknown") for parameter in measured_only}
    chosen = _with_worthwhile(samples, with_missing(profile, zero), parameters, [*optional, *measured_only])
    taken = {path: leaf for path, leaf in zero.items() if any(p.path == path for p in chosen)}
    return fit_samples(samples, with_missing(profile, taken), chosen)


def _with_worthwhile(
    samples: Sequence[Sample], profile: HardwareProfile, parameters: list[Parameter], optional: Sequence[Parameter]
) -> list[Parameter]:
    """The parameters and, one after the other, the optional term that lowers the held-out error most."""
    profile = solve(Batch(samples), profile, parameters)
    best, left = _mean_error(samples, profile, parameters), list(optional)
    while left:
        trials = [(with_values(profile, {term.path: term.typical}), [*parameters, term]) for term in left]
        errors = [_mean_error(samples, *trial) for trial in trials]
        lowest = int(np.argmin(errors))
        if errors[lowest] > WORTHWHILE * best:
            break
        best, (profile, parameters) = errors[lowest], trials[lowest]
        del left[lowest]
    return parameters


def _mean_error(samples: Sequence[Sample], profile: HardwareProfile, parameters: Sequence[Parameter]) -> float:
    times = held_out_times(samples, profile, parameters)
    return float(np.mean(np.abs(np.log(times / np.array([sample.seconds for sample in samples])))))


def fit_attention(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Curves by direction and masking: of training's 16-bit types, and of each other type, whose kernel is another.

    The masked kernel is fitted after the full one and begins with its coefficients: it is the same kernel, and
    differs by the blocks that it skips.
    """
    base, classes = profile.coefficients, list[ClassFit]()
    samples = attention_samples(rows)
    for dtype in dict.fromkeys(_own_type(sample) for sample in samples):
        if dtype:
            start = base.attention_by_dtype.get(dtype, base.attention)
            profile = with_leaves(profile, {f"attention_by_dtype.{dtype}": start})
        root = f"attention_by_dtype.{dtype}" if dtype else "attention"
        for direction, mask in product(("forward", "backward"), ("full", "causal")):
            own = [s for s in samples if _own_type(s) == dtype and s.group.endswith(f"{direction} {mask}")]
            if own:
                fit = _fit_curves(own, profile, f"{root}.{direction}", mask)
                profile, classes = fit.profile, [*classes, *fit.classes]
    return Fit(profile, tuple(classes))


def _own_type(sample: Sample) -> str:
    return "" if sample.dtype in HALF_PRECISION else sample.dtype


def _fit_curves(samples: Sequence[Sample], profile: HardwareProfile, root: str, mask: str) -> Fit:
    """Share of the peak and half-length by head size; of a masked kernel also its block, if that predicts better."""
    lengths: dict[int, set[float]] = {}
    for sample in samples:
        work = sample.work
        assert isinstance(work, FlashAttention)
        lengths.setdefault(work.head_dim, set()).add(min(work.queries, work.keys))
    starts = {
        f"{root}.{mask}.{head_dim}": _nearest(leaf_at(profile, f"{root}.{'full' if len(own) > 1 else mask}"), head_dim)
        for head_dim, own in lengths.items()
    }
    profile = with_leaves(profile, starts)
    fractions = [Parameter(f"{root}.{mask}.{head_dim}.fraction", LOWEST, 1) for head_dim in lengths]
    halves = [
        Parameter(f"{root}.{mask}.{head_dim}.half_tokens", 0, 1e5, 100)
        for head_dim, own in lengths.items()
        if len(own) > 1
    ]
    plain = fractions + halves
    if mask == "full":
        return fit_samples(samples, profile, plain)
    block = Parameter(f"{root}.block_tokens", 0, 4096, 512)
    with_block = with_missing(profile, {block.path: NonNegative(value=0, source="unknown")})
    options = [(profile, plain), (with_block, [*fractions, block]), (with_block, [*plain, block])]
    fits = [fit_samples(samples, *option) for option in options]
    errors = [fit.classes[0].mean_error * OTHER_SHAPE**-number for number, fit in enumerate(fits)]
    fit = fits[int(np.argmin(errors))]
    taken = tuple(parameter.path for parameter in halves)
    return Fit(fit.profile, tuple(replace(c, paths=tuple(dict.fromkeys(c.paths + taken))) for c in fit.classes))


def _nearest(curves: Mapping[str, AttentionCurve], head_dim: int) -> AttentionCurve:
    return curves[min(curves, key=lambda size: abs(int(size) - head_dim))]
