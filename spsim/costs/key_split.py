"""How FlashAttention-2 divides keys among thread blocks where few queries leave compute units without one.

As in Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp (num_splits_heuristic, set_params_splitkv), of which
torch has a copy.
"""

from __future__ import annotations

import numpy as np

from spsim.costs.seconds import Seconds

SPLIT_ROWS = 64
"""Queries of a block of the kernel that splits."""
MAX_SPLITS = 128
FILLED = 0.8
"""Share of the slots from which keys are not split."""
GOOD_ENOUGH = 0.85
"""Of the best use of the slots: the fewest parts that reach it are taken."""


def key_blocks(head_dim: Seconds) -> Seconds:
    """Keys that a block takes at a time, by head size."""
    keys: Seconds = np.where(np.less_equal(head_dim, 64), 256.0, np.where(np.less_equal(head_dim, 128), 128.0, 64.0))
    return keys


def splits(blocks: Seconds, slots: Seconds, key_blocks: Seconds) -> Seconds:
    """Parts that keys are divided into, of each kernel: 1 where its blocks fill the slots."""
    blocks, slots, key_blocks = np.broadcast_arrays(blocks, slots, key_blocks)
    found = np.ones(blocks.shape)
    few = blocks < FILLED * slots
    if few.any():
        found[few] = _fewest_good(blocks[few, np.newaxis], slots[few, np.newaxis], key_blocks[few, np.newaxis])
    return found


def _fewest_good(blocks: Seconds, slots: Seconds, key_blocks: Seconds) -> Seconds:
    """The fewest parts that use the slots nearly as well as any number of them; a row for each kernel."""
    parts = np.arange(1.0, MAX_SPLITS + 1)
    waves = blocks * parts / slots
    # A number that leaves each part as many blocks of keys as one part fewer is not looked at.
    own = np.ceil(key_blocks / parts)
    possible = (parts <= np.minimum(slots, key_blocks)) & (own != np.ceil(key_blocks / np.maximum(1.0, parts - 1)))
    use = np.where(possible | (parts == 1), waves / np.ceil(waves), 0.0)
    good = use >= GOOD_ENOUGH * use.max(axis=-1, keepdims=True)
    fewest: Seconds = parts[np.argmax(good, axis=-1)]
    return fewest
