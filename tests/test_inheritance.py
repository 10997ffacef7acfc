"""Profiles with a base: what is inherited is marked, what would be a guess is refused, and curves scale with links."""

import runpy
from pathlib import Path

import pytest

import spsim
from spsim.cli import main
from spsim.costs.collectives import CommCost
from spsim.costs.kernels import ComputeCost
from spsim.errors import InputError
from spsim.inputs.hardware import leaves
from spsim.inputs.inheritance import leaf_paths
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import profiles_directory, read_toml
from spsim.measuring.calibrate.fit import fit_profile
from spsim.measuring.calibrate.records import Measurement
from spsim.units import GB, GIB, MIB
from spsim.work import FlashAttention, Gemm

LONGCONTEXT = runpy.run_path(
    str(Path(__file__).parent.parent / "experiments" / "longcontext.py"), run_name="experiment"
)
MADE_WITH_BASE = {"h800-8": "dgx-h100", "h20-8": "dgx-h100", "a800-8": "dgx-a100-80gb", "rtx4090-8": "l40s-8"}
HEAD = """
schema_version = 1
base = "dgx-h100"
name = "mine"
description = "my node"
as_of = "2026-11-28"
"""
TOPOLOGY = """
[[datasheet.topology]]
name = "nvlink"
kind = "switch"
gpus = 8
links_per_gpu = { value = 9, source = "ml-network" }
link_gb_per_s = { value = 25, source = "ml-network" }
in_network_reduction = ["all_reduce"]

[[datasheet.topology]]
name = "infiniband"
kind = "fat_tree"
links_per_gpu = { value = 1, source = "ml-network" }
link_gb_per_s = { value = 50, source = "ml-network" }
"""
HALF = """
[[scaled]]
level = "nvlink"
scale = 0.5
source = "ml-network"
"""


def profile(tmp_path, *parts, name="mine.toml"):
    """The profile of some TOML text."""
    path = tmp_path / name
    path.write_text("".join(parts))
    return load_profile(path)


