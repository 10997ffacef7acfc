"""Coefficients of fused attention kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import AttentionCoefficients, AttentionTile
from spsim.inputs.quantities import NonNegative
from spsim.measuring.calibrate.coefficients import leaf_at, with_leaves
from spsim.measuring.calibrate.kernel_fit import LOWEST, OTHER_SHAPE, Fit, fit_samples, with_missing
from spsim.measuring.calibrate.outcome import ClassFit
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import HALF_PRECISION, Sample, attention_samples
from spsim.measuring.calibrate.solver import Parameter
from spsim.work import FlashAttention

GOOD = 0.05
"""Mean held-out error below which no other coefficients are looked for."""
ROWS_PER_PARAMETER = 2
"""Measurements that each coefficient common to all head sizes takes beyond those of single head sizes."""


def fit_attention(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Each kernel and direction: in training's 16-bit types, and in each other type, which has its own rates.

    A kernel begins with its coefficients in the base, or with those of the kernel that torch picks there. How many
    rows a block has and how many blocks share a unit stay as they are: they are facts about the kernel.
    """
    classes = list[ClassFit]()
    samples = sorted(attention_samples(rows), key=_root)
    for root, own in groupby(samples, key=_root):
        profile = _with_start(profile, root)
        fit = _fit_pass(list(own), profile, root)
        profile, classes = fit.profile, [*classes, *fit.classes]
    return Fit(profile, tuple(classes))


def _work(sample: Sample) -> FlashAttention:
    assert isinstance(sample.work, FlashAttention)
    return sample.work


def _root(sample: Sample) -> str:
    """Dotted path of the coefficients that time a sample."""
    own = "attention" if sample.dtype in HALF_PRECISION else f"attention_by_dtype.{sample.dtype}"
    return f"{own}.{_work(sample).kernel}.{_work(sample).direction}"


def _with_start(profile: HardwareProfile, root: str) -> HardwareProfile:
    """The profile with coefficients of a kernel to begin with."""
    kernel_path, _, _ = root.rpartition(".")
    table, _, kernel = kernel_path.rpartition(".")
    known: dict[str, AttentionCoefficients] = profile.coefficients.attention  # type: ignore[assignment]
    if kernel in (leaf_at(profile, table) or {}):
        return profile
    start = known.get(kernel, known[profile.attention_kernel("torch")])
    return with_leaves(profile, {kernel_path: start, f"attention.{kernel}": start})


def _fit_pass(samples: Sequence[Sample], profile: HardwareProfile, root: str) -> Fit:
    """What is common to all head sizes, and the tiles of each; also the block of keys that a masked kernel skips
    together, if that predicts better.
    """
    tiles = dict.fromkeys(("causal" if _work(s).causal else "full", _work(s).head_dim) for s in samples)
    own = leaf_at(profile, root)
    begun = own.model_copy(update={mask: _tiles(own, mask, tiles) for mask in ("causal", "full")})
    profile = with_leaves(profile, {root: begun})
    plain = list(_parameters(samples, profile, root, tiles))
    fit = fit_samples(samples, profile, plain)
    if _error(fit) < GOOD or not any(mask == "causal" for mask, _ in tiles):
        return fit
    block = Parameter(f"{root}.block_tokens", 0, 4096, 512)
    other = with_missing(profile, {block.path: NonNegative(value=0, source="unknown")})
    with_block = fit_samples(samples, other, [*plain, block])
    return with_block if _error(with_block) < OTHER_SHAPE * _error(fit) else fit


def _error(fit: Fit) -> float:
    return float(np.mean([one.mean_error for one in fit.classes]))


def _tiles(own: Any, mask: str, tiles: dict[tuple[str, int], None]) -> dict[str, AttentionTile]:
    """The tiles of a mask, those of new head sizes begun with the nearest; head sizes without rows are left out."""
    known: dict[str, AttentionTile] = getattr(own, mask)
    sizes = [size for other, size in tiles if other == mask]
    found = {str(size): known[min(known, key=lambda name: abs(int(name) - size))] for size in sorted(sizes)}
    return found or known


def _parameters(
    samples: Sequence[Sample], profile: HardwareProfile, root: str, tiles: dict[tuple[str, int], None]
) -> Iterator[Parameter]:
    """Coefficients that the samples tell apart, with their bounds."""
    for mask, size in tiles:
        own = [_work(s) for s in samples if _work(s).head_dim == size and _work(s).causal == (mask == "causal")]
        yield Parameter(f"{root}.{mask}.{size}.fraction", LOWEST, 1)
        if len({(work.queries, work.keys) for work in own}) > 1:
            yield Parameter(f"{root}.{mask}.{size}.block_us", 0, 1e5, 5)
    common = [Parameter(f"{root}.start_us", 0, 1e4, 5), Parameter(f"{root}.traffic_exposed", 0, 10, 0.5)]
    own = leaf_at(profile, root)
    if own.lone_rate:
        common.append(Parameter(f"{root}.lone_rate", 1 / own.blocks_per_unit.value, 1))
    if own.split:
        common += [
            Parameter(f"{root}.split.rate", 0.3, 2), Parameter(f"{root}.split.join_us", 0, 100, 5),
            Parameter(f"{root}.split.join_traffic", 0, 10, 0.5),
        ]  # fmt: skip
        if any(_work(s).queries == 1 for s in samples):
            common.append(Parameter(f"{root}.split.block_gb_per_s", 1, 1e3))
    if len(samples) >= ROWS_PER_PARAMETER * (2 * len(tiles) + len(common)):
        yield from common
