"""Coefficients of memory-bound kernels: shares of the bandwidth, the rate in the cache, rates of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from spsim.costs.traffic import rates_key
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import KernelRates
from spsim.inputs.quantities import Bandwidth, Fraction, NonNegative
from spsim.measuring.calibrate.coefficients import UNKNOWN, leaf_at, with_leaves
from spsim.measuring.calibrate.kernel_fit import LOWEST, MIN_SHAPES, OTHER_SHAPE, Fit, fit_samples, with_missing
from spsim.measuring.calibrate.outcome import ClassFit, mean_error
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import Batch, Sample, memory_samples
from spsim.measuring.calibrate.solver import Parameter, solve
from spsim.units import GB, MIB
from spsim.work import KernelName, MemoryBound

WELL_DESCRIBED = 0.05
"""Held-out error up to which rates are not taken apart by row length."""
STREAMING = ("add", "copy")
"""Kernels of the class `elementwise` that do nothing but move data: its share is theirs where they were measured, since
products and attention read and write their tensors at it.
"""


def fit_memory_bound(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Share of the bandwidth by class and one rate in the cache, or rates of each kernel where those predict better.

    Traffic alone does not set the time of a kernel whose arithmetic takes longer (random numbers and
    exponentials on a CPU), that reduces over rows, or that torch composes of several: the kernels of such a class
    get two rates each by type and direction, and the share of the class serves those that were not measured.
    """
    cache = profile.datasheet.memory.l2_mib.value * MIB
    samples = _determined(memory_samples(rows, cache), profile, cache)
    if not samples:
        return Fit(profile, ())
    no_rates = profile.coefficients.model_copy(update={"kernel_rates": {}, "row_rates": {}})
    profile = profile.model_copy(update={"coefficients": no_rates})
    half = Fraction(value=0.5, source=UNKNOWN)
    profile = with_missing(profile, {f"memory_bound.{group}": half for group in _groups(samples)})
    shared = fit_samples(samples, profile, _shares(samples, profile))
    better = {}
    for plain in shared.classes:
        own = [sample for sample in samples if sample.group == plain.name]
        share = _share(own, profile, cache)
        fit = _own_rates(own, share.profile, cache)
        if mean_error(fit.classes) < OTHER_SHAPE * plain.mean_error:
            better[plain.name] = Fit(fit.profile, _with_share(fit.classes, share.classes))
    return _combined(samples, shared, better, profile) if better else shared


def _determined(samples: Sequence[Sample], profile: HardwareProfile, cache: float) -> list[Sample]:
    """Those of classes with a share of the bandwidth in the base, or with a kernel that moves more than the cache."""
    beyond = {sample.group for sample in samples if sample.work.bytes_moved > cache}
    return [s for s in samples if s.group in beyond or leaf_at(profile, f"memory_bound.{s.group}") is not None]


def _combined(samples: Sequence[Sample], shared: Fit, better: Mapping[str, Fit], profile: HardwareProfile) -> Fit:
    """Classes with rates by kernel, and the others fitted again without them."""
    rest = [sample for sample in samples if sample.group not in better]
    others = fit_samples(rest, profile, _shares(rest, profile)) if rest else Fit(profile, ())
    final, classes = others.profile, others.classes
    for fit in better.values():
        paths = _tables(path for found in fit.classes for path in found.paths)
        final = with_leaves(final, {path: leaf_at(fit.profile, path) for path in paths})
        classes += fit.classes
    return Fit(final, classes)


def _groups(samples: Iterable[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.group for sample in samples))


def _tables(paths: Iterable[str]) -> list[str]:
    """Both rates of a kernel stand in one table."""
    return list(
        dict.fromkeys(
            path.rpartition(".")[0] if path.startswith(("kernel_rates", "row_rates")) else path for path in paths
        )
    )


def _shares(samples: Sequence[Sample], profile: HardwareProfile) -> list[Parameter]:
    """Shares of the classes, and the rate of the cache, which is no slower than the memory."""
    cache, slowest = profile.datasheet.memory.l2_mib.value * MIB, profile.memory_bandwidth / GB
    parameters = [Parameter(f"memory_bound.{group}", LOWEST, 1) for group in _groups(samples)]
    if any(sample.work.bytes_moved < cache for sample in samples):
        parameters.append(Parameter("l2_bandwidth_gb_per_s", slowest, 1e5))
    return parameters


def _own_rates(samples: Sequence[Sample], profile: HardwareProfile, cache: float) -> Fit:
    """Rates of the kernels of one class by type and direction, each kernel a class of its own in the report."""
    kernels: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        key = rates_key(_kernel(sample), _work(sample).backward)
        own_passes = kernels.setdefault(_kernel(sample), {})
        own_passes.setdefault(f"kernel_rates.{sample.dtype}.{key}", []).append(sample)
    classes: list[ClassFit] = []
    for kernel, passes in kernels.items():
        parts: list[ClassFit] = []
        for path, own in passes.items():
            options = (_rates_of(path, own, profile, cache, start=start) for start in (False, True))
            fit = min(options, key=lambda fit: mean_error(fit.classes))
            by_row = _by_row(path, own, profile, cache) if mean_error(fit.classes) > WELL_DESCRIBED else None
            if by_row and mean_error(by_row.classes) < OTHER_SHAPE * mean_error(fit.classes):
                fit = by_row
            profile, parts = fit.profile, [*parts, *fit.classes]
        classes.append(_joined(kernel, parts))
    return Fit(profile, tuple(classes))


