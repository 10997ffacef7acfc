"""Logs of nccl-tests become curves: what was printed is what the profile predicts."""

import re
from pathlib import Path

import pytest

from spsim.cli import main
from spsim.costs.collectives import CommCost
from spsim.errors import InputError
from spsim.inputs.profiles import load_profile
from spsim.measuring.calibrate.fit import fit_logs
from spsim.measuring.calibrate.nccl_tests import read_logs

LOGS = Path(__file__).parent / "data" / "nccl_tests"
H100 = [LOGS / f"h100_{name}.log" for name in ("all_reduce_8", "all_reduce_4", "node", "two_nodes_all_reduce")]
NODE = ["all_gather", "reduce_scatter", "all_to_all", "send_receive"]


def table(text, number=0):
    """(size, out-of-place time, bus bandwidth) of each row of one of the tables, cut by columns."""
    part = text.split("Using devices")[number + 1]
    rows = [line.partition(">:")[2].split() or line.split() for line in part.splitlines()]
    rows = [row for row in rows if row and row[0].isdecimal()]
    first = 5 if "root" in part else 4
    return [(int(row[0]), float(row[first]), float(row[first + 2])) for row in rows]


@pytest.fixture(scope="module")
def fitted():
    return fit_logs(read_logs(H100), load_profile("dgx-h100"), "mine", "2026-11-28")


