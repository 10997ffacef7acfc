"""Durations of fused attention: thread blocks on the compute units of a device.

A block takes `block_rows` queries of one head and loops over their keys; backward it takes keys and loops over queries.
As many blocks run at once as the units hold (slots). Blocks of equal length run in waves. Under a causal mask a block
loops over what it sees, and the next block starts where one ends; how much longer than the mean of the slots the last
one takes follows from the order in which all kernels start their blocks, head by head in the order of positions
(`_imbalance`). The forms and their errors: docs/model.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from spsim.costs.key_split import FILLED, SPLIT_ROWS, key_blocks, splits
from spsim.costs.seconds import Flags, Seconds, down, exponential, given, larger, pick, smaller, some, up
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import AttentionCoefficients, AttentionPass
from spsim.inputs.quantities import Quantity
from spsim.units import GB, US_PER_S
from spsim.work import CAST_TYPES, FP32_BYTES, AttentionKernel, Direction, FlashAttention, Framework, each, products_of

FLOPS = 2
"""Of a multiplication: an addition comes with it."""
KEPT = 128
"""Sorts of kernels whose constants are remembered."""


class _Constants(NamedTuple):
    """Of one kernel, direction, masking and head size; arrays where kernels differ."""

    backward: Flags
    causal: Flags
    splits: Flags
    start: Seconds
    """Seconds."""
    traffic: Seconds
    """Share of the time of operands and results."""
    rows: Seconds
    tokens: Seconds
    """Keys that a masked block skips together."""
    half_tokens: Seconds
    slots: Seconds
    """Blocks that run at once."""
    lone: Seconds
    """Time of a block alone on its unit over that of as many as it holds."""
    token: Seconds
    """Seconds of a block for each token."""
    block: Seconds
    """Seconds of a block beside its loop."""
    split_token: Seconds
    """Seconds of a block of a split kernel for each token."""
    join: Seconds
    """Seconds."""
    join_traffic: Seconds
    stream: Seconds
    """Bytes per second that one block reads."""
    random: Seconds
    """Seconds of a random number, all units at work."""
    least_over: Seconds
    """What the last block takes beyond the mean of the slots, in longest blocks, and the next three: see
    `_imbalance`.
    """
    over: Seconds
    less_over: Seconds
    paired: Seconds
    """1 where two heads can run as one, else 0."""
    skips: Flags
    """What is outside a window."""
    others: Seconds
    """Share of the other slots in all."""
    any_causal: bool = False
    all_causal: bool = False
    any_splits: bool = False
    any_lone: bool = False
    """Of all kernels of an array, so that nothing is computed in vain."""


class AttentionCost:
    """Durations of attention kernels on one device in one data type, beyond the start of any kernel."""

    def __init__(self, profile: HardwareProfile, dtype: str, streaming_rate: float) -> None:
        """`dtype` is that of the attention's own products; `streaming_rate` in bytes per second: at which operands and
        results pass.
        """
        self._profile = profile
        self._dtype = dtype
        self._own = profile.coefficients.attention_by_dtype.get(dtype, {})
        self._own_path = f"attention_by_dtype.{dtype}"
        self._units = profile.datasheet.compute_units.value
        # The fp32 peak counts a multiplication and an addition an instruction.
        self._vector_rate = profile.peak("fp32") / 2 if "fp32" in profile.datasheet.peak_tflops else np.inf
        self._unit_peak = profile.peak(dtype) / self._units
        self._streaming_rate = streaming_rate
        self._known, self._one = lru_cache(KEPT)(self._of_all), lru_cache(KEPT)(self._at)

    def time(self, work: FlashAttention) -> Seconds:
        """start + blocks on the units + the exposed part of the traffic, and no less than the traffic takes."""
        own = self._constants(work)
        busy = self._blocks(work, own) + own.traffic * self._traffic(work, own) / self._streaming_rate
        if given(work.dropout):
            busy = busy + own.random * work.dropout * work.batch * work.heads * work.twice_pairs / 2
        total: Seconds = own.start + larger(busy, work.bytes_moved / self._streaming_rate)
        return self._with_split(work, own, total) if own.any_splits else total

    def _blocks(self, work: FlashAttention, own: _Constants) -> Seconds:
        """Seconds from the start of the first block to the end of the last."""
        grouped, queries = _grouped(work)
        rows = pick(own.backward, work.keys, queries)
        others = pick(own.backward, work.queries, work.keys)
        per_head = up(rows / own.rows)
        packed = some(work.documents > 0)
        if packed:
            # The last block of a document is half full in the mean.
            per_head = per_head + work.documents / 2
            others = pick(work.documents > 0, work.longest, others)
        heads = work.batch * grouped
        blocks = heads * per_head
        if not own.any_causal:
            return self._in_waves(own, blocks, own.token * others)
        # Tokens of the mean block, with the part of its last tile that is masked, and of the longest, which backward
        # belongs to keys that all queries see.
        mean = smaller(others, work.twice_pairs / (2 * rows) + own.half_tokens)
        last = smaller(others, mean + larger(0.0, smaller(rows, others) - own.tokens) / 2)
        if packed:
            # Of n tokens of a document, r a block and t a tile: n^2 / 2r + n - r / 12 + t / 2, if n is any number.
            tokens = work.twice_pairs / (2 * own.rows) + rows
            tokens = tokens + work.documents * (own.half_tokens - own.rows / 12)
            mean = pick(work.documents > 0, tokens / per_head, mean)
            last = pick(work.documents > 0, others, last)
        loop = own.token * pick(own.backward, others, last)
        block = own.block + loop
        parts = larger(1, work.documents) if packed else 1
        over = _imbalance(own, per_head / parts, heads * parts) * block
        spread = blocks * (own.block + own.token * mean) / own.slots + over
        masked: Seconds = pick(blocks <= own.slots, own.block + self._alone(own, loop, blocks), larger(block, spread))
        if some(work.window > 0):
            # Tokens that a block computes are those of its own rows and of whole tiles behind them, or before.
            seen = own.rows + own.tokens * up((work.window - 1) / own.tokens)
            within = self._in_waves(own, blocks, own.token * seen)
            masked = pick((work.window > 0) & own.skips, smaller(masked, within), masked)
        if own.all_causal:
            return masked
        seconds: Seconds = pick(own.causal, masked, self._in_waves(own, blocks, own.token * others))
        return seconds

    def _in_waves(self, own: _Constants, blocks: Seconds, loop: Seconds) -> Seconds:
        """Seconds of equal blocks: whole waves, and one for the rest."""
        waves = down(blocks / own.slots)
        rest = blocks - waves * own.slots
        seconds: Seconds = waves * (own.block + loop) + (rest > 0) * (own.block + self._alone(own, loop, rest))
        return seconds

    def _alone(self, own: _Constants, loop: Seconds, blocks: Seconds) -> Seconds:
        """The loop of blocks, which is shorter where each of so many has a unit for itself."""
        if not own.any_lone:
            return loop
        seconds: Seconds = loop * pick(blocks <= self._units, own.lone, 1.0)
        return seconds

    @staticmethod
    def _traffic(work: FlashAttention, own: _Constants) -> Seconds:
        """Bytes of operands and results; gradients of keys and values are made for each head of queries first."""
        shared = work.queries * work.heads + work.keys * work.kv_heads
        whole: Seconds = pick(own.backward, (work.queries + work.keys) * work.heads / shared, 1.0)
        return work.bytes_moved * whole

    def _with_split(self, work: FlashAttention, own: _Constants, plain: Seconds) -> Seconds:
        """The time of a kernel that divides keys among blocks where few queries leave units without one."""
        heads, rows = _grouped(work)
        blocks = work.batch * heads * up(rows / SPLIT_ROWS)
        if not some(own.splits & (blocks < FILLED * own.slots)):
            return plain
        tile = key_blocks(work.head_dim)
        parts = splits(blocks, own.slots, np.ceil(work.keys / tile))
        keys = np.minimum(work.keys, np.ceil(work.keys / parts / tile) * tile)
        number = blocks * parts
        loops = self._in_waves(own, number, own.split_token * keys)
        stream = np.minimum(self._streaming_rate, np.where(own.splits, number * own.stream, self._streaming_rate))
        results = 2 * FP32_BYTES * parts * work.batch * work.heads * work.queries * work.value_dim
        busy = loops + own.traffic * work.bytes_moved / self._streaming_rate
        joined = own.join + own.join_traffic * results / self._streaming_rate
        total = own.start + np.maximum(busy, work.bytes_moved / stream) + joined
        chosen: Seconds = np.where(own.splits & (parts > 1), total, plain)
        return chosen

    def _constants(self, work: FlashAttention) -> _Constants:
        """Coefficients at a head size, linear between the measured sizes, constant beyond. Sizes of many kernels are
        looked up one by one, as names and flags are.
        """
        sizes = (_as_key(work.head_dim), _as_key(work.value_dim))
        found: _Constants = self._known(work.kernel, work.direction, work.causal, *sizes)
        one = work.queries == 1
        if some(one) and some(one & np.logical_not(found.splits) & (work.keys > 1)):
            raise InputError(
                "attention of one query: only a kernel that splits keys has a measured time; "
                f"ask for one of {', '.join(self._splitting()) or 'another profile'}"
            )
        return found

    def _of_all(self, *sort: Any) -> _Constants:
        """Of one kernel, or arrays of many."""
        backward, causal, splits, *numbers = each(self._one, *sort)
        found = _Constants(backward != 0, causal != 0, splits != 0, *numbers)
        found = found._replace(skips=found.skips != 0)
        return found._replace(
            any_causal=some(found.causal),
            all_causal=bool(np.all(found.causal)),
            any_splits=some(found.splits),
            any_lone=some(found.lone != 1.0),
        )

    def _splitting(self) -> list[str]:
        """Kernels that divide keys."""
        return [name for name, kernel in self._profile.coefficients.attention.items() if kernel.forward.split]

    def _at(
        self, wanted: AttentionKernel | Framework, direction: Direction, causal: bool, head_dim: int, value_dim: int
    ) -> tuple[float, ...]:
        own = self._pass(wanted, direction)
        tiles = sorted((int(size), tile) for size, tile in (own.causal if causal else own.full).items())
        sizes = [size for size, _ in tiles]
        fraction = float(np.interp(head_dim, sizes, [tile.fraction.value for _, tile in tiles]))
        block_us = float(np.interp(head_dim, sizes, [tile.block_us.value for _, tile in tiles]))
        per_unit, lone_rate = _value(own.blocks_per_unit, 1.0), _value(own.lone_rate, 1.0)
        rows, split = own.block_rows.value, own.split
        slots, tokens = self._units * per_unit, _value(own.block_tokens, rows)
        of_keys, of_values = products_of(direction)
        width = of_keys * head_dim + of_values * value_dim
        pair = rows * FLOPS * per_unit / (self._unit_peak * fraction)
        return (
            direction == "backward", causal, split is not None, own.start_us.value / US_PER_S,
            own.traffic_exposed.value, rows, tokens, tokens / 2, slots,
            1 / (per_unit * lone_rate) if per_unit > 1 else 1.0, pair * width, block_us / US_PER_S,
            *((SPLIT_ROWS / rows * pair * width / split.rate.value, split.join_us.value / US_PER_S,
               split.join_traffic.value, split.block_gb_per_s.value * GB) if split else (0.0, 0.0, 0.0, 0.0)),
            _value(own.dropout_instructions, 0.0) / self._vector_rate, *_IMBALANCE[direction],
            _value(own.window_skipped, 1.0), 1 - 1 / slots,
        )  # fmt: skip

    def _pass(self, wanted: AttentionKernel | Framework, direction: Direction) -> AttentionPass:
        kernel = self._profile.attention_kernel(wanted)
        if self._dtype in CAST_TYPES and kernel not in self._own:
            raise InputError(
                f"attention in {self._dtype}: {self._profile.name} has no rates of {kernel} in it; run it in bf16"
            )
        coefficients: AttentionCoefficients = self._own.get(kernel, self._profile.coefficients.attention[kernel])
        found: AttentionPass = getattr(coefficients, direction)
        return found

    def _path(self, work: FlashAttention) -> str:
        kernel = self._profile.attention_kernel(work.kernel)
        return f"{self._own_path if kernel in self._own else 'attention'}.{kernel}.{work.direction}"

    def class_of(self, work: FlashAttention) -> str:
        """Dotted path of the coefficients whose held-out error is that of the duration."""
        return f"{self._path(work)}.{'causal' if work.causal else 'full'}"

    def coefficients_of(self, work: FlashAttention) -> tuple[str, ...]:
        """Dotted paths of the other coefficients behind a duration."""
        own = self._path(work)
        names: tuple[str, ...] = (
            "start_us",
            "traffic_exposed",
            "block_rows",
            "block_tokens",
            "blocks_per_unit",
            "lone_rate",
            "window_skipped",
            "split",
        )
        names += ("dropout_instructions",) if np.any(work.dropout) else ()
        picked = (f"attention_picked.{work.kernel}",) if work.kernel in self._picked else ()
        return ("memory_bound.elementwise", *picked, *(f"{own}.{name}" for name in names))

    @property
    def _picked(self) -> Any:
        return self._profile.coefficients.attention_picked


def _grouped(work: FlashAttention) -> tuple[Seconds, Seconds]:
    """Heads of a sequence and their rows: of one query all heads that share keys are rows of one block
    (`seqlenq_ngroups_swapped` of FlashAttention-2).
    """
    one = work.queries == 1
    if not some(one):
        return work.heads, work.queries
    return pick(one, work.kv_heads, work.heads), pick(one, work.heads / work.kv_heads, work.queries)


def _as_key(size: Any) -> Any:
    """A head size, or those of many kernels, as names and flags are given."""
    return tuple(size.tolist()) if isinstance(size, np.ndarray) else size


def _value(leaf: Quantity | Any | None, otherwise: float) -> float:
    return otherwise if leaf is None else float(leaf.value)


def _imbalance(own: _Constants, per_head: Seconds, heads: Seconds) -> Seconds:
    """What the last block takes beyond the mean of the slots, in longest blocks; x = blocks of a head / slots.

    Blocks start in the order of positions. Forward the longest comes last: 0.65 - 0.07 x, at least one half. Backward
    it comes first: 0.64 - 0.36 x; and where a head fills the slots (x = 1) two heads run as one, the short blocks of
    one beside the long ones of the other, so that an even number of heads leaves nothing over. Both are what
    starting such blocks one by one gives (tests/test_attention_cost.py), within 0.05 from 4 blocks a head on.
    """
    x = per_head / own.slots
    pairs = own.paired * (1 - 2 * (heads % 2)) * exponential(-6 * heads * ((x - 1) * (x - 1)))
    share: Seconds = larger(own.least_over, own.over - own.less_over * x) * (1 - pairs) * own.others
    return share


_IMBALANCE: dict[Direction, tuple[float, ...]] = {"forward": (0.5, 0.65, 0.07, 0.0), "backward": (0.0, 0.64, 0.36, 1.0)}
"""The least, at x = 0, less for each x, and whether heads pair."""
