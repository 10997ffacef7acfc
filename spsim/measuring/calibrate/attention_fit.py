"""Coefficients of flash attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import AttentionCurve
from spsim.inputs.quantities import NonNegative
from spsim.measuring.calibrate.coefficients import UNKNOWN, leaf_at, with_leaves
from spsim.measuring.calibrate.kernel_fit import LOWEST, OTHER_SHAPE, Fit, fit_samples, with_missing
from spsim.measuring.calibrate.outcome import ClassFit
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.samples import HALF_PRECISION, Sample, attention_samples
from spsim.measuring.calibrate.solver import Parameter
from spsim.work import FlashAttention


def fit_attention(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Curves by direction and masking: of training's 16-bit types, and of each other type, whose kernel is another.

    The masked kernel is fitted after the full one and begins with its coefficients: it is the same kernel, and
    differs by the blocks that it skips.
    """
    base, classes = profile.coefficients, list[ClassFit]()
    samples = attention_samples(rows)
    for dtype in dict.fromkeys(_own_type(sample) for sample in samples):
        if dtype:
            start = base.attention_by_dtype.get(dtype, base.attention)
            profile = with_leaves(profile, {f"attention_by_dtype.{dtype}": start})
        root = f"attention_by_dtype.{dtype}" if dtype else "attention"
        for direction, mask in product(("forward", "backward"), ("full", "causal")):
            own = [s for s in samples if _own_type(s) == dtype and s.group.endswith(f"{direction} {mask}")]
            if own:
                fit = _fit_curves(own, profile, f"{root}.{direction}", mask)
                profile, classes = fit.profile, [*classes, *fit.classes]
    return Fit(profile, tuple(classes))


def _own_type(sample: Sample) -> str:
    return "" if sample.dtype in HALF_PRECISION else sample.dtype


def _fit_curves(samples: Sequence[Sample], profile: HardwareProfile, root: str, mask: str) -> Fit:
    """Share of the peak and half-length by head size; of a masked kernel also its block, if that predicts better."""
    lengths: dict[int, set[float]] = {}
    for sample in samples:
        work = sample.work
        assert isinstance(work, FlashAttention)
        lengths.setdefault(work.head_dim, set()).add(min(work.queries, work.keys))
    starts = {
        f"{root}.{mask}.{head_dim}": _nearest(leaf_at(profile, f"{root}.{'full' if len(own) > 1 else mask}"), head_dim)
        for head_dim, own in lengths.items()
    }
    profile = with_leaves(profile, starts)
    fractions = [Parameter(f"{root}.{mask}.{head_dim}.fraction", LOWEST, 1) for head_dim in lengths]
    halves = [
        Parameter(f"{root}.{mask}.{head_dim}.half_tokens", 0, 1e5, 100)
        for head_dim, own in lengths.items()
        if len(own) > 1
    ]
    plain = fractions + halves
    if mask == "full":
        return fit_samples(samples, profile, plain)
    block = Parameter(f"{root}.block_tokens", 0, 4096, 512)
    with_block = with_missing(profile, {block.path: NonNegative(value=0, source=UNKNOWN)})
    options = [(profile, plain), (with_block, [*fractions, block]), (with_block, [*plain, block])]
    fits = [fit_samples(samples, *option) for option in options]
    errors = [fit.classes[0].mean_error * OTHER_SHAPE**-number for number, fit in enumerate(fits)]
    fit = fits[int(np.argmin(errors))]
    taken = tuple(parameter.path for parameter in halves)
    return Fit(fit.profile, tuple(replace(c, paths=tuple(dict.fromkeys(c.paths + taken))) for c in fit.classes))


def _nearest(curves: Mapping[str, AttentionCurve], head_dim: int) -> AttentionCurve:
    return curves[min(curves, key=lambda size: abs(int(size) - head_dim))]
