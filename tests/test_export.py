"""Traces for Perfetto: every span, lane, arrow and byte of memory, the same from run to run."""

import errno
import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

import spsim
from spsim import InputError
from spsim.cli.outputs import staging
from spsim.export.chrome_trace import chrome_trace, write_chrome_trace
from spsim.files import whole_file
from tests.cases import result

PLANS = [
    "",
    "tp=8",
    "tp=8,sequence_parallel",
    "tp=4,recompute=full",
    "ulysses=8",
    "ring=8",
    "ring=16",
    "ring=8,ring_cut=contiguous",
    "tp=2,ring=4,ring_cut=contiguous,sequence_parallel",
]
each_plan = pytest.mark.parametrize("plan", PLANS)


def traced(plan, **settings):
    """(result, its events by phase)."""
    simulated = result(plan, **settings)
    events = defaultdict(list)
    for event in json.loads(json.dumps(chrome_trace(simulated)))["traceEvents"]:
        events[event["ph"]].append(event)
    return simulated, events


@each_plan
def test_every_span_of_every_rank_is_an_event_of_its_process_and_thread(plan):
    simulated, events = traced(plan)
    processes = {event["pid"] for event in events["M"] if event["name"] == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events["M"] if event["name"] == "thread_name"
    }
    assert processes == set(range(simulated.scenario.plan.gpus))
    found = Counter((e["pid"], threads[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in events["X"])
    frame = simulated.spans
    expected = Counter(
        zip(frame["rank"], frame["lane"], frame["start_us"], frame["duration_us"].astype(float), strict=True)
    )
    assert found == expected


@each_plan
def test_durations_are_exact(plan):
    """A microsecond is 10^6 ps: what is printed, read back and multiplied is the integer again."""
    simulated, events = traced(plan)
    copies = simulated.trace.copies
    expected = sum((s.end_ps - s.start_ps) * len(copies[s.rank]) for s in simulated.trace.spans)
    assert sum(round(event["dur"] * 10**6) for event in events["X"]) == expected


@each_plan
def test_events_of_a_thread_do_not_overlap(plan):
    _, events = traced(plan)
    threads = defaultdict(list)
    for event in events["X"]:
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(ordered))


def test_arguments_of_a_collective():
    simulated, events = traced("tp=8,sequence_parallel")
    event = next(e for e in events["X"] if e["cat"] == "communication")
    info = simulated.trace.tasks[next(i for i, t in enumerate(simulated.trace.tasks) if t.collective)]
    assert event["name"] == f"{info.collective} for {info.name}"
    assert event["args"] == {
        "part": "forward", "layer": 0, "micro_batch": 0, "purpose": "input", "axis": "tp",
        "message_bytes": info.message_bytes, "sent_bytes": info.sent_bytes, "wait_us": 0.0,
    }  # fmt: skip


def test_waiting_is_an_argument():
    simulated, events = traced("ring=8,ring_cut=contiguous", seq_len=4096)
    waits = sum(event["args"].get("wait_us", 0.0) for event in events["X"])
    assert waits == pytest.approx(sum(s.start_ps - s.posted_ps for s in simulated.trace.spans) / 1e6)
    assert waits > 0


# ------------------------------------------------------------ flows


def flows(events):
    """Id -> its events, in the order of the file."""
    chains = defaultdict(list)
    for event in sorted(events["s"] + events["t"] + events["f"], key=lambda e: (e["id"], "stf".index(e["ph"]))):
        chains[event["id"]].append(event)
    return chains


@each_plan
def test_arrows_begin_end_and_never_go_back(plan):
    _, events = traced(plan)
    for chain in flows(events).values():
        phases = "".join(event["ph"] for event in chain)
        assert phases == "s" + "t" * (len(chain) - 2) + "f"
        times = [event["ts"] for event in chain]
        assert times == sorted(times)
        assert len({event["name"] for event in chain}) == 1


@each_plan
def test_arrows_touch_the_span_of_their_collective(plan):
    _, events = traced(plan)
    spans = defaultdict(list)
    for event in events["X"]:
        spans[event["pid"], event["tid"]].append(event)
    for event in events["s"] + events["t"] + events["f"]:
        assert any(
            span["ts"] <= event["ts"] <= span["ts"] + span["dur"] and span["name"].startswith(event["name"])
            for span in spans[event["pid"], event["tid"]]
        )


def test_one_arrow_chain_per_collective_and_group():
    """tp=2, ulysses=4: an all-reduce over tp joins pairs, an all-to-all joins four ranks."""
    simulated, events = traced("tp=2,ulysses=4")
    chains = flows(events)
    sizes = Counter((chain[0]["name"], len(chain)) for chain in chains.values())
    tasks = Counter((t.collective, t.axis) for t in simulated.trace.tasks if t.collective)
    assert sizes["all_to_all", 4] == 2 * tasks["all_to_all", "ulysses"]
    assert sizes["all_reduce", 2] == 4 * tasks["all_reduce", "tp"]
    groups = {tuple(e["pid"] for e in chain) for chain in chains.values() if chain[0]["name"] == "all_to_all"}
    assert groups == {(0, 2, 4, 6), (1, 3, 5, 7)} or groups == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_messages_of_a_ring_go_to_the_next_rank():
    simulated, events = traced("ring=8")
    messages = [chain for chain in flows(events).values() if chain[0]["name"] == "send_receive"]
    exchanges = sum(t.collective == "send_receive" for t in simulated.trace.tasks)
    assert Counter((a["pid"], b["pid"]) for a, b in messages) == {(r, (r + 1) % 8): exchanges for r in range(8)}


# ------------------------------------------------------------ memory


@each_plan
def test_counters_are_never_negative_and_end_where_they_began(plan):
    simulated, events = traced(plan)
    by_rank = defaultdict(list)
    for event in events["C"]:
        by_rank[event["pid"]].append(event)
    assert set(by_rank) == set(range(simulated.scenario.plan.gpus))
    for counters in by_rank.values():
        assert all(size >= 0 for event in counters for size in event["args"].values())
        assert counters[0]["args"] == counters[-1]["args"]
        assert sum(counters[0]["args"].values()) == pytest.approx(simulated.static.total / 2**30)
        times = [event["ts"] for event in counters]
        assert times == sorted(times)


@each_plan
def test_counters_reach_the_peak(plan):
    simulated, events = traced(plan)
    assert max(sum(event["args"].values()) for event in events["C"]) == pytest.approx(simulated.peak_memory_gib)


# ------------------------------------------------------------ the same bytes


@each_plan
def test_folding_does_not_change_the_trace(plan):
    assert chrome_trace(result(plan)) == chrome_trace(result(plan, fold=False))


def test_two_processes_write_the_same_bytes(tmp_path):
    code = (
        "import sys; from tests.cases import result; from spsim.export.chrome_trace import write_chrome_trace; "
        "write_chrome_trace(result('tp=2,ring=4,ring_cut=contiguous'), sys.argv[1])"
    )
    for name in ("one.json", "two.json"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.json", "two.json"))
    assert one == two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    assert json.loads(one) == chrome_trace(result("tp=2,ring=4,ring_cut=contiguous"))


def test_a_full_disk_asks_for_space_and_names_the_file_where_it_was_to_stand(tmp_path):
    def write():
        with staging(tmp_path) as partial, whole_file(partial / "y.png") as file:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError) as caught:
        write()
    assert str(caught.value) == f"cannot write {str(tmp_path / 'y.png')!r}: No space left on device; free some space"
    assert list(tmp_path.iterdir()) == []


def test_the_result_writes_its_trace(tmp_path):
    result("tp=8").to_chrome_trace(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["plan"] == "TP8"


@pytest.mark.parametrize("path", ["missing/trace.json", "file/trace.json"])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write_chrome_trace(result("tp=8"), tmp_path / path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_import_spsim_loads_no_matplotlib():
    code = "import sys, spsim, spsim.export.chrome_trace; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert spsim.Result.to_chrome_trace
