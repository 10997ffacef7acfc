"""From the ideal time of a step's FLOPs to the time that it takes, part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spsim.units import PS_PER_S, seconds

if TYPE_CHECKING:
    from spsim.results.result import Result

IDEAL, BELOW_PEAK = "model FLOPs at peak", "products and attention below peak"
COMPUTE_BOUND = ("gemm", "attention")


def waterfall(result: Result) -> dict[str, float]:
    """Seconds by part, which add up to the step of the rank that ends last.

    First the model's FLOPs at the dense peak, those of a mean GPU; then what products and attention take beyond that,
    of a rank with more than its share of them that too; then all other parts of `accounts`, longest first, with what
    kernels lose to communication apart.
    """
    slowdown = result.scenario.hardware.coefficients.overlap_slowdown.value
    parts = result.account.charged(slowdown)
    busy = sum(parts.pop(name, 0) for name in COMPUTE_BOUND)
    ideal = min(round(result.ideal_s * PS_PER_S), busy)
    found = {IDEAL: ideal, BELOW_PEAK: busy - ideal, **dict(parts.most_common())}
    return {name: seconds(ps) for name, ps in found.items() if ps}
