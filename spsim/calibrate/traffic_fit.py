"""Coefficients of memory-bound kernels: shares of the bandwidth, the rate in the cache, rates of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from spsim.calibrate.coefficients import leaf_at, with_leaves
from spsim.calibrate.kernel_fit import LOWEST, OTHER_SHAPE, Fit, fit_samples, with_missing
from spsim.calibrate.outcome import ClassFit
from spsim.calibrate.records import Measurement
from spsim.calibrate.samples import Batch, Sample, memory_samples
from spsim.calibrate.solver import Parameter, solve
from spsim.hardware import Bandwidth, Fraction, HardwareProfile, KernelRates, NonNegative
from spsim.units import GB, MIB
from spsim.work import MemoryBound


def fit_memory_bound(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Share of the bandwidth by class and one rate in the cache, or rates of their own where those predict better.

    Traffic alone does not set the time of a kernel whose arithmetic takes longer (random numbers and
    exponentials on a CPU), or that also reduces over rows: such a class gets two rates by type and direction.
    """
    cache = profile.datasheet.memory.l2_mib.value * MIB
    samples = _determined(memory_samples(rows, cache), profile, cache)
    if not samples:
        return Fit(profile, ())
    no_rates = profile.coefficients.model_copy(update={"kernel_rates": {}})
    profile = profile.model_copy(update={"coefficients": no_rates})
    half = Fraction(value=0.5, source="unknown")
    profile = with_missing(profile, {f"memory_bound.{group}": half for group in _groups(samples)})
    shared = fit_samples(samples, profile, _shares(samples, profile))
    better = []
    for plain in shared.classes:
        own = [s for s in samples if s.group == plain.name]
        fit = min(
            (_own_rates(own, profile, cache, start=start) for start in (False, True)),
            key=lambda fit: fit.classes[0].mean_error,
        )
        if fit.classes[0].mean_error < OTHER_SHAPE * plain.mean_error:
            better.append(fit)
    return _combined(samples, shared, better, profile) if better else shared


def _determined(samples: Sequence[Sample], profile: HardwareProfile, cache: float) -> list[Sample]:
    """Those of classes with a share of the bandwidth in the base, or with a kernel that moves more than the cache."""
    beyond = {sample.group for sample in samples if sample.work.bytes_moved > cache}
    return [s for s in samples if s.group in beyond or leaf_at(profile, f"memory_bound.{s.group}") is not None]


def _combined(samples: Sequence[Sample], shared: Fit, better: Sequence[Fit], profile: HardwareProfile) -> Fit:
    """Classes with rates of their own, and the others fitted again without them."""
    apart = {fit.classes[0].name for fit in better}
    rest = [sample for sample in samples if sample.group not in apart]
    others = fit_samples(rest, profile, _shares(rest, profile)) if rest else Fit(profile, ())
    final = others.profile
    for fit in better:
        final = with_leaves(final, {path: leaf_at(fit.profile, path) for path in _tables(fit.classes[0].paths)})
    return Fit(final, (*others.classes, *(fit.classes[0] for fit in better)))


def _groups(samples: Iterable[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.group for sample in samples))


def _tables(paths: Iterable[str]) -> list[str]:
    """Both rates of a kernel stand in one table."""
    return list(dict.fromkeys(path.rpartition(".")[0] if path.startswith("kernel_rates") else path for path in paths))


def _shares(samples: Sequence[Sample], profile: HardwareProfile) -> list[Parameter]:
    """Shares of the classes, and the rate of the cache, which is no slower than the memory."""
    cache, slowest = profile.datasheet.memory.l2_mib.value * MIB, profile.memory_bandwidth / GB
    parameters = [Parameter(f"memory_bound.{group}", LOWEST, 1) for group in _groups(samples)]
    if any(sample.work.bytes_moved < cache for sample in samples):
        parameters.append(Parameter("l2_bandwidth_gb_per_s", slowest, 1e5))
    return parameters


def _own_rates(samples: Sequence[Sample], profile: HardwareProfile, cache: float, *, start: bool) -> Fit:
    """Rates of one class: two for each data type and direction, with or without a start, and its share beyond
    the cache.
    """
    kernels: dict[str, list[Sample]] = {}
    for sample in samples:
        assert isinstance(sample.work, MemoryBound)
        direction = "backward" if sample.work.backward else "forward"
        path = f"kernel_rates.{sample.dtype}.{sample.work.operator_class}_{direction}"
        kernels.setdefault(path, []).append(sample)
    beyond = [sample for sample in samples if sample.work.bytes_moved > cache]
    share = f"memory_bound.{samples[0].group}"
    if beyond:
        profile = solve(Batch(beyond), profile, [Parameter(share, LOWEST, 1)])
    parts: list[ClassFit] = []
    for path, own in kernels.items():
        profile = with_leaves(profile, {path: _start(profile, own[0].group, start=start)})
        fit = fit_samples(own, profile, _rates(path, own, cache, start=start))
        profile, parts = fit.profile, [*parts, *fit.classes]
    joined = _joined(parts)
    return Fit(profile, (replace(joined, paths=(*joined.paths, share)) if beyond else joined,))


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


def _joined(parts: Sequence[ClassFit]) -> ClassFit:
    """The kernels of one class together."""
    measured, fitted, held_out = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("measured", "fitted", "held_out")
    )
    return ClassFit(
        parts[0].name,
        {_kernel(part): _rates_text(part) for part in parts},
        measured,
        fitted,
        held_out,
        tuple(path for part in parts for path in part.paths),
        tuple(name for part in parts for name in part.operators),
    )


def _kernel(part: ClassFit) -> str:
    """`fp32 forward` of the paths of one kernel."""
    _, dtype, kernel, _ = part.paths[0].split(".")
    return f"{dtype} {kernel.rpartition('_')[2]}"


def _rates_text(part: ClassFit) -> str:
    units = {"memory_gb_per_s": "memory {} GB/s", "cache_gb_per_s": "cache {} GB/s", "start_us": "start {} us"}
    return ", ".join(units[name].format(value) for name, value in part.coefficients.items())
