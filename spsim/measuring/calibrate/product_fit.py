"""Coefficients of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.quantities import Fraction, NonNegative
from spsim.measuring.calibrate.coefficients import with_values
from spsim.measuring.calibrate.kernel_fit import LOWEST, Fit, fit_samples, with_missing
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import NO_ACCUMULATION, Batch, Sample, gemm_samples
from spsim.measuring.calibrate.solver import Parameter, held_out_times, solve
from spsim.work import Gemm

WORTHWHILE = 0.95
"""Share of the held-out error to which an optional term of products has to bring it."""


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
