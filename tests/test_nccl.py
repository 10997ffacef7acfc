"""NCCL's choices against its own table, its laws between nodes by hand, and what an algorithm cannot do."""

from bisect import bisect_right
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.costs.algorithms import ALGORITHMS
from spsim.costs.collectives import CommCost
from spsim.costs.nccl import PLATEAU, SMALLEST, Tuner
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.units import KIB, MIB
from tests.cases import A100, H100
from tests.test_costs import profile

B200 = "dgx-b200"
GIB = 2**30


@cache
def tuner(hardware):
    found = CommCost(load_profile(hardware)).tuner
    assert found is not None
    return found


def chosen(hardware, collective, per_node, nodes, size):
    bounds, choices = tuner(hardware).picks(collective, per_node * nodes, nodes)
    return " ".join(choices[bisect_right(bounds, size)])


# ------------------------------------------------------------ choices

# The first power of two at which NCCL 2.29.2 picks each, from its formulas worked out apart (Intel hosts).
TABLE = [
    (H100, 1, 8, "all_reduce", {KIB: "ring LL", 2 * MIB: "nvls Simple"}),
    (H100, 1, 8, "all_gather", {KIB: "ring LL", 8 * MIB: "ring LL128", 32 * MIB: "ring Simple"}),
    (H100, 1, 4, "all_reduce", {KIB: "ring LL", 4 * MIB: "ring LL128", 16 * MIB: "ring Simple"}),
    (H100, 1, 4, "reduce_scatter", {KIB: "ring LL", 4 * MIB: "ring Simple"}),
    (B200, 1, 8, "all_reduce", {KIB: "ring LL", 4 * MIB: "nvls Simple"}),
    (B200, 1, 8, "all_gather", {KIB: "ring LL", 16 * MIB: "ring Simple"}),
    (H100, 2, 8, "all_reduce", {KIB: "tree LL", 256 * KIB: "tree LL128", 4 * MIB: "nvls_tree Simple"}),
    (H100, 2, 8, "all_gather", {KIB: "ring LL", MIB: "ring LL128", 64 * MIB: "ring Simple"}),
    (
        H100, 10, 8, "all_reduce",
        {KIB: "tree LL", 256 * KIB: "tree LL128", 16 * MIB: "nvls_tree Simple", 4 * GIB: "ring Simple"},
    ),
    (H100, 8, 8, "all_gather", {KIB: "ring LL", 2 * MIB: "ring LL128", 256 * MIB: "ring Simple"}),
    (H100, 10, 4, "all_reduce", {256 * KIB: "tree LL128", 32 * MIB: "nvls_tree Simple", GIB: "ring Simple"}),
    (H100, 10, 4, "all_gather", {KIB: "ring LL", 2 * MIB: "ring LL128", 512 * MIB: "ring Simple"}),
    (H100, 10, 2, "all_reduce", {256 * KIB: "tree LL128", 16 * MIB: "ring LL128", 256 * MIB: "ring Simple"}),
    (H100, 10, 2, "reduce_scatter", {KIB: "ring LL", MIB: "ring LL128", 128 * MIB: "ring Simple"}),
    (H100, 10, 1, "all_reduce", {128 * KIB: "tree LL128", 8 * MIB: "ring LL128", 64 * MIB: "ring Simple"}),
    (H100, 10, 1, "all_gather", {KIB: "pat Simple", 8 * MIB: "ring LL128", 32 * MIB: "ring Simple"}),
    (B200, 2, 8, "all_reduce", {256 * KIB: "tree LL128", 4 * MIB: "nvls_tree Simple"}),
    (B200, 4, 8, "all_reduce", {256 * KIB: "tree LL128", 8 * MIB: "nvls_tree Simple", 256 * MIB: "ring Simple"}),
    (B200, 2, 8, "all_gather", {MIB: "ring LL128", 32 * MIB: "ring Simple"}),
    (B200, 4, 8, "all_gather", {MIB: "ring LL128", 128 * MIB: "ring Simple"}),
]  # fmt: skip


