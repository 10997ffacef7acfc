"""What is kept from one scenario for the next changes no result."""

import sys
from itertools import pairwise

import pytest

from spsim.lazy import Cache
from tests.cases import result

pytestmark = pytest.mark.slow

PLANS = (
    "tp=2",
    "tp=2,pp=2",
    "tp=2,pp=4",
    "tp=2,pp=2,pp_schedule=interleaved_zero_bubble",
    "tp=2,dp=2",
    "tp=2,dp=2,distributed_optimizer",
    "tp=2,pp=2,dp=2,distributed_optimizer,dp_overlap",
    "ring=2,dp=2",
)


def figures(plan, tied):
    found = result(
        plan, layers=8, tied_embeddings=tied, hardware="gb200-nvl72", scope="step", seq_len=1024, global_batch=8
    )
    return found.step_time_s, found.peak_bytes, found.waterfall, sorted(found.trace.groups)


def caches():
    """Those of modules; what is kept in an object goes with it, which one of these holds."""
    modules = [module for name, module in sys.modules.items() if name.startswith("spsim.")]
    return [known for module in modules for known in vars(module).values() if isinstance(known, Cache)]


def forget():
    for cache in caches():
        cache._kept.clear()
        cache.bytes = 0


def test_something_is_remembered():
    figures(PLANS[0], tied=False)
    assert sum(len(cache._kept) > 0 for cache in caches()) > 3


@pytest.mark.parametrize("tied", [False, True])
def test_what_ran_before_changes_nothing(tied):
    """On a profile whose ranks differ by how many they are."""
    alone = {}
    for plan in PLANS:
        forget()
        alone[plan] = figures(plan, tied)
    for before, plan in (*pairwise(PLANS), *pairwise(PLANS[::-1])):
        forget()
        figures(before, tied)
        assert figures(plan, tied) == alone[plan], (before, plan)
