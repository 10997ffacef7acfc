"""Coefficients of matrix products: tiles on compute units, by data type where types differ."""

from __future__ import annotations

from collections.abc import Sequence

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.quantities import Fraction, NonNegative, Quantity
from spsim.measuring.calibrate.coefficients import UNKNOWN
from spsim.measuring.calibrate.kernel_fit import LOWEST, Fit, fit_samples, with_missing
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import HALF_PRECISION, NO_ACCUMULATION, Sample, gemm_samples
from spsim.measuring.calibrate.solver import Parameter
from spsim.work import Gemm

SHARED = (
    Parameter("gemm.start_us", 0, 1e3, 1),
    Parameter("gemm.k_pad_bytes", 0, 1e4, 300),
    Parameter("gemm.full_rate_side", 0, 1e3, 100),
)
"""What the tiles of all types have in common."""


def fit_gemm(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """What all types share from products of 16 bits, which most were measured of and training runs in (of all where
    there are none), with their own rates; then the rates of each other type.

    The sizes of the tiles are those of the base: they are a property of the library, not a number to fit.
    """
    samples = gemm_samples(rows)
    leading = [s for s in samples if s.dtype in HALF_PRECISION] or samples
    fit = _fit_types(leading, profile, SHARED)
    for dtype in _types(samples):
        own = [s for s in samples if s.dtype == dtype and s not in leading]
        if own:
            other = _fit_types(own, fit.profile, ())
            fit = Fit(other.profile, fit.classes + other.classes)
    return fit


def _fit_types(samples: Sequence[Sample], profile: HardwareProfile, shared: Sequence[Parameter]) -> Fit:
    """Rates of some types together, and what they share."""
    if not samples:
        return Fit(profile, ())
    own = {dtype: [_product(s) for s in samples if s.dtype == dtype] for dtype in _types(samples)}
    parameters = [parameter for dtype, works in own.items() for parameter in _rates(dtype, works)]
    starts = {parameter.path: _START[parameter.path.split(".")[1]] for parameter in parameters}
    return fit_samples(samples, with_missing(profile, starts), [*shared, *parameters])


def _product(sample: Sample) -> Gemm:
    assert isinstance(sample.work, Gemm)
    return sample.work


def _rates(dtype: str, works: Sequence[Gemm]) -> list[Parameter]:
    """The coefficients of one type that some of its products depend on."""
    found = [Parameter(f"gemm.{name}.{dtype}", LOWEST, 1) for name in ("fraction", "burst_limit")]
    accumulated = max(work.accumulated for work in works)
    if accumulated:
        found.append(Parameter(f"gemm.weight_gradient_rate.{dtype}", 0.05, 1))
    if accumulated > NO_ACCUMULATION:
        found.append(Parameter(f"gemm.accumulation_exposed.{dtype}", 0, 4))
    if accumulated > NO_ACCUMULATION and dtype in (*HALF_PRECISION, "fp8"):
        # Of fp32 and tf32 a kernel of its own adds, after the product; of fp8 in torch, not in Transformer Engine.
        found.append(Parameter(f"gemm.accumulation_half_k.{dtype}", 100, 1e6))
    return found


_START = {
    "fraction": Fraction(value=0.5, source=UNKNOWN),
    "burst_limit": Fraction(value=1, source=UNKNOWN),
    "weight_gradient_rate": Fraction(value=1, source=UNKNOWN),
    "accumulation_exposed": NonNegative(value=1, source=UNKNOWN),
    "accumulation_half_k": Quantity(value=1e4, source=UNKNOWN),
}
"""What a search begins with where the base has no number."""


def _types(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.dtype for sample in samples))
