"""Coefficients of classes of kernels, fitted together: the profile with them, and the errors of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spsim.costs.kernels import ComputeCost
from spsim.inputs.hardware import HardwareProfile, Leaf
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves
from spsim.measuring.calibrate.outcome import ClassFit, Seconds
from spsim.measuring.calibrate.samples import Batch, Sample
from spsim.measuring.calibrate.solver import Parameter, held_out_times, solve
from spsim.work import DATA_TYPES

MIN_SHAPES = 4
"""Shapes of a class from which half of them can be left out."""
OTHER_SHAPE = 0.8
"""Share of the held-out error to which coefficients that describe a class in another way have to bring it."""
LOWEST = 1e-4
"""Smallest share of a peak that is looked for."""


@dataclass(frozen=True)
class Fit:
    """Classes fitted together: the profile with their coefficients, and each class."""

    profile: HardwareProfile
    classes: tuple[ClassFit, ...]


Search = Callable[[Batch, HardwareProfile, Sequence[Parameter]], HardwareProfile]


def fit_samples(
    samples: Sequence[Sample], profile: HardwareProfile, parameters: Sequence[Parameter], search: Search = solve
) -> Fit:
    """Final coefficients from all samples, and the errors of each class by halves of the shapes."""
    batch = Batch(samples)
    final = search(batch, profile, parameters)
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
    used = {path for s in samples for path in ComputeCost(profile, s.dtype, burst=True).coefficients_of(s.work)}
    return tuple(path for path in fitted if any(path == name or path.startswith(f"{name}.") for name in used))


def short_name(path: str) -> str:
    """The end of a dotted path, with the head size that it is of; without the data type."""
    *_, owner, name = ("", *path.split("."))
    if name in DATA_TYPES:
        return owner
    return f"{name} at {owner}" if owner.isdecimal() else name


def with_missing(profile: HardwareProfile, starts: Mapping[str, Leaf]) -> HardwareProfile:
    """The profile with coefficients to begin with, at paths where it has none."""
    return with_leaves(profile, {path: leaf for path, leaf in starts.items() if leaf_at(profile, path) is None})
