"""Durations of flash attention: its FLOPs at a share of the dense peak that falls for short sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from spsim.costs.seconds import Seconds
from spsim.inputs.hardware import HardwareProfile
from spsim.work import Direction, FlashAttention, each


class AttentionCost:
    """Durations of attention kernels on one device in one precision, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str, streaming_rate: float) -> None:
        """`streaming_rate` in bytes per second: at which operands and results pass."""
        by_dtype = profile.coefficients.attention_by_dtype
        # Where fp8 attention has no curves, products alone are in fp8, as Transformer Engine runs a layer.
        own = dtype if dtype != "fp8" or dtype in by_dtype else "bf16"
        self._curves = by_dtype.get(own, profile.coefficients.attention)
        self._path = f"attention_by_dtype.{own}" if own in by_dtype else "attention"
        self._peak = profile.peak(own)
        self._streaming_rate = streaming_rate
        masks = {"forward": self._curves.forward, "backward": self._curves.backward}
        self._blocks = {name: own.block_tokens.value if own.block_tokens else 0.0 for name, own in masks.items()}
        self._known: dict[object, tuple[Seconds, Seconds, Seconds]] = {}

    def time(self, work: FlashAttention) -> Seconds:
        """max(flops / (peak x fraction x n / (n + half_tokens)), memory time), n the shorter side.

        Where blocks of keys are known, a masked kernel computes half a block more for each query.
        """
        fraction, half_tokens, block = self._curve(work.direction, work.causal, work.head_dim)
        tokens = np.minimum(work.queries, work.keys)
        rate = self._peak * fraction * tokens / (tokens + half_tokens)
        memory_time = work.bytes_moved / self._streaming_rate
        total: Seconds = np.maximum(work.flops * self._in_blocks(work, block) / rate, memory_time)
        return total

    def _in_blocks(self, work: FlashAttention, block: Seconds) -> Seconds:
        """Pairs that are computed over those that the mask leaves; without a mask all are, and none is added."""
        if not any(self._blocks.values()):
            return 1.0
        whole = np.minimum(2 * work.queries * work.keys, work.twice_pairs + work.queries * block)
        ratio: Seconds = whole / work.twice_pairs
        return ratio

    def _curve(self, direction: Direction, causal: bool, head_dim: Any) -> tuple[Seconds, Seconds, Seconds]:
        """Fraction and half-length at a head size, linear between the measured sizes, constant beyond; and the block
        of keys. Sizes of many kernels are looked up one by one, as names and flags are.
        """
        key = (direction, causal, tuple(head_dim.tolist()) if isinstance(head_dim, np.ndarray) else head_dim)
        if key not in self._known:
            self._known[key] = each(self._at, *key)
        return self._known[key]

    def _at(self, direction: Direction, causal: bool, head_dim: int) -> tuple[float, float, float]:
        masks = getattr(self._curves, direction)
        curves = masks.causal if causal else masks.full
        known = sorted((int(size), curve.fraction.value, curve.half_tokens.value) for size, curve in curves.items())
        sizes, fractions, lengths = zip(*known, strict=True)
        fraction, half_tokens = (float(np.interp(head_dim, sizes, values)) for values in (fractions, lengths))
        return fraction, half_tokens, self._blocks[direction]

    def class_of(self, work: FlashAttention) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        return f"{self._path}.{work.direction}.{'causal' if work.causal else 'full'}"

    def coefficients_of(self, work: FlashAttention) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        blocks = (f"{self._path}.{work.direction}.block_tokens",) if work.causal else ()
        return (*blocks, "memory_bound.elementwise")
