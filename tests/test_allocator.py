"""The caching allocator: by hand from its rules, as properties, and on the program of a traced module."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spsim import trace_module
from spsim.pytorch.modules.allocator import CachingAllocator, reserved_bytes
from spsim.units import GIB, MIB
from tests.cases import H100


def test_segments_by_hand():
    """512 bytes and 1 MiB share a segment of 2 MiB; 1 MiB + 1 opens one of 20, which holds twelve more of its kind; 10
    MiB and one byte get a segment of 12; 6 MiB take the rest of the 20.
    """
    allocator = CachingAllocator()
    reserved = []
    for size in (1, MIB, MIB + 1, *[MIB + 1] * 12, 10 * MIB + 1, 6 * MIB):
        allocator.allocate(size)
        reserved.append(allocator.reserved // MIB)
    assert reserved == [2, 2, 22, *[22] * 12, 34, 34]


def test_a_freed_block_serves_a_request_that_fits_and_neighbours_are_joined():
    """Of 30 MiB in three blocks the outer two are too small for 20 MiB; with the middle one they are not."""
    allocator = CachingAllocator()
    whole = allocator.allocate(30 * MIB)
    allocator.free(whole)
    blocks = [allocator.allocate(10 * MIB) for _ in range(3)]
    assert allocator.reserved == 30 * MIB
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    again = allocator.allocate(20 * MIB)
    assert allocator.reserved == 50 * MIB
    allocator.free(again)
    allocator.free(blocks[1])
    allocator.allocate(30 * MIB)
    assert allocator.reserved == 50 * MIB


def test_of_two_free_blocks_the_smaller_one_is_taken_and_a_small_rest_stays():
    """16 MiB leave 1 MiB of 17 to the block: not more than 1 MiB is not split off, so the 32 remain whole."""
    allocator = CachingAllocator()
    large, fitting = allocator.allocate(32 * MIB), allocator.allocate(18 * MIB)
    allocator.free(large)
    allocator.free(fitting)
    assert allocator.allocate(17 * MIB).size == 18 * MIB
    assert allocator.allocate(32 * MIB).size == 32 * MIB
    assert allocator.reserved == 50 * MIB


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 30)), min_size=1, max_size=60))
def test_blocks_never_overlap_and_nothing_is_lost(requests):
    """Requests, each of which frees an earlier one: reserved is what is in use and what is free, and again enough."""
    allocator = CachingAllocator()
    live = []
    for size, number in requests:
        live.append(allocator.allocate(size))
        if number < len(live) - 1:
            allocator.free(live.pop(number))
    free = sum(size for pool in allocator._pools.values() for size, _, _ in pool)
    assert allocator.reserved == free + sum(block.size for block in live)
    for block in live:
        allocator.free(block)
    joined = [block for pool in allocator._pools.values() for _, _, block in pool]
    assert all(block.before is None and block.after is None for block in joined)
    assert sum(block.size for block in joined) == allocator.reserved


def test_reserved_memory_of_a_module_holds_its_peak():
    """Three layers of 64 MiB a weight: no less than the peak, and with states of an optimizer more by their size."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(3)))
        x = torch.empty(1024, 4096)
    result = trace_module(module, x).simulate(H100)
    assert result.peak_memory_gib <= result.peak_reserved_gib <= 1.2 * result.peak_memory_gib
    weights = result.weights
    assert weights == (64 * MIB,) * 3
    plain, trained = (reserved_bytes(result.program, weights, states) for states in ((), weights * 2))
    assert trained == plain + 6 * 64 * MIB == result.peak_reserved_gib * GIB


@pytest.mark.slow
def test_a_split_module_reserves_its_own_share():
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, norm_first=True, activation="gelu", dtype=torch.bfloat16)
        x = torch.empty(2048, 1, 1024, dtype=torch.bfloat16, requires_grad=True)
    traced = trace_module(layer, x)
    one, eight = (traced.simulate(H100, plan).peak_reserved_gib for plan in ("", "tp=8"))
    assert 0 < eight < one