def refusal(tmp_path, *parts):
    with pytest.raises(InputError) as caught:
        profile(tmp_path, *parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_differences_it_is_the_base_under_another_name(tmp_path):
    """Of the same device, measured stays measured and assumed assumed."""
    mine, base = profile(tmp_path, HEAD), load_profile("dgx-h100")
    assert mine.name == "mine"
    assert (mine.datasheet, mine.coefficients, mine.assumed) == (base.datasheet, base.coefficients, base.assumed)
    assert mine.inherited == frozenset()


def test_a_number_of_its_own_takes_the_place_of_the_base(tmp_path):
    own = '[calibrated.memory]\ncontext_mib = { value = 321, source = "mine" }\n[sources]\nmine = "nvidia-smi"\n'
    mine = profile(tmp_path, HEAD, own)
    assert mine.coefficients.memory.context_mib.value == 321
    assert mine.coefficients.memory.communicator_mib == load_profile("dgx-h100").coefficients.memory.communicator_mib
    assert mine.assumed == load_profile("dgx-h100").assumed - {"memory.context_mib"}


@pytest.mark.parametrize("name", MADE_WITH_BASE)
def test_nothing_of_another_card_is_calibrated(name):
    """Each coefficient that the base has is inherited, or one that the file states itself."""
    mine, base = load_profile(name), load_profile(MADE_WITH_BASE[name])
    assert mine.datasheet.device != base.datasheet.device
    file = read_toml(profiles_directory() / f"{name}.toml")
    stated = {path for block in ("calibrated", "assumed") for path in leaf_paths(file.get(block, {}))}
    assert {path for path, _ in leaves(mine.coefficients)} - mine.inherited == stated
    assert not [path for path, leaf in leaves(mine.coefficients) if _errors(leaf)]


def _errors(leaf):
    numbers = leaf if isinstance(leaf, tuple) else (leaf,)
    return any(number.held_out_error_percent is not None or number.flagged for number in numbers)


def printed(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([*arguments])
    return " ".join(capsys.readouterr().out.split())


def test_list_and_run_say_what_is_inherited(capsys):
    assert f"{len(load_profile('h800-8').inherited)} inherited" in printed(capsys, "list", "hardware")
    text = printed(capsys, "run", "--hardware", "h800", "--model", "llama-3-8b", "--plan", "tp=8", "--seq-len", "4K")
    assert "inherited inputs (of another card) used" in text
    assert "assumed inputs" not in text


def test_results_tell_inherited_from_assumed_inputs():
    """A link that was measured on another card counts as much as one that nobody measured."""
    settings = {"model": "llama-3-8b", "plan": "tp=8", "workload": {"seq_len": 4096}}
    found = spsim.simulate(spsim.Scenario(hardware="h20-8", **settings)).to_json()
    assert found["assumed"] == ["overlap_slowdown"]
    assert "collectives.nvlink.all_reduce" in found["inherited"]
    assert "gemm.fraction.bf16" not in found["inherited"]
    assert {*found["assumed"], *found["inherited"]} == set(found["assumed_effects"])
    assert max(found["assumed_effects"]["collectives.nvlink.all_reduce"]["step_time_percent"]) > 1


# ------------------------------------------------------------ curves


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_half_the_links_take_twice_as_long_beyond_the_latency(tmp_path, collective):
    half, base = profile(tmp_path, HEAD, TOPOLOGY, HALF), load_profile("dgx-h100")
    (*_, ours), (*_, theirs) = (p.coefficients.collectives["nvlink"][collective] for p in (half, base))
    for message, _ in theirs.points:
        before, after = (CommCost(p).time(collective, int(message), 8) for p in (base, half))
        latency = theirs.latency_us / 1e6
        assert after - latency == pytest.approx(2 * (before - latency), rel=1e-3, abs=2e-8)
    assert (ours.latency_us, ours.ranks, ours.min_ranks) == (theirs.latency_us, theirs.ranks, theirs.min_ranks)
    assert f"collectives.nvlink.{collective}" in half.inherited
    assert f"collectives.infiniband.{collective}" not in half.inherited
    assert "bandwidth times 0.5" in half.sources[ours.source]


def test_sends_over_half_the_links_reach_half_of_them(tmp_path):
    half, base = profile(tmp_path, HEAD, TOPOLOGY, HALF), load_profile("dgx-h100")
    ours, theirs = (p.coefficients.sends["nvlink"] for p in (half, base))
    assert ours.link_gb_per_s.value == theirs.link_gb_per_s.value / 2
    assert ours.channel_gb_per_s == theirs.channel_gb_per_s
    rates = [4 * GIB / CommCost(p).time("send_receive", 4 * GIB, 2) / GB for p in (half, base)]
    assert rates[0] == pytest.approx(rates[1] / 2, rel=0.01)


def test_slower_adapters_scale_what_is_known_of_rings_over_nodes(tmp_path):
    slow = TOPOLOGY.replace("value = 50", "value = 25").replace("value = 9", "value = 18")
    half = profile(tmp_path, HEAD, slow, HALF.replace('"nvlink"', '"infiniband"'))
    ours, theirs = (p.coefficients.between_nodes["infiniband"] for p in (half, load_profile("dgx-h100")))
    assert ours.adapter_gb_per_s.simple.value == theirs.adapter_gb_per_s.simple.value / 2
    assert (ours.step_us.simple.value, ours.channel_gb_per_s) == (theirs.step_us.simple.value, theirs.channel_gb_per_s)
    times = [CommCost(p).time("all_gather", 16 * GIB, 16, 2) for p in (half, load_profile("dgx-h100"))]
    assert times[0] > 1.5 * times[1]  # of eight adapters; of the base nearly as fast as the links of the node


def test_shared_adapters_need_no_scale(tmp_path):
    """Curves between nodes are of a GPU with an adapter of its own, which is as fast."""
    shared = TOPOLOGY.replace("value = 9", "value = 18").replace(
        "links_per_gpu = { value = 1,", "links_per_gpu = { value = 0.5,"
    )
    mine = profile(tmp_path, HEAD, shared)
    assert mine.datasheet.topology[1].share == 0.5
    assert mine.inherited == frozenset()


def test_what_is_said_of_one_collective_goes_before_what_is_said_of_all(tmp_path):
    one = HALF.replace('level = "nvlink"\nscale = 0.5', 'level = "nvlink"\ncollective = "all_gather"\nscale = 0.25')
    both = profile(tmp_path, HEAD, TOPOLOGY, HALF, one)
    base = load_profile("dgx-h100")
    for collective, share in (("all_gather", 0.25), ("reduce_scatter", 0.5)):
        slow, fast = (p.coefficients.collectives["nvlink"][collective][-1].points[-1][1] for p in (both, base))
        assert slow / fast == pytest.approx(share, rel=1e-3)


def test_a_scale_of_one_changes_no_time(tmp_path):
    same = profile(tmp_path, HEAD, HALF.replace("0.5", "1.0"))
    for size in (1, MIB, 3 * MIB, GIB):
        before, after = (CommCost(p).time("all_reduce", size, 8) for p in (load_profile("dgx-h100"), same))
        assert after == pytest.approx(before, rel=1e-4)
    assert "collectives.nvlink.all_reduce" in same.inherited


def test_the_curves_of_a_smaller_node_are_those_of_the_larger_and_inherited(tmp_path):
    four = profile(tmp_path, HEAD, TOPOLOGY.replace("gpus = 8", "gpus = 4").replace("value = 9", "value = 18"))
    for ranks in (2, 4):
        times = [CommCost(p).time("all_gather", GIB, ranks) for p in (four, load_profile("dgx-h100"))]
        assert times[0] == times[1]
    assert "collectives.nvlink.all_gather" in four.inherited


def test_a_level_that_the_profile_does_not_have_is_left_out(tmp_path):
    alone = profile(tmp_path, HEAD, TOPOLOGY.partition('[[datasheet.topology]]\nname = "infiniband"')[0], HALF)
    assert set(alone.coefficients.collectives) == {"nvlink"}
    assert set(alone.coefficients.sends) == {"nvlink"}


def test_a_curve_of_sends_takes_the_place_of_their_channels(tmp_path):
    curve = """
[[calibrated.collectives.nvlink.send_receive]]
algorithm = "send_receive"
ranks = 2
latency_us = 9
step_latency_us = 0
source = "ml-network"
points = [[1048576, 40], [1073741824, 300]]
"""
    mine = profile(tmp_path, HEAD, curve)
    assert set(mine.coefficients.sends) == {"infiniband"}
    assert GIB / CommCost(mine).time("send_receive", GIB, 2) / GB == pytest.approx(300)


# ------------------------------------------------------------ refusals


def test_curves_over_other_links_are_not_guessed(tmp_path):
    message = refusal(tmp_path, HEAD, TOPOLOGY)
    for word in ("'nvlink' has 225 GB/s", "dgx-h100 450", "[[scaled]]", "scale = 0.5"):
        assert word in message


def test_a_data_sheet_of_another_device_is_given_whole(tmp_path):
    """All that is missing is named at once."""
    message = refusal(tmp_path, HEAD, '[datasheet]\ndevice = "NVIDIA H20"\n')
    for path in ("compute_units", "clock_tensor_mhz", "peak_tflops", "memory.l2_mib", "topology"):
        assert path in message
    assert "host_link_gb_per_s" not in message


REFUSED = {
    "unknown level": ('[[scaled]]\nlevel = "pcie"\nscale = 0.5\nsource = "ml-network"\n', "'pcie' is not in both"),
    "a factor of nothing": ('[[scaled]]\nlevel = "nvlink"\nscale = 0.0\nsource = "ml-network"\n', "scaled: 0.scale"),
    "no source": ('[[scaled]]\nlevel = "nvlink"\nscale = 0.5\n', "scaled: 0.source: required"),
    "unknown source": ('[[scaled]]\nlevel = "nvlink"\nscale = 0.5\nsource = "hearsay"\n', "'hearsay' is not in"),
    "twice": (HALF + HALF, "twice; keep one"),
    "another text under a source of the base": ('[sources]\nml-network = "my own"\n', "another source of this name"),
    "a block that is no table": ("inherited = 3\n", "inherited: must be a table"),
    "a derived key": ('coefficients = "none"\n', "coefficients: unknown key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(tmp_path, name):
    text, words = REFUSED[name]
    head, tail = (HEAD + text, "") if "[" not in text else (HEAD, text)
    assert words in refusal(tmp_path, head, tail)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD.replace('"dgx-h100"', "3"), "base: 3 is no name"),
        (HEAD.replace("dgx-h100", "dgx-h1000"), "mine.toml: base: unknown hardware"),
        (HEAD.replace("dgx-h100", "other.toml"), "other.toml: no such file; name a shipped profile"),
        (HEAD.replace("dgx-h100", "mine.toml"), "as its own base"),
        (HALF, "there is no base"),
    ],
)
def test_bad_bases_are_one_line(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


def test_a_base_may_stand_in_a_file_beside_it_and_is_read_anew(tmp_path):
    first = HEAD + '[assumed]\noverlap_slowdown = { value = 0.5, source = "ml-network" }\n'
    profile(tmp_path, first, name="first.toml")
    second = HEAD.replace('"dgx-h100"', '"first.toml"')
    assert profile(tmp_path, second).coefficients.overlap_slowdown.value == 0.5
    profile(tmp_path, first.replace("0.5", "0.25"), name="first.toml")
    assert profile(tmp_path, second).coefficients.overlap_slowdown.value == 0.25


# ------------------------------------------------------------ the cards that are made this way


def test_h800_all_reduce_is_the_published_one():
    """215 GB/s with NVLS on eight H800 (NVIDIA/nccl issue 1374), which no number of the profile comes from."""
    message = 8 * GIB
    seconds = CommCost(load_profile("h800-8")).time("all_reduce", message, 8)
    assert 2 * 7 / 8 * message / seconds / GB == pytest.approx(215, rel=0.01)


H20_PRODUCTS = {1024: 95.12, 2048: 120.27, 4096: 133.41, 8192: 138.60, 10240: 142.25}
"""TFLOP/s of square products in bf16 on one H20 (zzc0721/torch-performance-test-data issue 77); the last was used."""


@pytest.fixture
def made_by(tmp_path):
    """A shipped profile by its name, or the one that the page on hardware makes, by the name of its file."""
    page = (Path(__file__).parent.parent / "docs" / "hardware.md").read_text()

    def made(name):
        if not name.endswith(".toml"):
            return load_profile(name)
        text = page.partition(f"`{name}`:\n\n```toml\n")[2].partition("```")[0]
        return profile(tmp_path, text, name=name)

    return made


@pytest.mark.parametrize("name", ["h20-8", "h20.toml"])
@pytest.mark.parametrize("side", H20_PRODUCTS)
def test_products_of_h20(side, name, made_by):
    work = Gemm(side, side, side, 1, 3 * 2 * side**2, 0)
    seconds = ComputeCost(made_by(name), "bf16", burst=True).duration(work)
    assert work.flops / seconds / 1e12 == pytest.approx(H20_PRODUCTS[side], rel=0.05 if side >= 4096 else 0.13)


@pytest.mark.parametrize(("causal", "measured"), [(False, 139.9), (True, 134.7)])
def test_long_attention_on_h20(causal, measured):
    """TFLOP/s of FlashAttention-3 at 16,384 tokens (Dao-AILab/flash-attention issue 1310); used were those at 2,048."""
    pairs = 16384**2 * (1 if causal else 2)
    work = FlashAttention(
        "flash_attention_3", "forward", 2, 32, 32, 64, 64, 16384, 16384, pairs, causal, 4 * 2 * 2 * 16384 * 2048
    )
    seconds = ComputeCost(load_profile("h20-8"), "fp16", burst=True).duration(work)
    assert work.flops / seconds / 1e12 == pytest.approx(measured, rel=0.07)


# Attention of four RTX 4090 on PCIe, 40 sequences of 40 heads of 128, forward, in ms: feifeibear/long-context-attention
# issue 88.
RTX_4090 = [(1024, "ulysses=2,ring=2", 75.70), (1024, "ulysses=4", 55.57),
            (3600, "ulysses=2,ring=2", 248.63), (3600, "ulysses=4", 175.41)]  # fmt: skip


@pytest.mark.parametrize("name", ["rtx4090-8", "rtx4090.toml"])
def test_rtx_4090_orders_ulysses_before_a_ring_as_measured(name, made_by):
    model = LONGCONTEXT["attention_model"](40, 40, 128)
    found = {}
    for seq_len, plan, measured in RTX_4090:
        workload = {"seq_len": seq_len, "micro_batch": 40}
        scenario = spsim.Scenario(hardware=made_by(name), model=model, plan=plan, workload=workload, scope="layers")
        predicted = 1e3 * LONGCONTEXT["attention_seconds"](spsim.simulate(scenario), "forward")
        found[seq_len, plan] = predicted
        assert predicted == pytest.approx(measured, rel=0.12)
    for seq_len in (1024, 3600):
        assert found[seq_len, "ulysses=4"] < 0.8 * found[seq_len, "ulysses=2,ring=2"]


def test_what_a_calibration_keeps_of_a_base_of_another_card_is_inherited():
    """Of the device of the base it stays what it was."""
    measured = Measurement(kind="launch", name="stream_add", time_us=3.0)
    for device, other in (("NVIDIA H20", True), ("NVIDIA H100 80GB HBM3", False)):
        rows = [Measurement(kind="environment", name="device", text=device), measured]
        found = fit_profile(rows, load_profile("dgx-h100"), "mine").profile
        assert found.coefficients.kernel_overhead_us.value == 3.0
        assert "kernel_overhead_us" not in found.inherited | found.assumed
        assert ("gemm.fraction.bf16" in found.inherited) == other
        assert ("overlap_slowdown" in found.assumed) != other
