"""Coefficients of fused attention kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import AttentionCoefficients, AttentionTile
from spsim.inputs.quantities import NonNegative
from spsim.measuring.calibrate.coefficients import UNKNOWN, leaf_at, with_leaves, with_values
from spsim.measuring.calibrate.kernel_fit import LOWEST, OTHER_SHAPE, Fit, fit_samples
from spsim.measuring.calibrate.outcome import ClassFit
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import HALF_PRECISION, Batch, Sample, attention_samples
from spsim.measuring.calibrate.solver import Parameter, refine
from spsim.work import FlashAttention

GOOD = 0.02
"""Mean error below which no other coefficients are looked for."""
LONGEST = 3
"""Kernels of a tile that its rate is first taken from."""
ROWS_PER_PARAMETER = 2
"""Measurements that each coefficient common to all head sizes takes beyond those of single head sizes."""


def fit_attention(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Each kernel and direction: in training's 16-bit types, and in each other type, which has its own rates.

    A kernel begins with its coefficients in the base, or with those of the kernel that torch picks there. How many
    rows a block has and how many blocks share a unit stay as they are: they are facts about the kernel.
    """
    base, classes = profile, list[ClassFit]()
    samples = sorted(attention_samples(rows), key=_root)
    for root, own in groupby(samples, key=_root):
        profile = _with_start(profile, root, base)
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


def _with_start(profile: HardwareProfile, root: str, base: HardwareProfile) -> HardwareProfile:
    """The profile with coefficients of a kernel to begin with, those of the base."""
    kernel_path, _, _ = root.rpartition(".")
    table, _, kernel = kernel_path.rpartition(".")
    if kernel in (leaf_at(profile, table) or {}):
        return profile
    known: dict[str, AttentionCoefficients] = base.coefficients.attention  # type: ignore[assignment]
    start = known.get(kernel, known[base.attention_kernel("torch")])
    common = {} if kernel in profile.coefficients.attention else {f"attention.{kernel}": start}
    return with_leaves(profile, {kernel_path: start, **common})


def _fit_pass(samples: Sequence[Sample], profile: HardwareProfile, root: str) -> Fit:
    """What is common to all head sizes, and the tiles of each; also the block of keys that a masked kernel skips
    together, if that describes it better.
    """
    tiles = dict.fromkeys(("causal" if _work(s).causal else "full", _work(s).head_dim) for s in samples)
    own = leaf_at(profile, root)
    begun = own.model_copy(update={mask: _tiles(own, mask, tiles) for mask in ("causal", "full")})
    profile = _with_rates(samples, with_leaves(profile, {root: begun}), root, tiles)
    parameters = list(_parameters(samples, profile, root, tiles))
    batch = Batch(samples)
    found = refine(batch, profile, parameters)
    if _error(batch, found) > GOOD and any(mask == "causal" for mask, _ in tiles):
        block = Parameter(f"{root}.block_tokens", 0, 4096, 512)
        other = refine(batch, _as_without_mask(found, root, block), [*parameters, block])
        if _error(batch, other) < OTHER_SHAPE * _error(batch, found):
            found, parameters = other, [*parameters, block]
    return fit_samples(samples, found, parameters, refine)


def _as_without_mask(profile: HardwareProfile, root: str, block: Parameter) -> HardwareProfile:
    """Tiles of the masked kernel as those of the full one, and blocks that it skips: it may differ by these alone."""
    own = leaf_at(profile, root)
    causal = {size: own.full.get(size, tile) for size, tile in own.causal.items()}
    typical = NonNegative(value=block.typical, source=UNKNOWN)
    return with_leaves(profile, {root: own.model_copy(update={"causal": causal, "block_tokens": typical})})


def _error(batch: Batch, profile: HardwareProfile) -> float:
    return float(np.mean(np.abs(np.log(batch.times(profile) / batch.seconds))))


def _tiles(own: Any, mask: str, tiles: dict[tuple[str, int], None]) -> dict[str, AttentionTile]:
    """The tiles of a mask, those of new head sizes begun with the nearest; head sizes without rows are left out."""
    known: dict[str, AttentionTile] = getattr(own, mask)
    sizes = [size for other, size in tiles if other == mask]
    found = {str(size): known[min(known, key=lambda name: abs(int(name) - size))] for size in sorted(sizes)}
    return found or known


def _with_rates(
    samples: Sequence[Sample], profile: HardwareProfile, root: str, tiles: dict[tuple[str, int], None]
) -> HardwareProfile:
    """Shares of the peak to begin with: those of the profile times how much faster its longest kernels were."""
    changes = {}
    for mask, size in tiles:
        own = [s for s in samples if _work(s).head_dim == size and _work(s).causal == (mask == "causal")]
        longest = Batch(sorted(own, key=lambda s: s.seconds)[-LONGEST:])
        path = f"{root}.{mask}.{size}.fraction"
        faster = float(np.median(longest.times(profile) / longest.seconds))
        changes[path] = min(max(leaf_at(profile, path).value * faster, LOWEST), 1.0)
    return with_values(profile, changes)


def _parameters(
    samples: Sequence[Sample], profile: HardwareProfile, root: str, tiles: dict[tuple[str, int], None]
) -> Iterator[Parameter]:
    """Coefficients that the samples tell apart, with their bounds."""
    for mask, size in tiles:
        own = [_work(s) for s in samples if _work(s).head_dim == size and _work(s).causal == (mask == "causal")]
        yield Parameter(f"{root}.{mask}.{size}.fraction", LOWEST, 1)
        if len({(work.queries, work.keys) for work in own}) > 1:
            yield Parameter(f"{root}.{mask}.{size}.block_us", 0, 1e3, 5)
    common = [Parameter(f"{root}.start_us", 0, 1e3, 5), Parameter(f"{root}.traffic_exposed", 0, 10, 0.5)]
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
