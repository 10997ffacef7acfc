"""Channels of a send, from NCCL's rules worked by hand, and what follows for rings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spsim
from spsim.costs.collectives import CommCost
from spsim.costs.sends import SendTime
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile, parse_profile
from spsim.units import MIB
from tests.cases import H100
from tests.test_hardware import tables

NCCL = ["dgx-a100-40gb", "dgx-a100-80gb", "dgx-h100", "dgx-h200", "dgx-b200", "dgx-b300", "gb200-nvl72", "gb300-nvl72"]


def sends(hardware: str = H100, level: str = "nvlink") -> SendTime:
    cost = CommCost(load_profile(hardware))
    found = (cost.inner if level == "nvlink" else cost.outer).sends
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("ranks", "by_mib"),
    [
        (2, {1: 16, 256: 16, 257: 32}),
        (3, {64: 8, 128: 8, 129: 16, 256: 16, 257: 32}),
        (4, {128: 8, 129: 16, 257: 32}),
        (8, {1: 4, 64: 4, 65: 8, 128: 8, 256: 16, 512: 32, 4096: 32}),
        (72, {1: 1, 16: 1, 17: 2, 1024: 32}),
    ],
)
def test_channels_in_a_node_double_when_a_share_passes_16_mib(ranks, by_mib):
    """32 halved until count x ranks <= 32, then doubled while message / count > 16 MiB."""
    assert {size: int(sends().channels(size * MIB, ranks)) for size in by_mib} == by_mib
    assert int(sends().channels(64 * 1024, 2)) == 1, "a part has at least 64 KiB"


@pytest.mark.parametrize(
    ("ranks", "nodes", "channels"), [(2, 2, 4), (16, 2, 4), (10, 10, 2), (20, 10, 2), (40, 10, 2), (80, 10, 1)]
)
def test_channels_between_nodes_are_divided_among_peers(ranks, nodes, channels):
    """Of 4, 8, 16, 16 with 1, 2, 4, 8 GPUs a node: four a peer of 400 Gbit/s, halved until they suffice for all."""
    assert int(sends(level="infiniband").channels(64 * MIB, ranks, nodes)) == channels


def test_measured_plateau_jump_and_group_sizes_of_h100():
    """Microseconds of nccl-tests on 8 and 4 H100 (xxrjun/nccl-tests-cluster at 455de4f)."""
    measured = {
        (8, 32): 422.19, (8, 64): 820.17, (8, 128): 825.74, (8, 256): 896.4, (8, 512): 1509.11,
        (4, 32): 225.03, (4, 64): 426.49, (4, 128): 824.26, (4, 256): 896.55,
    }  # fmt: skip
    time = CommCost(load_profile(H100)).time
    found = {key: 1e6 * time("send_receive", key[1] * MIB, key[0]) for key in measured}
    assert found == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize("hardware", NCCL)
@given(st.integers(1, 2**33), st.sampled_from([2, 4, 8]))
def test_numbers_and_arrays_agree_and_no_bandwidth_passes_the_link(hardware, message, ranks):
    cost = CommCost(load_profile(hardware))
    alone = cost.time("send_receive", message, ranks)
    assert cost.time("send_receive", np.array([message, message]), ranks).tolist() == [alone, alone]
    assert message / alone < cost.profile.datasheet.topology[0].bandwidth


@pytest.mark.parametrize("hardware", NCCL)
def test_a_smaller_communicator_is_never_slower(hardware):
    cost = CommCost(load_profile(hardware))
    sizes = 2 ** np.arange(12, 34)
    two, four, eight = (cost.time("send_receive", sizes, ranks) for ranks in (2, 4, 8))
    assert np.all(two <= four)
    assert np.all(four <= eight)


def test_a_result_says_that_it_hangs_on_channels():
    """32K tokens of 8 KV heads of 128 on 8 ranks: K and V of 4,096 tokens in bf16 are 16 MiB."""
    found = spsim.simulate(
        spsim.Scenario(
            hardware=H100, model="llama-3-8b", plan=spsim.Plan(ring=8), workload=spsim.Workload(seq_len=32768)
        )
    )
    expected = "each send of 16 MiB among 8 ranks has 4 of NCCL's 32 channels, 84 GB/s of 365: more only above 64 MiB"
    assert expected in found.notes
    assert expected in found.to_json()["notes"]


def test_a_law_and_a_curve_of_one_level_contradict():
    data = tables("dgx-h100")
    data["calibrated"]["collectives"]["nvlink"]["send_receive"] = [
        data["calibrated"]["collectives"]["nvlink"]["all_to_all"][0] | {"algorithm": "send_receive"}
    ]
    with pytest.raises(InputError, match=r"sends\.nvlink and collectives\.nvlink\.send_receive say the same; keep one"):
        parse_profile(data, "profile")
