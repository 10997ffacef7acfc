"""Least squares on the logarithms of times, and the error on shapes that were held out.

An error of a factor counts the same for a short and a long kernel. The loss is soft (soft_l1): beyond
`OUTLIER` a row pulls with a constant force, as in a median, so that a disturbed measurement does not bend
the rest. Coefficients stay within bounds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from spsim.inputs.hardware import HardwareProfile
from spsim.measuring.calibrate.coefficients import Trial, leaf_at, with_values
from spsim.measuring.calibrate.samples import Batch, Sample, Seconds

OUTLIER = 0.1
"""Residual (of the logarithm) from which a row counts as an outlier."""
SEED = 20221205
"""Of the random half of the shapes."""
CLOSE = 1e-6
"""Relative change at which the search ends: below the digits that are written."""
NOTHING = 1e-3
"""Share of its typical size below which a term that may be zero is."""
DIGITS = 4
"""Significant digits of a fitted coefficient."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A coefficient to fit: within bounds, and of a typical size where it may be zero."""

    path: str
    lower: float
    upper: float
    typical: float = 1.0

    def inner(self, value: float) -> float:
        """As the solver sees it: a logarithm, or a multiple of the typical size."""
        clipped = min(max(value, self.lower), self.upper)
        return float(np.log(clipped)) if self.lower > 0 else clipped / self.typical

    def outer(self, inner: float) -> float:
        """The coefficient itself."""
        value = float(np.exp(inner)) if self.lower > 0 else inner * self.typical
        return min(max(value if value > NOTHING * self.typical else 0.0, self.lower), self.upper)


def solve(batch: Batch, profile: HardwareProfile, parameters: Sequence[Parameter]) -> HardwareProfile:
    """The profile with parameters that describe the batch best, from two starts: its own values, and others.

    A kernel takes the longer of two times, and only the longer one moves with its coefficient: from a low
    rate, and from a term that is not nothing, each is felt.
    """
    other = {p.path: 0.1 * p.upper if p.lower > 0 else p.typical for p in parameters}
    found = [refine(batch, start, parameters) for start in (profile, with_values(profile, other))]
    return min(found, key=lambda fitted: _cost(batch.times(fitted) / batch.seconds))


def refine(batch: Batch, profile: HardwareProfile, parameters: Sequence[Parameter]) -> HardwareProfile:
    """The same from its own values alone."""
    if not parameters:
        return profile

    def values(inner: npt.NDArray[np.float64]) -> dict[str, float]:
        return {p.path: p.outer(x) for p, x in zip(parameters, inner, strict=True)}

    trial = Trial(profile, [p.path for p in parameters])

    def residuals(inner: npt.NDArray[np.float64]) -> Seconds:
        logs: Seconds = np.log(batch.times(trial.at(values(inner))) / batch.seconds)
        return logs

    start = _inside(parameters, [leaf_at(profile, p.path).value for p in parameters])
    bounds = ([p.inner(p.lower) for p in parameters], [p.inner(p.upper) for p in parameters])
    found = least_squares(
        residuals, start, bounds=bounds, loss="soft_l1", f_scale=OUTLIER, ftol=CLOSE, xtol=CLOSE, gtol=CLOSE
    )
    return with_values(profile, {path: rounded(value) for path, value in values(found.x).items()})


def _cost(ratios: Seconds) -> float:
    """What the solver minimises: soft_l1 of the logarithms."""
    return float(np.sum(np.sqrt(1 + (np.log(ratios) / OUTLIER) ** 2) - 1))


def _inside(parameters: Sequence[Parameter], start: Sequence[float]) -> list[float]:
    """A start strictly within the bounds."""
    inner = []
    for parameter, value in zip(parameters, start, strict=True):
        lower, upper = parameter.inner(parameter.lower), parameter.inner(parameter.upper)
        margin = 1e-3 * (upper - lower)
        inner.append(min(max(parameter.inner(value), lower + margin), upper - margin))
    return inner


def rounded(value: float) -> float:
    """A number to the digits that a profile writes."""
    return float(f"{value:.{DIGITS}g}")


def halves(samples: Sequence[Sample]) -> list[npt.NDArray[np.bool_]]:
    """Which samples to hold out: a random half of the shapes of each class and stratum, then the other half.

    Those with the same shapes are cut alike.
    """
    shapes = sorted({sample.shape for sample in samples}, key=repr)
    ranks = dict(zip(shapes, np.random.default_rng(SEED).permutation(len(shapes)), strict=True))
    parts: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        parts.setdefault((sample.group, sample.stratum), []).append(index)
    second = np.zeros(len(samples), dtype=bool)
    for indices in parts.values():
        own = sorted({samples[index].shape for index in indices}, key=lambda shape: ranks[shape])
        later = set(own[len(own) // 2 :])
        second[indices] = [samples[index].shape in later for index in indices]
    return [second, ~second]


def held_out_times(samples: Sequence[Sample], profile: HardwareProfile, parameters: Sequence[Parameter]) -> Seconds:
    """Seconds of each sample with coefficients fitted on the half of the shapes that it is not in.

    The search begins with the values of the profile, those of all samples for one, and ends where it must.
    """
    times = np.empty(len(samples))
    for out in halves(samples):
        inside, outside = (list(_chosen(samples, mask)) for mask in (~out, out))
        if outside:
            times[out] = Batch(outside).times(refine(Batch(inside), profile, parameters) if inside else profile)
    return times


def _chosen(samples: Sequence[Sample], mask: npt.NDArray[np.bool_]) -> Iterator[Sample]:
    return (sample for sample, chosen in zip(samples, mask, strict=True) if chosen)
