"""From the ideal time of a step's FLOPs to the time that it takes, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spsim.units import PS_PER_S, seconds

if TYPE_CHECKING:
    from spsim.results.result import Result

IDEAL, BELOW_PEAK = "model FLOPs at peak", "products and attention below peak"
COMPUTE_BOUND = ("gemm", "attention")
SMALL, REST = 0.005, "other"
"""Share of the step below which parts are told as one, and its name."""


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


def noticeable(falls: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The parts that are no small share of one of these steps at least, in one order for all, longest first behind the
    products; what is left of each step as `other`, where any has it.
    """
    every = {part: max(own.get(part, 0.0) for own in falls) for fall in falls for part in fall}
    first = [part for part in (IDEAL, BELOW_PEAK) if part in every]
    ordered = [*first, *sorted((part for part in every if part not in first), key=lambda part: -every[part])]
    large = [part for part in ordered if any(own.get(part, 0.0) >= SMALL * sum(own.values()) for own in falls)]
    found = [{part: own.get(part, 0.0) for part in large} for own in falls]
    rests = [sum(took for part, took in own.items() if part not in large) for own in falls]
    return [own | {REST: rest} for own, rest in zip(found, rests, strict=True)] if any(rests) else found