def _with_share(kernels: Sequence[ClassFit], share: Sequence[ClassFit]) -> tuple[ClassFit, ...]:
    """The share of a class belongs to its only kernel, or is a class beside several."""
    if len(kernels) > 1:
        return (*kernels, *share)
    only = kernels[0]
    return (replace(only, paths=(*only.paths, *(path for found in share for path in found.paths))),)


def _work(sample: Sample) -> MemoryBound:
    assert isinstance(sample.work, MemoryBound)
    return sample.work


def _kernel(sample: Sample) -> KernelName:
    kernel = _work(sample).kernel
    assert kernel
    return kernel


def _share(samples: Sequence[Sample], profile: HardwareProfile, cache: float) -> Fit:
    """The share of the bandwidth that kernels of a class without rates of their own take; none where all fit the cache.

    Its error is that of each measured kernel at the share of the others.
    """
    beyond = [sample for sample in samples if sample.work.bytes_moved > cache]
    if not beyond:
        return Fit(profile, ())
    group = samples[0].group
    path = f"memory_bound.{group}"

    def at_share_of(chosen: Sequence[Sample]) -> HardwareProfile:
        streaming = [sample for sample in chosen if _kernel(sample) in STREAMING]
        return solve(Batch(streaming or chosen), profile, [Parameter(path, LOWEST, 1)])

    batch, names = Batch(beyond), [_kernel(sample) for sample in beyond]
    held_out = np.full(len(beyond), np.nan)
    for left_out in dict.fromkeys(names):
        own = np.array([name == left_out for name in names])
        others = [sample for sample, out in zip(beyond, own, strict=True) if not out]
        if others:
            held_out[own] = batch.times(at_share_of(others))[own]
    final = at_share_of(beyond)
    text = {group: f"{leaf_at(final, path).value:g}"}
    return Fit(
        final,
        (ClassFit(f"other {group}", text, batch.seconds, batch.times(final), held_out, (path,), tuple(names), group),),
    )


def _rates_of(path: str, samples: Sequence[Sample], profile: HardwareProfile, cache: float, *, start: bool) -> Fit:
    """Rates of one kernel, with or without a start."""
    profile = with_leaves(profile, {path: _start(profile, samples[0].group, start=start)})
    fit = fit_samples(samples, profile, _rates(path, samples, cache, start=start))
    derived = [name for name in _tiers(path) if leaf_at(fit.profile, name).source == UNKNOWN]
    return Fit(fit.profile, tuple(replace(c, paths=tuple(dict.fromkeys((*c.paths, *derived)))) for c in fit.classes))


def _tiers(path: str) -> list[str]:
    """Both rates of a table: one that no row measured is the share of the class, whose source stands with it."""
    return [f"{path}.{tier}_gb_per_s" for tier in ("memory", "cache")]


def _by_row(path: str, samples: Sequence[Sample], profile: HardwareProfile, cache: float) -> Fit | None:
    """Rates of one kernel at each measured row length; none where there is one, or too few rows of one."""
    of_length: dict[int, list[Sample]] = {}
    for sample in samples:
        of_length.setdefault(_work(sample).row, []).append(sample)
    if len(of_length) < 2 or min(map(len, of_length.values())) < MIN_SHAPES:
        return None
    root, classes = path.replace("kernel_rates", "row_rates", 1), list[ClassFit]()
    for length, own in sorted(of_length.items()):
        fit = _rates_of(f"{root}.{length}", own, profile, cache, start=True)
        profile, classes = fit.profile, [*classes, *fit.classes]
    return Fit(profile, tuple(classes))


def _start(profile: HardwareProfile, group: str, *, start: bool) -> KernelRates:
    """The rates that the share of the class and the cache make."""
    share, cached = leaf_at(profile, f"memory_bound.{group}"), profile.coefficients.l2_bandwidth_gb_per_s
    memory = Bandwidth(value=max(0.1, share.value * profile.memory_bandwidth / GB), source=share.source)
    return KernelRates(
        memory_gb_per_s=memory,
        cache_gb_per_s=cached,
        start_us=NonNegative(value=0, source=share.source) if start else None,
    )


def _rates(path: str, samples: Sequence[Sample], cache: float, *, start: bool) -> list[Parameter]:
    """The rates that some kernel is in the range of; between half the cache and all of it both count."""
    tiers = {
        "memory": any(sample.work.bytes_moved > cache / 2 for sample in samples),
        "cache": any(sample.work.bytes_moved < cache for sample in samples),
    }
    rates = [Parameter(f"{path}.{tier}_gb_per_s", 0.1, 1e5) for tier, measured in tiers.items() if measured]
    return [*rates, Parameter(f"{path}.start_us", 0, 1e3, 10)] if start else rates


def _joined(kernel: str, parts: Sequence[ClassFit]) -> ClassFit:
    """Types and directions of one kernel together."""
    measured, fitted, held_out = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("measured", "fitted", "held_out")
    )
    return ClassFit(
        kernel,
        {},
        measured,
        fitted,
        held_out,
        tuple(path for part in parts for path in part.paths),
        tuple(name for part in parts for name in part.operators),
        parts[0].name,
    )
