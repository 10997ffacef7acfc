"""`collective`: one collective by itself, in nccl-tests' words, on the command line and in Python."""

import json
import re

import pytest

import spsim
from spsim.cli import main
from spsim.errors import InputError
from spsim.studies.collectives import CURVE, curves, group, message_bytes
from tests.cases import A100, H100

GATHER = ("collective", "all_gather", "--bytes", "64MiB", "--hardware", H100, "--gpus", "64")


def run(capsys, *arguments, status=0):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == status
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 2**26), ("64 mib", 2**26), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("1GB", 10**9), ("2KB", 2000),
        ("0.5KiB", 512), (123, 123),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert message_bytes(text) == size


@pytest.mark.parametrize("text", ["64M", "0", "-1MiB", "1.1B", "", "GiB", "2048TiB", "9999999GiB", 0, 1.5, True, None])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="write for instance 4096, 64KiB"):
        message_bytes(text)


def test_document(capsys):
    """64 MiB are the whole array: of 64 GPUs each sends 63/64 of it (nccl-tests, PERFORMANCE.md)."""
    found = json.loads(run(capsys, *GATHER, "--json").out)
    assert {"time_us", "algorithm", "bus_bandwidth_gb_per_s", "alpha_us", "steps"} <= set(found)
    assert found["bus_bandwidth_gb_per_s"] == pytest.approx(2**26 * 63 / 64 / found["time_us"] / 1e3)
    assert (found["algorithm"], found["protocol"], found["steps"], found["nodes"]) == ("ring", "LL128", 63, 8)
    assert 0 < found["alpha_us"] < found["time_us"]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("all_reduce", 14 / 8),
        ("all_gather", 7 / 8),
        ("reduce_scatter", 7 / 8),
        ("all_to_all", 7 / 8),
        ("send_receive", 1),
    ],
)  # fmt: skip
def test_bus_bandwidth_is_that_of_nccl_tests(name, share):
    found = spsim.collective(name, "1GiB", H100, 8)
    assert found.nodes == 1, "up to a node's GPUs stay in it"
    assert found.bus_bandwidth_gb_per_s == pytest.approx(2**30 * share / found.time_us / 1e3)


def test_published_times_come_back():
    """8 H100 all-gather 1 GiB at 345.46 GB/s, all-reduce at 469.67 by NVLS; 80 take 1766 us for 256 MiB (xxrjun)."""
    assert spsim.collective("all_gather", "1GiB", H100, 8).bus_bandwidth_gb_per_s == pytest.approx(345.46, rel=1e-3)
    reduced = spsim.collective("all_reduce", "1GiB", H100, 8)
    assert (reduced.algorithm, reduced.channels) == ("nvls", 16)
    assert reduced.bus_bandwidth_gb_per_s == pytest.approx(469.67, rel=1e-3)
    assert spsim.collective("all_gather", 268435200, H100, 80).time_us == pytest.approx(1765.7, rel=0.05)


def test_an_algorithm_may_be_asked_for():
    ring, own = (spsim.collective("all_reduce", "1GiB", H100, 8, algorithm=name) for name in ("ring", "auto"))
    assert (ring.algorithm, ring.steps, own.algorithm, own.steps) == ("ring", 14, "nvls", 1)
    assert ring.time_us > own.time_us


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"all_reduce --bytes 1GiB --hardware {A100} --gpus 8 --algorithm nvls", "does not reduce; use ring"),
        (
            f"all_gather --bytes 1GiB --hardware {H100} --gpus 64 --algorithm tree",
            "all_reduce, not all_gather; use ring",
        ),
        (f"gather --bytes 1GiB --hardware {H100} --gpus 8", "none of all_reduce"),
        (f"all_gather --bytes 64M --hardware {H100} --gpus 8", "bytes '64M'"),
        (f"all_gather --bytes 1GiB --hardware {H100} --gpus 17", "do not fill 3 nodes of 8 GPUs evenly"),
        (f"all_gather --bytes 1GiB --hardware {H100} --gpus 1", "2 or more"),
        (f"all_gather --bytes 1GiB --hardware {H100} --gpus 8 --nodes 0", "0 nodes"),
        (f"all_gather --bytes 1GiB --hardware {H100} --gpus 8 --algorithm best", "'best' is none of"),
        ("all_gather --bytes 1GiB --hardware l40s-8 --gpus 16", "no level beyond 'pcie'"),
        ("all_gather --bytes 1GiB --hardware dgx --gpus 16", "dgx"),
    ],
)
def test_bad_input_is_one_line(line, words, capsys):
    printed = run(capsys, "collective", *line.split(), status=2)
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert words in printed.err


def test_text_and_files(capsys, tmp_path):
    printed = run(capsys, *GATHER, "--out", str(tmp_path)).out
    assert printed.startswith("all_gather of 64 MiB among 64 GPUs on 8 nodes of dgx-h100: ")
    assert re.search(r"hierarchical +hierarchical", printed)
    assert (tmp_path / "collective.png").stat().st_size > 10_000
    document = json.loads((tmp_path / "collective.json").read_text())
    assert {name: len(rows) for name, rows in document["curves"].items()} == dict.fromkeys(
        ("auto", "ring", "hierarchical"), len(CURVE)
    )


def test_curves_begin_with_what_was_asked_for():
    made = curves(group("all_reduce", H100, 16, algorithm="tree"), (2**20, 2**30))
    assert [*made] == ["tree", "ring", "nvls_tree", "hierarchical"]
    assert all(rows[0].time_us < rows[1].time_us for rows in made.values())
