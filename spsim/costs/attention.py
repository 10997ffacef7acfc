"""Durations of fused attention: thread blocks on the compute units of a device.

A block takes `block_rows` queries of one head and loops over their keys; backward it takes keys and loops over queries.
As many blocks run at once as the units hold (slots). Blocks of equal length run in waves. Under a causal mask a block
loops over what it sees, and the next block starts where one ends; how much longer than the mean of the slots the last
one takes follows from the order in which all kernels start their blocks, head by head in the order of positions
(`_imbalance`). The forms and their errors: docs/model.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from spsim.costs.key_split import FILLED, SPLIT_ROWS, key_blocks, splits
from spsim.costs.seconds import Seconds
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.kernel_coefficients import AttentionCoefficients, AttentionPass
from spsim.inputs.quantities import Quantity
from spsim.units import GB, US_PER_S
from spsim.work import CAST_TYPES, AttentionKernel, Direction, FlashAttention, Framework, each

FP32_BYTES = 4
FLOPS = 2
"""Of a multiplication: an addition comes with it."""


class _Constants(NamedTuple):
    """Of one kernel, direction, masking and head size; arrays where kernels differ."""

    backward: Seconds
    """1 or 0, as are the next two."""
    causal: Seconds
    splits: Seconds
    start: Seconds
    """Seconds."""
    traffic: Seconds
    """Share of the time of operands and results."""
    rows: Seconds
    tokens: Seconds
    """Keys that a masked block skips together."""
    slots: Seconds
    """Blocks that run at once."""
    lone: Seconds
    """Time of a block alone on its unit over that of as many as it holds."""
    token: Seconds
    """Seconds of a block for each token and each multiplication of a pair."""
    block: Seconds
    """Seconds of a block beside its loop."""
    split_rate: Seconds
    """Of the blocks of a split kernel over the others'."""
    join: Seconds
    """Seconds."""
    join_traffic: Seconds
    stream: Seconds
    """Bytes per second that one block reads."""
    random: Seconds
    """Seconds of a random number, all units at work."""
    any_causal: bool
    all_causal: bool
    any_splits: bool
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
        self._known: dict[object, _Constants] = {}

    def time(self, work: FlashAttention) -> Seconds:
        """start + blocks on the units + the exposed part of the traffic, and no less than the traffic takes."""
        own = self._constants(work)
        exposed = own.traffic * self._traffic(work, own) / self._streaming_rate
        random = own.random * work.dropout * work.batch * work.heads * work.twice_pairs / 2
        busy = self._blocks(work, own) + exposed + random
        total: Seconds = own.start + np.maximum(busy, work.bytes_moved / self._streaming_rate)
        return self._with_split(work, own, total) if own.any_splits else total

    def _blocks(self, work: FlashAttention, own: _Constants) -> Seconds:
        """Seconds from the start of the first block to the end of the last."""
        rows = np.where(own.backward, work.keys, work.queries)
        others = np.where(own.backward, work.queries, work.keys)
        per_head = np.ceil(rows / own.rows)
        heads = work.batch * work.heads
        blocks, token = heads * per_head, own.token * work.width
        if not own.any_causal:
            return self._in_waves(own, blocks, token * others)
        # Tokens of the mean block, with the part of its last tile that is masked, and of the longest, which backward
        # belongs to keys that all queries see.
        mean = np.minimum(others, work.twice_pairs / (2 * rows) + own.tokens / 2)
        last = np.minimum(others, mean + np.maximum(0.0, np.minimum(rows, others) - own.tokens) / 2)
        loop = token * np.where(own.backward, others, last)
        block = own.block + loop
        spread = blocks * (own.block + token * mean) / own.slots + _imbalance(own, per_head, heads) * block
        masked = np.where(blocks <= own.slots, own.block + self._alone(own, loop, blocks), np.maximum(block, spread))
        if own.all_causal:
            return masked
        seconds: Seconds = np.where(own.causal, masked, self._in_waves(own, blocks, token * others))
        return seconds

    def _in_waves(self, own: _Constants, blocks: Seconds, loop: Seconds) -> Seconds:
        """Seconds of equal blocks: whole waves, and one for the rest."""
        waves = np.floor(blocks / own.slots)
        rest = blocks - waves * own.slots
        seconds: Seconds = waves * (own.block + loop) + (rest > 0) * (own.block + self._alone(own, loop, rest))
        return seconds

    def _alone(self, own: _Constants, loop: Seconds, blocks: Seconds) -> Seconds:
        """The loop of blocks, which is shorter where each of so many has a unit for itself."""
        seconds: Seconds = loop * np.where(blocks <= self._units, own.lone, 1.0)
        return seconds

    @staticmethod
    def _traffic(work: FlashAttention, own: _Constants) -> Seconds:
        """Bytes of operands and results; gradients of keys and values are made for each head of queries first."""
        shared = work.queries * work.heads + work.keys * work.kv_heads
        whole: Seconds = np.where(own.backward, (work.queries + work.keys) * work.heads / shared, 1.0)
        return work.bytes_moved * whole

    def _with_split(self, work: FlashAttention, own: _Constants, plain: Seconds) -> Seconds:
        """The time of a kernel that divides keys among blocks where few queries leave units without one."""
        # All heads of queries that share keys are rows of one block where there is one query.
        grouped = work.queries == 1
        heads = work.batch * np.where(grouped, work.kv_heads, work.heads)
        blocks = heads * np.ceil(np.where(grouped, work.heads / work.kv_heads, work.queries) / SPLIT_ROWS)
        if not np.any((own.splits > 0) & (blocks < FILLED * own.slots)):
            return plain
        tile = key_blocks(work.head_dim)
        parts = splits(blocks, own.slots, np.ceil(work.keys / tile))
        keys = np.minimum(work.keys, np.ceil(work.keys / parts / tile) * tile)
        token = SPLIT_ROWS / own.rows * own.token * work.width / np.where(own.splits, own.split_rate, 1.0)
        number = blocks * parts
        loops = self._in_waves(own, number, token * keys)
        stream = np.minimum(self._streaming_rate, np.where(own.splits, number * own.stream, self._streaming_rate))
        results = 2 * FP32_BYTES * parts * work.batch * work.heads * work.queries * work.value_dim
        busy = loops + own.traffic * work.bytes_moved / self._streaming_rate
        joined = own.join + own.join_traffic * results / self._streaming_rate
        total = own.start + np.maximum(busy, work.bytes_moved / stream) + joined
        chosen: Seconds = np.where((own.splits > 0) & (parts > 1), total, plain)
        return chosen

    def _constants(self, work: FlashAttention) -> _Constants:
        """Coefficients at a head size, linear between the measured sizes, constant beyond. Sizes of many kernels are
        looked up one by one, as names and flags are.
        """
        sizes = tuple(work.head_dim.tolist()) if isinstance(work.head_dim, np.ndarray) else work.head_dim
        key = (work.kernel, work.direction, work.causal, sizes)
        if key not in self._known:
            found = each(self._at, *key)
            _, causal, split, *_ = found
            of_all = {"any_causal": np.any(causal), "all_causal": np.all(causal), "any_splits": np.any(split)}
            self._known[key] = _Constants(*found, **{name: bool(value) for name, value in of_all.items()})
        if np.any(work.queries == 1) and np.any((work.queries == 1) & (self._known[key].splits == 0) & (work.keys > 1)):
            raise InputError(
                "attention of one query: only a kernel that splits keys has a measured time; "
                f"ask for one of {', '.join(self._splitting()) or 'another profile'}"
            )
        return self._known[key]

    def _splitting(self) -> list[str]:
        """Kernels that divide keys."""
        return [name for name, kernel in self._profile.coefficients.attention.items() if kernel.forward.split]

    def _at(
        self, wanted: AttentionKernel | Framework, direction: Direction, causal: bool, head_dim: int
    ) -> tuple[float, ...]:
        own = self._pass(wanted, direction)
        tiles = sorted((int(size), tile) for size, tile in (own.causal if causal else own.full).items())
        sizes = [size for size, _ in tiles]
        fraction = float(np.interp(head_dim, sizes, [tile.fraction.value for _, tile in tiles]))
        block_us = float(np.interp(head_dim, sizes, [tile.block_us.value for _, tile in tiles]))
        per_unit, lone_rate = _value(own.blocks_per_unit, 1.0), _value(own.lone_rate, 1.0)
        rows, split = own.block_rows.value, own.split
        return (
            float(direction == "backward"), float(causal), float(split is not None), own.start_us.value / US_PER_S,
            own.traffic_exposed.value, rows, _value(own.block_tokens, rows), self._units * per_unit,
            1 / (per_unit * lone_rate) if per_unit > 1 else 1.0,
            rows * FLOPS * per_unit / (self._unit_peak * fraction), block_us / US_PER_S,
            *((split.rate.value, split.join_us.value / US_PER_S, split.join_traffic.value,
               split.block_gb_per_s.value * GB) if split else (0.0, 0.0, 0.0, 0.0)),
            _value(own.dropout_instructions, 0.0) / self._vector_rate,
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
            "split",
        )
        names += ("dropout_instructions",) if np.any(work.dropout) else ()
        picked = (f"attention_picked.{work.kernel}",) if work.kernel in self._picked else ()
        return ("memory_bound.elementwise", *picked, *(f"{own}.{name}" for name in names))

    @property
    def _picked(self) -> Any:
        return self._profile.coefficients.attention_picked


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
    forward = np.maximum(0.5, 0.65 - 0.07 * x)
    pairs = np.where(heads % 2 == 0, 1.0, -1.0) * np.exp(-6 * heads * (x - 1) ** 2)
    backward = np.maximum(0.0, 0.64 - 0.36 * x) * (1 - pairs)
    share: Seconds = np.where(own.backward, backward, forward) * (1 - 1 / own.slots)
    return share