TABLES = [
    ("all_reduce_8", 0, "nvlink", "all_reduce", 8, 1), ("all_reduce_4", 0, "nvlink", "all_reduce", 4, 1),
    *[("node", number, "nvlink", name, 8, 1) for number, name in enumerate(NODE)],
    ("two_nodes_all_reduce", 0, "infiniband", "all_reduce", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("log", "number", "level", "collective", "ranks", "nodes"), TABLES)
def test_curves_have_the_bus_bandwidth_that_was_printed(fitted, log, number, level, collective, ranks, nodes):
    printed = table((LOGS / f"h100_{log}.log").read_text(), number)
    curves = fitted.profile.coefficients.collectives[level][collective]
    (curve,) = (curve for curve in curves if curve.ranks == ranks)
    points = dict(curve.points)
    assert list(points) == [size for size, _, _ in printed]
    for size, _, bandwidth in printed:
        assert points[size] == pytest.approx(bandwidth, rel=0.02, abs=0.02)
    cost = CommCost(fitted.profile)
    for size, time_us, _ in printed[3:]:
        assert 1e6 * cost.time(collective, size, ranks, nodes) == pytest.approx(time_us, rel=0.02)


def test_what_the_logs_do_not_have_is_that_of_the_base(fitted):
    """Also what a framework adds to a collective, which no benchmark of the library sees."""
    base = load_profile("dgx-h100")
    mine, theirs = fitted.profile.coefficients, base.coefficients
    assert (mine.gemm, mine.fused_rates, mine.collective_overhead_us) == (
        theirs.gemm, theirs.fused_rates, theirs.collective_overhead_us
    )  # fmt: skip
    assert mine.collectives["infiniband"]["all_gather"] == theirs.collectives["infiniband"]["all_gather"]
    assert "nvlink" not in mine.sends
    assert fitted.profile.assumed == base.assumed
    assert set(fitted.kept) == {
        path for path in fitted.kept if path.startswith(("collectives.infiniband.", "sends.infiniband."))
    }


def test_sources_and_provenance_say_where_the_curves_come_from(fitted):
    profile = fitted.profile
    (ring, nvls) = profile.coefficients.collectives["nvlink"]["all_reduce"]
    assert [(curve.algorithm, curve.ranks) for curve in (ring, nvls)] == [("ring", 4), ("nvls", 8)]
    source = profile.sources[ring.source]
    assert source.startswith("Out-of-place times of nccl-tests, read by spsim calibrate on 2026-11-28")
    assert "all_reduce nvlink, 44 rows" in source
    assert profile.provenance["nccl"] == "22807, 2.28.7+cuda12.9"
    assert profile.provenance["device"] == "NVIDIA H100 80GB HBM3"
    assert ring.held_out_error_percent is not None


@pytest.mark.slow
def test_one_command_reads_several_logs(tmp_path, capsys):
    out = tmp_path / "mine.toml"
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--out", str(out), "--nccl-tests", *map(str, H100[:3])])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "all_reduce nvlink 44 " in text
    assert "all but collectives is as in dgx-h100" in text
    found = load_profile(out)
    assert 32e6 / CommCost(found).time("all_to_all", 32_000_000, 8) > 100e9
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_old_logs_without_roots_and_groups_are_read():
    logs = read_logs([LOGS / "a100_old.log"])
    assert {(row.name, row.ranks, row.nodes) for row in logs.rows} == {("all_gather", 8, 1)}
    printed = table((LOGS / "a100_old.log").read_text())
    assert [(row.message_bytes, row.time_us) for row in logs.rows] == [(size, time) for size, time, _ in printed]
    found = fit_logs(logs, load_profile("dgx-a100-80gb"), "old", "2026-11-28").profile
    assert "collectives.nvlink.all_gather" not in found.assumed


def test_a_base_of_another_card_stays_inherited(tmp_path):
    """Curves were measured on the device of the logs, all else is still from the card of the base's base."""
    log = tmp_path / "all_reduce.log"
    log.write_text(H100[0].read_text().replace("NVIDIA H100 80GB HBM3", "NVIDIA H20"))
    found = fit_logs(read_logs([log]), load_profile("h20-8"), "mine", "2026-11-28").profile
    assert load_profile("h20-8").inherited - found.inherited == {"collectives.nvlink.all_reduce"}
    assert "collectives.nvlink.all_reduce" not in found.assumed


def test_the_name_of_the_file_says_the_test_where_the_log_does_not(tmp_path):
    text = re.sub(r"# Collective test starting.*\n", "", H100[0].read_text())
    log = tmp_path / "node1-all_reduce.txt"
    log.write_text(text)
    assert read_logs([log]).rows[0].name == "all_reduce"
    other = tmp_path / "node1.txt"
    other.write_text(text)
    with pytest.raises(InputError, match="does not say which test it is of"):
        read_logs([other])


# ------------------------------------------------------------ refusals


def changed(tmp_path, old, new, log=H100[0]):
    path = tmp_path / "all_reduce.log"
    text = log.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


REFUSED = [
    (
        "#  Rank  7 Group  0 Pid  41207",
        "",
        "busbw .* of 7 ranks",
    ),
    ("41207 on     node-a", "41207 on     node-b", "8 ranks on 2 hosts, not equally many"),
    ("all_reduce_perf", "broadcast_perf", "broadcast_perf is no test of a collective"),
    ("all_reduce_perf", "all_gather_perf", "busbw"),
    ("   27.04    0.30", "   2.704    0.30", "line 19: algbw 0.3 GB/s, but 3.03 follow"),
    ("27.04    0.30    0.53      0", "27.04    0.30    0.53      7", "line 19: 7 wrong values"),
    ("   27.04    0.30    0.53", "     nan    0.30    0.53", "line 19: is no whole row"),
    ("   27.04    0.30    0.53      0    26.90    0.30    0.53      0", "", "line 19: is no whole row"),
    ("# Using devices\n", "", "keep the header whole"),
    ("7 [0xdb] NVIDIA H100", "7 [0xdb] NVIDIA H200", "of several devices"),
]


@pytest.mark.parametrize(("old", "new", "words"), REFUSED)
def test_a_log_that_cannot_be_true_is_refused(tmp_path, old, new, words):
    path = changed(tmp_path, old, new)
    with pytest.raises(InputError, match=words) as caught:
        fit_logs(read_logs([path]), load_profile("dgx-h100"), "mine", "2026-11-28")
    assert "all_reduce.log" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nccl-tests", str(H100[0]), "--quick"], "--nccl-tests measures nothing"),
        (["--nccl-tests", str(H100[0]), "--fit", "raw"], "both given"),
        ([str(H100[0])], "write --nccl-tests before logs"),
        (["--nccl-tests", str(LOGS / "none.log")], "no such file"),
        (["--nccl-tests", str(LOGS.parent / "README.md")], "has no table of nccl-tests"),
        (["--nccl-tests", str(H100[0]), "--base", "h20-8"], "the logs are of NVIDIA H100 80GB HBM3, but h20-8"),
        (["--nccl-tests", str(H100[3]), "--base", "h100-pcie-8"], "another|no level beyond|is of NVIDIA H100-PCIe"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--out", str(tmp_path / "mine.toml"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert re.search(words, error), error
    assert "\n" not in error
