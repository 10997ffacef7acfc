"""Traces for Perfetto: every span, lane, arrow and byte of memory, the same from run to run, read as Perfetto reads
them; and what of a large step is written out.
"""

import errno
import gzip
import json
import subprocess
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

import spsim
from spsim import InputError
from spsim.cli import main
from spsim.cli.outputs import staging
from spsim.export.chrome_trace import events as events_of
from spsim.files import whole_file
from spsim.results import selection
from spsim.results.filling import curve
from spsim.units import GIB
from tests.cases import result

pytestmark = pytest.mark.slow

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


def written(simulated, **chosen):
    """The events of a selection, as they are read back."""
    return json.loads(json.dumps(list(events_of(simulated, simulated.select(**chosen)))))


def traced(plan, **settings):
    """(result, the events of all its ranks by phase)."""
    simulated = result(plan, **settings)
    events = defaultdict(list)
    for event in written(simulated, ranks=range(simulated.scenario.plan.gpus)):
        events[event["ph"]].append(event)
    return simulated, events


def whole_ns(microseconds):
    """As Perfetto reads a time; it must be one of its nanoseconds."""
    nanoseconds = round(microseconds * 1000)
    assert abs(microseconds * 1000 - nanoseconds) < 1e-4
    return nanoseconds


def threads_of(events):
    """(pid, tid) -> its slices as (start, end, name) in nanoseconds, in order."""
    threads = defaultdict(list)
    for event in events["X"]:
        start = whole_ns(event["ts"])
        threads[event["pid"], event["tid"]].append((start, start + whole_ns(event["dur"]), event["name"]))
    return {thread: sorted(slices) for thread, slices in threads.items()}