@pytest.mark.parametrize(("hardware", "nodes", "per_node", "collective", "first"), TABLE)
def test_choices_are_those_of_nccl(hardware, nodes, per_node, collective, first):
    for size, choice in first.items():
        assert chosen(hardware, collective, per_node, nodes, size) == choice
    for before, (size, _) in zip(first.values(), list(first.items())[1:], strict=False):
        assert chosen(hardware, collective, per_node, nodes, size // 2) == before


@pytest.mark.parametrize(("hardware", "fewest"), [(H100, 6), (B200, 8)])
def test_fewest_gpus_that_reduce_in_their_switch(hardware, fewest):
    """From NCCL 2.28 on NVLS has a bandwidth for each GPU, and ties with the ring at 6 on Hopper and 8 on Blackwell."""
    algorithms = [chosen(hardware, "all_reduce", n, 1, GIB).split()[0] for n in range(2, 9)]
    assert algorithms == ["ring"] * (fewest - 2) + ["nvls"] * (9 - fewest)


def test_ampere_has_no_reduction_in_switches():
    assert {chosen(A100, "all_reduce", 8, 1, 2**e).split()[0] for e in range(10, 34)} == {"ring"}


@pytest.mark.slow
@given(
    st.sampled_from([H100, B200]), st.sampled_from(["all_reduce", "all_gather"]), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 3, 10, 128]), st.integers(1, 2**36),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_choice_is_the_shortest_of_all_times(hardware, collective, per_node, nodes, message):
    """Worked out one by one, as NCCL does for each call."""
    if per_node * nodes == 1:
        return
    found = tuner(hardware)
    times = {}
    for one in found._candidates(collective, per_node, nodes):
        place = (message // SMALLEST).bit_length() - 1
        share = one.correction[place] if 0 <= place < len(one.correction) else 1.0
        latency = one.latency_us * (PLATEAU if message >= one.plateau_from else 1)
        times[" ".join(one.choice)] = latency + message / (1e3 * one.gb_per_s * share)
    assert times[chosen(hardware, collective, per_node, nodes, message)] == pytest.approx(min(times.values()), rel=1e-9)


@pytest.mark.parametrize(
    ("hardware", "per_node", "nodes", "channels"),
    [
        (A100, 8, 1, 24), (H100, 8, 1, 24), (H100, 2, 1, 24), (B200, 8, 1, 32),
        (H100, 8, 10, 16), (H100, 4, 10, 16), (H100, 2, 10, 8), (H100, 1, 10, 4), (B200, 8, 2, 16),
    ],
)  # fmt: skip
def test_channels_of_a_ring(hardware, per_node, nodes, channels):
    """As logs of NCCL say, and its search by hand: 6 x 60 GB/s doubled twice, 8 adapters of 48 doubled once."""
    assert tuner(hardware).blocks(per_node, nodes) == channels


def test_channels_of_calls():
    """An SM each: all of them for long messages, NVLS fewer than a ring, one for a few bytes."""
    cost = CommCost(load_profile(H100))
    assert cost.channels("all_gather", GIB, 8) == 24
    assert cost.channels("all_reduce", GIB, 8) == 16
    assert cost.channels("all_reduce", GIB, 16, 2) == 16
    assert cost.channels("all_gather", GIB, 16, 2) == 16
    assert cost.channels("all_gather", 1024, 8) == 1
    assert cost.channels("send_receive", 64 * MIB, 8) == 4
    assert [cost.channels("all_to_all", GIB, 8 * nodes, nodes) for nodes in (1, 2)] == [32, 16]
    assert CommCost(load_profile("mi300x-8")).channels("all_gather", GIB, 8) is None


# ------------------------------------------------------------ between nodes


def round_law(tables):
    """Ten us, steps of 5 and 10 us, 1 GB/s a channel, 10 GB/s an adapter (LL128 8); 10 us a hop of a tree."""
    law = tables["calibrated"]["between_nodes"]["infiniband"]
    for name, value in {"start_us": 10, "channel_gb_per_s": 1, "blend": 5.5, "from_mib": 1, "tree_hop_us": 10}.items():
        law[name]["value"] = value
    law["step_us"]["ll128"]["value"], law["step_us"]["simple"]["value"] = 5, 10
    law["adapter_gb_per_s"]["ll128"]["value"], law["adapter_gb_per_s"]["simple"]["value"] = 8, 10


@pytest.mark.parametrize(("size", "step", "rate"), [(64 * MIB, 5e-6, 8e9), (2 * GIB, 10e-6, 10e9)])
def test_a_ring_over_nodes_by_hand(size, step, rate):
    """Ten nodes of 8: 79 steps of a block on 16 channels; 8 adapters beside 361.86 GB/s inside, much faster."""
    time = CommCost(profile(round_law, H100)).time("all_gather", size, 80, 10)
    chain = 79 * (step + size / 80 / 16e9)
    inside = (8 * rate) ** -5.5 + 361.86e9**-5.5
    wire = size * 79 / 80 * inside ** (1 / 5.5)
    assert time == pytest.approx(10e-6 + (chain**4 + wire**4) ** 0.25, rel=1e-3)


def test_a_tree_of_switches_by_hand():
    """Four nodes of 8: two levels up and down, and per adapter an eighth of the message both ways, at 10 GB/s, beside
    the switch, which is five times as fast.
    """
    cost = CommCost(profile(round_law, H100))
    tree, size = cost.forms("all_reduce", 32, 4, "nvls_tree"), GIB
    across, switch = 2 * size / 8 / 10e9, cost.inner.time("all_reduce", size, 8)
    assert tree.at(size).steps == 4
    assert tree(size) == pytest.approx(40e-6 + (across**5.5 + switch**5.5) ** (1 / 5.5), rel=1e-6)


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
@pytest.mark.parametrize(("per_node", "nodes"), [(8, 10), (4, 3), (1, 64), (8, 128)])
def test_arrays_of_messages_take_what_each_takes(collective, per_node, nodes):
    """To the last bit, across all changes of algorithm and protocol."""
    cost = CommCost(load_profile(H100))
    messages = np.unique(np.geomspace(1, 2**36, 300).astype(np.int64))
    times = cost.time(collective, messages, per_node * nodes, nodes)
    assert times.tolist() == [cost.time(collective, int(m), per_node * nodes, nodes) for m in messages]


@pytest.mark.parametrize("hardware", [H100, B200, "dgx-b300", "dgx-h200"])
def test_times_never_fall_where_the_choice_changes(hardware):
    cost = CommCost(load_profile(hardware))
    for per_node, nodes in ((8, 2), (8, 10), (4, 10), (2, 10), (1, 10), (8, 512)):
        for collective in ("all_reduce", "all_gather"):
            bounds, _ = cost.tuner.picks(collective, per_node * nodes, nodes)
            around = sorted({int(size) for bound in bounds for size in (bound / 2, bound - 1, bound, bound + 1)})
            times = [cost.time(collective, size, per_node * nodes, nodes) for size in around]
            assert all(one <= other * (1 + 1e-12) for one, other in pairwise(times))


def test_larger_chunks_of_a_switch_begin_at_their_sizes():
    """16 channels of 8 GPUs: 64 chunks of 128 KiB each at 1 GiB. Below, 512 MiB and more go on as up to 512 MiB."""
    cost = CommCost(load_profile(H100))
    assert tuner(H100).chunk_steps(8) == (8 * MIB, 64 * MIB, GIB)
    times = {mib: cost.time("all_reduce", mib * MIB, 8) for mib in (256, 512, 640, 1024)}
    slope = (times[512] - times[256]) / 256
    assert times[640] == pytest.approx(times[512] + 128 * slope, rel=1e-6)
    assert times[640] > np.interp(640, [512, 1024], [times[512], times[1024]]) * 1.005


def test_a_ring_waits_for_all_its_steps():
    """Blocks of nothing but a chain: twice the nodes take twice the time."""
    cost = CommCost(load_profile(H100))
    times = [cost.time("all_gather", 64 * MIB, 8 * nodes, nodes) for nodes in (128, 256)]
    assert times[1] / times[0] == pytest.approx(2, rel=0.02)


# ------------------------------------------------------------ adapters that GPUs share


def shared(tables):
    """Four adapters for the eight GPUs of a node."""
    tables["datasheet"]["topology"][1]["links_per_gpu"]["value"] = 0.5


def test_three_nodes_of_four_adapters_all_reduce_at_their_sum():
    """NVIDIA/nccl-tests issue 119: 3 nodes of 8 A100 with four adapters of 25 GB/s each, 96 GB/s at most."""
    bus = 2**34 * 2 * 23 / 24 / CommCost(profile(shared, "dgx-a100-40gb")).time("all_reduce", 2**34, 24, 3) / 1e9
    assert bus == pytest.approx(96, rel=0.03)


@pytest.mark.parametrize("hardware", [H100, "dgx-a100-40gb"])
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "all_to_all"])
def test_half_an_adapter_takes_twice_the_time(collective, hardware):
    """Long messages over many nodes, whose adapters pace; also of one GPU a node, beside the group of its neighbour."""
    alone, beside = CommCost(load_profile(hardware)), CommCost(profile(shared, hardware))
    for per_node in (1, 2):
        times = [cost.time(collective, 2**36, 16 * per_node, 16) for cost in (alone, beside)]
        assert times[1] / times[0] == pytest.approx(2, rel=0.06)
    assert beside.time(collective, 2**30, 8) == alone.time(collective, 2**30, 8)