@each_plan
def test_every_span_of_every_rank_is_an_event_of_its_process_and_thread(plan):
    simulated, events = traced(plan)
    names = {event["pid"]: event["args"]["name"] for event in events["M"] if event["name"] == "process_name"}
    assert names == {rank + 1: f"rank {rank}" for rank in range(simulated.scenario.plan.gpus)}
    lanes = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events["M"] if event["name"] == "thread_name"
    }
    found = Counter((e["pid"] - 1, lanes[e["pid"], e["tid"]], e["ts"]) for e in events["X"])
    frame = simulated.spans.query("duration_us > 0")
    starts = (frame["start_us"] * 1e6).round().astype("int64")
    expected = Counter(zip(frame["rank"], frame["lane"], ((starts + 500) // 1000) / 1000, strict=True))
    assert found == expected


@each_plan
def test_no_slice_overlaps_another_of_its_thread_on_the_grid_of_nanoseconds(plan):
    """Perfetto drops a slice that begins in another one and outlasts it, and draws one inside another below it."""
    _, events = traced(plan)
    for slices in threads_of(events).values():
        assert all(start < end for start, end, _ in slices)
        assert all(one[1] <= other[0] for one, other in pairwise(slices))


@each_plan
def test_ends_are_rounded_themselves(plan):
    """No error adds up: every start and end is within half a nanosecond of the simulated one."""
    simulated, events = traced(plan)
    ends = {end for slices in threads_of(events).values() for _, end, _ in slices}
    assert ends == {(span.end_ps + 500) // 1000 for span in simulated.trace.spans if span.end_ps > span.start_ps}


@each_plan
def test_numbers_of_processes_and_threads_are_distinct_and_above_0(plan):
    """Perfetto takes a thread with the number of a process for its first, and equal threads for one."""
    _, events = traced(plan)
    threads = [(event["pid"], event["tid"]) for event in events["M"] if event["name"] == "thread_name"]
    numbers = [tid for _, tid in threads] + sorted({pid for pid, _ in threads})
    assert len(numbers) == len(set(numbers))
    assert min(numbers) > 0
    assert {(event["pid"], event["tid"]) for phase in "Xstf" for event in events[phase]} == set(threads)
    places = {e["pid"]: e["args"]["sort_index"] for e in events["M"] if e["name"] == "process_sort_index"}
    assert sorted(places, key=places.get) == sorted(places)


def test_arguments_of_a_collective():
    simulated, events = traced("tp=8,sequence_parallel")
    event = next(e for e in events["X"] if e["cat"] == "communication")
    info = simulated.trace.tasks[next(i for i, t in enumerate(simulated.trace.tasks) if t.collective)]
    assert event["name"] == f"{info.collective} for {info.name}"
    rate = event["args"].pop("GB/s")
    assert rate == pytest.approx(info.sent_bytes / event["dur"] / 1e3, rel=1e-2)
    assert event["args"] == {
        "part": "forward", "layer": 0, "micro_batch": 0, "purpose": "input", "axis": "tp", "algorithm": "ring",
        "ranks": 8, "message_bytes": info.message_bytes, "sent_bytes": info.sent_bytes, "wait_us": 0.0,
    }  # fmt: skip


def test_arguments_of_kernels():
    """qkv of 256 tokens and hidden 256 on one GPU: 2 x 256 x 256 x 768 FLOPs; input, weight, bias and result of 2 bytes
    each once.
    """
    _, events = traced("")
    by_name = {event["name"]: event for event in events["X"] if event["args"]["part"] == "forward"}
    qkv, norm = by_name["qkv"], by_name["norm1"]
    assert qkv["args"]["FLOPs"] == 2 * 256 * 256 * 768
    assert qkv["args"]["bytes"] == 2 * (256 * 256 + 256 * 768 + 768 + 256 * 768)
    assert qkv["args"]["TFLOP/s"] == pytest.approx(qkv["args"]["FLOPs"] / qkv["dur"] / 1e6, rel=1e-2)
    assert norm["args"]["GB/s"] == pytest.approx(norm["args"]["bytes"] / norm["dur"] / 1e3, rel=1e-2)
    assert "FLOPs" not in norm["args"]


def test_each_rank_has_its_own_work():
    """A contiguous ring under a causal mask: the last rank attends to all keys, the first to its own only."""
    simulated, events = traced("ring=8,ring_cut=contiguous", seq_len=4096)
    flops = Counter()
    for event in events["X"]:
        if event["cat"] == "attention" and event["args"]["part"] == "forward":
            flops[event["pid"]] += event["args"]["FLOPs"]
    pairs = [1 + 2 * rank for rank in range(8)]
    assert [flops[rank + 1] / flops[1] for rank in range(8)] == pytest.approx(pairs)
    assert sum(flops.values()) == 2 * 2 * 4096**2 * 256 * simulated.scenario.model.layers / 2


@pytest.mark.parametrize(
    ("collective", "message", "ranks", "nodes", "algorithm"),
    [
        ("all_reduce", 2**30, 8, 1, "nvls"),
        ("all_gather", 2**30, 8, 1, "ring"),
        ("all_to_all", 2**20, 8, 1, "pairwise"),
        ("send_receive", 2**20, 8, 1, "send_receive"),
        ("all_reduce", 2**16, 64, 8, "tree"),
        ("reduce_scatter", 2**30, 64, 8, "ring"),
    ],
)
def test_the_algorithm_of_a_collective(collective, message, ranks, nodes, algorithm):
    """What NCCL chooses on H100: NVLS where the switch can reduce, trees between nodes for short all-reduces."""
    from spsim.costs.collectives import CommCost
    from spsim.inputs.profiles import load_profile

    assert CommCost(load_profile("dgx-h100")).algorithm(collective, message, ranks, nodes) == algorithm


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
    """The slice that begins no later than the moment and ends after it, as Perfetto looks for it."""
    _, events = traced(plan)
    threads = threads_of(events)
    for event in events["s"] + events["t"] + events["f"]:
        time = whole_ns(event["ts"])
        around = [name for start, end, name in threads[event["pid"], event["tid"]] if start <= time < end]
        assert [name.startswith(event["name"]) for name in around] == [True]


def test_one_arrow_chain_per_collective_and_group():
    """tp=2, ulysses=4: an all-reduce over tp joins pairs, an all-to-all joins four ranks."""
    simulated, events = traced("tp=2,ulysses=4")
    chains = flows(events)
    sizes = Counter((chain[0]["name"], len(chain)) for chain in chains.values())
    tasks = Counter((t.collective, t.axis) for t in simulated.trace.tasks if t.collective)
    assert sizes["all_to_all", 4] == 2 * tasks["all_to_all", "ulysses"]
    assert sizes["all_reduce", 2] == 4 * tasks["all_reduce", "tp"]
    groups = {tuple(e["pid"] - 1 for e in chain) for chain in chains.values() if chain[0]["name"] == "all_to_all"}
    assert groups == {(0, 2, 4, 6), (1, 3, 5, 7)} or groups == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_messages_of_a_ring_go_to_the_next_rank():
    simulated, events = traced("ring=8")
    messages = [chain for chain in flows(events).values() if chain[0]["name"] == "send_receive"]
    exchanges = sum(t.collective == "send_receive" for t in simulated.trace.tasks)
    expected = {(rank + 1, (rank + 1) % 8 + 1): exchanges for rank in range(8)}
    assert Counter((a["pid"], b["pid"]) for a, b in messages) == expected


# ------------------------------------------------------------ memory


def as_it_was(curve, time):
    """The value of the last moment of a curve that is not after a time."""
    moments = sorted(curve)
    return curve[moments[bisect_right(moments, time) - 1]]


@each_plan
def test_one_counter_of_all_memory_beside_the_capacity(plan):
    """It ends where it began, reaches the peak, and is what the memory curve says at each moment."""
    simulated, events = traced(plan)
    by_rank = defaultdict(list)
    for event in events["C"]:
        assert event["name"] == "memory (GiB)"
        assert event["args"]["capacity"] == simulated.capacity_gib
        by_rank[event["pid"] - 1].append((whole_ns(event["ts"]), event["args"]["total"]))
    assert set(by_rank) == set(range(simulated.scenario.plan.gpus))
    assert max(size for own in by_rank.values() for _, size in own) == pytest.approx(simulated.peak_memory_gib)
    curves = simulated.memory_curve.groupby("rank")
    for rank, own in by_rank.items():
        assert own[-1][1] == pytest.approx(simulated.static.total / GIB)
        assert own == sorted(own)
        frame = curves.get_group(rank)
        times = ((frame["time_us"] * 1e6).round().astype("int64") + 500) // 1000
        totals = dict(zip(times, frame["total_gib"], strict=True))
        assert [size for _, size in own] == pytest.approx([as_it_was(totals, time) for time, _ in own])
        assert {time for time, _ in own} >= set(times)


# ------------------------------------------------------------ selections


def sizes_by_moment(moments):
    return {moment.time_ps: {name: size for name, size in moment.sizes.items() if size} for moment in moments}


@pytest.mark.parametrize("resolution", [0, 10**6, 10**8, 10**10, 10**13])
@pytest.mark.parametrize("plan", ["tp=8", "ring=8", "ring=8,ring_cut=contiguous", "ulysses=8,recompute=full"])
def test_a_curve_of_any_resolution_is_of_true_moments_and_has_the_peak(plan, resolution):
    simulated = result(plan, layers=7, global_batch=5, seq_len=1024)
    trace, peak = simulated.trace, simulated.peak
    exact = sizes_by_moment(curve(trace, peak.rank, [(0, trace.end_ps)], resolution))
    coarse = sizes_by_moment(curve(trace, peak.rank, [], resolution))
    assert all(sizes == as_it_was(exact, time) for time, sizes in coarse.items())
    highest = max(coarse, key=lambda time: sum(coarse[time].values()))
    assert sum(coarse[highest].values()) + simulated.static.total == peak.bytes
    assert resolution or coarse.keys() >= exact.keys()


def test_one_rank_of_each_class_stands_for_all():
    """Of eight equal ranks the first; of a ring with unequal ones all."""
    assert [*result("tp=8").select().ranks] == [0]
    assert [*result("ring=8,ring_cut=contiguous", seq_len=4096).select().ranks] == [*range(8)]
    assert [*result("tp=2,ring=4,ring_cut=contiguous", seq_len=4096).select().ranks] == [0, 2, 4, 6]


@pytest.mark.parametrize("fold", [True, False])
def test_a_selection_is_part_of_the_whole(fold):
    """The slices of two ranks and layers, and of the step's end, are those of the whole; arrows join these ranks."""
    simulated = result("tp=2,ulysses=4", layers=5, global_batch=3, fold=fold)
    everything, some = written(simulated, ranks=range(8)), written(simulated, ranks=[6, 2], layers=[4, 1])
    shown = [event for event in some if event["ph"] == "X"]
    expected = [
        event
        for event in everything
        if event["ph"] == "X" and event["pid"] in (3, 7) and event["args"].get("layer", 1) in (1, 4)
    ]
    assert shown == expected
    assert {event["args"].get("micro_batch") for event in shown} == {0, 1, 2, None}
    assert {event["pid"] for event in some if event["ph"] in "stf"} == {3, 7}


def test_a_selection_holds_all_changes_of_memory_of_its_layers():
    simulated = result("tp=8", layers=5, global_batch=3)
    chosen = simulated.select(layers=[1, 4])
    whole = dict(zip(simulated.memory_curve["time_us"], simulated.memory_curve["total_gib"], strict=True))
    static = simulated.statics
    found = spsim.results.tables.memory_frame(simulated.trace, static, chosen)
    inside = [time for time in whole if any(a / 1e6 <= time <= b / 1e6 for a, b in chosen.windows)]
    assert sorted(set(found["time_us"])) == inside
    last = found.drop_duplicates("time_us", keep="last")
    assert dict(zip(last["time_us"], last["total_gib"], strict=True)) == {time: whole[time] for time in inside}


def test_a_large_step_is_cut_by_micro_batches_then_layers_then_classes(monkeypatch):
    """One rank has 2 x 20 x 10 equal visits of `one` spans, and the end of the step."""
    simulated = result("tp=8", layers=20, global_batch=10)
    one = simulated.select(layers=[0]).num_spans // 10

    def chosen(most, **named):
        monkeypatch.setattr(selection, "LARGE", most)
        found = simulated.select(**named)
        return len(found.ranks), len(found.layers), len(found.micro_batches)

    assert chosen(one * 200) == (1, 20, 10)
    assert chosen(one * 45) == (1, 20, 2)
    assert chosen(one * 7) == (1, 7, 1)
    assert chosen(1) == (1, 1, 1)
    assert chosen(one * 16, ranks=range(8)) == (8, 2, 1)
    assert chosen(1, layers=[3, 4]) == (1, 2, 10)
    assert (
        simulated.select(ranks=[1, 3, 4], layers=[3, 4]).words
        == "ranks 1, 3-4 of 8, layers 3-4 of 20, all 10 micro-batches"
    )
    monkeypatch.setattr(selection, "LARGEST", one * 3)
    with pytest.raises(InputError, match="name fewer ranks or layers"):
        simulated.select(ranks=range(8), layers=[0])


@pytest.mark.parametrize(
    ("chosen", "words"), [({"ranks": [8]}, "8 is not a rank of the plan; use 0 to 7"), ({"layers": [2]}, "use 0 to 1")]
)
def test_what_there_is_not_cannot_be_selected(chosen, words):
    with pytest.raises(InputError, match=words):
        result("tp=8").select(**chosen)


SMALL = ["run", "--model", "llama-3-8b", "--hardware", "dgx-h100", "--seq-len", "4096"]


def files_of(out, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *arguments, "--out", str(out)])
    assert stop.value.code == 0
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}


TABLES = {
    "mapping.png", "memory.png", "memory_curve.csv", "operators.csv", "result.json", "spans.csv", "step.png",
    "timeline.png",
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("--plan", "tp=8,ring=16,sequence_parallel", "--nodes", "16", "--global-batch", "2"),
        ("--plan", "tp=8", "--global-batch", "3000"),
    ],
)
def test_a_large_job_writes_small_files(tmp_path, arguments, capsys, monkeypatch):
    """128 GPUs, and 3,000 micro-batches; here a tenth of what is large otherwise."""
    monkeypatch.setattr(selection, "LARGE", selection.LARGE // 10)
    files = files_of(tmp_path, *arguments)
    assert set(files) == TABLES | {"trace.json.gz"}
    assert sum(files.values()) < 3e6
    assert "rank 0 of" in capsys.readouterr().out


def test_ranks_layers_and_format_of_the_command(tmp_path, capsys):
    """What an earlier run left of a rank does not stand beside the new ones; what is of no layer does (optimizer)."""
    plan = ("--plan", "tp=4", "--trace-format", "kineto", "--layers", "3,0-1")
    assert set(files_of(tmp_path, *plan, "--ranks", "all")) == TABLES | {f"kineto/rank_{n}.json.gz" for n in range(4)}
    assert set(files_of(tmp_path, *plan, "--ranks", "2")) == TABLES | {"kineto/rank_2.json.gz"}
    assert "rank 2 of 4, layers 0-1, 3 of 32, 1 micro-batch" in capsys.readouterr().out
    assert {line.split(",")[6] for line in (tmp_path / "spans.csv").read_text().splitlines()} == {
        "layer",
        "",
        "0",
        "1",
        "3",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks", "4"),
        ("--ranks", "0-999999999"),
        ("--layers", "x"),
        ("--layers", "3-1"),
        ("--ranks", ""),
        ("--ranks", "-1"),
    ],
)
def test_a_selection_that_is_none_is_one_line(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--plan", "tp=4", *arguments, "--out", str(tmp_path / "out")])
    line = capsys.readouterr().err
    assert (stop.value.code, line.count("\n")) == (2, 1)
    assert arguments[0] in line
    assert not (tmp_path / "out").exists()


def test_a_selection_without_out_is_refused(capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, "--plan", "tp=4", "--ranks", "0"])
    assert "give --out too" in capsys.readouterr().err


# ------------------------------------------------------------ the same bytes


@each_plan
def test_folding_does_not_change_the_trace(plan):
    assert traced(plan)[1] == traced(plan, fold=False)[1]


def test_two_processes_write_the_same_bytes(tmp_path):
    code = (
        "import sys; from tests.cases import result; "
        "result('tp=2,ring=4,ring_cut=contiguous').to_chrome_trace(sys.argv[1])"
    )
    for name in ("one.json.gz", "two.json.gz"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.json.gz", "two.json.gz"))
    assert one == two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json.gz", "two.json.gz"]
    read = json.loads(gzip.decompress(one))["traceEvents"]
    assert read == written(result("tp=2,ring=4,ring_cut=contiguous"))


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
        result("tp=8").to_chrome_trace(tmp_path / path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_import_spsim_loads_no_matplotlib():
    code = "import sys, spsim, spsim.export.chrome_trace; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert spsim.Result.to_chrome_trace