def test_a_curve_of_a_shared_adapter_is_of_one_gpu_that_has_it_alone():
    def too_fast(tables):
        shared(tables)
        tables["datasheet"]["topology"][1]["link_gb_per_s"]["value"] = 20

    with pytest.raises(InputError, match="above the link's 20 GB/s"):
        profile(too_fast, "dgx-a100-40gb")


# ------------------------------------------------------------ algorithms by name


@pytest.mark.parametrize(
    ("hardware", "collective", "ranks", "nodes", "algorithm", "words"),
    [
        (A100, "all_reduce", 8, 1, "nvls", ["nvls", "'nvlink' of dgx-a100-80gb", "does not reduce", "use ring"]),
        (H100, "all_reduce", 4, 1, "nvls", ["from 6 GPUs on", "use ring"]),
        (H100, "all_gather", 8, 1, "tree", ["tree sums", "all_reduce, not all_gather", "ring"]),
        (H100, "all_reduce", 8, 1, "nvls_tree", ["several nodes", "8 GPUs are on 1"]),
        (H100, "all_reduce", 16, 2, "nvls", ["one node", "16 GPUs are on 2", "nvls_tree"]),
        (A100, "all_reduce", 16, 2, "nvls_tree", ["dgx-a100-80gb", "does not reduce", "use ring"]),
        (H100, "all_to_all", 8, 1, "ring", ["not all_to_all", "pairwise"]),
        (H100, "all_gather", 16, 2, "pat", ["one GPU of each node", "not 8"]),
        (H100, "all_gather", 2, 2, "hierarchical", ["two GPUs or more of each node"]),
        (H100, "all_gather", 8, 1, "butterfly", ["'butterfly' is none of ring, tree"]),
    ],
)
def test_an_algorithm_that_cannot_serve_is_refused_with_the_reason(
    hardware, collective, ranks, nodes, algorithm, words
):
    with pytest.raises(InputError) as caught:
        CommCost(load_profile(hardware)).forms(collective, ranks, nodes, algorithm)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_hierarchical_collective_is_its_parts_in_a_row():
    cost = CommCost(load_profile(H100))
    form = cost.forms("all_reduce", 32, 4, "hierarchical")
    inside = sum(cost.time(part, GIB, 8) for part in ("reduce_scatter", "all_gather"))
    assert form(GIB) == pytest.approx(inside + cost.time("all_reduce", GIB // 8, 4, 4), rel=1e-12)
    assert form.at(GIB).steps == 14 + 6


@pytest.mark.parametrize("hardware", [H100, A100, "gb200-nvl72", "mi300x-8"])
def test_every_algorithm_serves_or_refuses(hardware):
    cost = CommCost(load_profile(hardware))
    for name, algorithm in ALGORITHMS.items():
        for collective in algorithm.serves:
            for ranks, nodes in ((8, 1), (16, 2), (4, 4)):
                try:
                    forms = cost.forms(collective, ranks, nodes, name)
                except InputError:
                    continue
                assert 0 < forms(0) <= forms(GIB)
                assert forms.at(GIB).steps >= 1


def test_a_machine_that_nccl_does_not_know_takes_the_fastest():
    """MI300X has no compute capability: the fastest curve, and no protocol."""
    cost = CommCost(load_profile("mi300x-8"))
    assert cost.tuner is None
    assert cost.choice("all_reduce", GIB, 16, 2)[1] is None
    assert Tuner(load_profile(A100), 8.9).blocks(8, 1) == 24, "Ada has the constants of Ampere"
