"""Traces as torch.profiler writes them: read back, and divided as HolisticTraceAnalysis divides the time of a GPU."""

import gzip
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from spsim.pytorch.kineto import load_kineto_trace
from spsim.results import measured
from tests.cases import result

PLANS = [
    {"plan": ""},
    {"plan": "tp=4,recompute=full", "global_batch": 3},
    {"plan": "tp=4,sequence_parallel,distributed_optimizer"},
    {"plan": "ulysses=4", "global_batch": 2},
    {"plan": "ring=4", "seq_len": 4096},
    {"plan": "ring=4,ring_cut=contiguous", "seq_len": 4096, "global_batch": 2},
    {"plan": "tp=2,ring=2,sequence_parallel"},
    {"plan": "tp=2,sequence_parallel,tp_overlap", "hardware": "dgx-h100"},
]
each_plan = pytest.mark.parametrize("case", PLANS, ids=lambda case: case["plan"] or "one GPU")


def written(directory, case):
    """(result, the paths of the files of all its ranks)."""
    simulated = result(**case)
    gpus = simulated.scenario.plan.gpus
    simulated.to_kineto_traces(directory, ranks=range(gpus))
    return simulated, [directory / f"rank_{rank}.json.gz" for rank in range(gpus)]


def union(intervals):
    """Length of all that some intervals cover."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def intervals_of(simulated, rank):
    """(of kernels, of communications from when they are posted) in microseconds."""
    frame = simulated.spans.query("rank == @rank and end_us > posted_us")
    kernels = frame["lane"] == "compute"
    return (
        list(zip(frame[kernels]["start_us"], frame[kernels]["end_us"], strict=True)),
        list(zip(frame[~kernels]["posted_us"], frame[~kernels]["end_us"], strict=True)),
    )


@each_plan
def test_what_is_written_is_read_back(case, tmp_path):
    """Every collective with its size and group, the passes, the time of each class, and what no kernel hides."""
    simulated, files = written(tmp_path, case)
    read = load_kineto_trace(files)
    ranks = range(len(files))
    asked = Counter(
        (task.collective, task.message_bytes, simulated.trace.groups[task.axis][0])
        for task in simulated.trace.tasks
        if task.collective
    )
    assert asked == Counter(
        (task.collective, task.message_bytes, read.groups[task.axis][0]) for task in read.tasks if task.collective
    )
    micro_batches = range(simulated.scenario.num_micro_batches)
    passes = [(phase, number) for number in micro_batches for phase in ("forward", "backward")]
    assert sorted((leaf.stretch.phase, leaf.stretch.micro_batch) for leaf in read.leaves) == sorted(passes)
    rounding = len(simulated.trace.tasks) * 1000
    exposed = measured.exposed_communication(read)
    for rank in ranks:
        kernels, communications = intervals_of(simulated, rank)
        expected = 1e6 * (union(kernels + communications) - union(kernels))
        assert exposed[rank] == pytest.approx(expected, abs=rounding)
    time = {name: sum(own) for name, own in _by_class(simulated).items()}
    found = measured.compute_by_class(read, 0)
    assert found.keys() == time.keys()
    assert all(found[name] == pytest.approx(1e6 * time[name], abs=rounding) for name in time)


def _by_class(simulated):
    found = defaultdict(list)
    for row in simulated.spans.query("rank == 0 and lane == 'compute' and duration_us > 0").itertuples():
        found[row.operator_class].append(row.duration_us)
    return found


@each_plan
def test_time_of_a_gpu_divided_as_holistic_trace_analysis_does(case, tmp_path):
    """Its temporal breakdown (`get_temporal_breakdown`): from the first kernel to the last, in which kernels whose name
    begins with `nccl` and has `Kernel` are communication and all others computation; idle is when none runs.
    """
    simulated, files = written(tmp_path, case)
    for rank, file in enumerate(files):
        kernels = [event for event in events_of(file) if event.get("args", {}).get("stream", -1) != -1]
        spans = [(kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels]
        compute = [
            span for span, kernel in zip(spans, kernels, strict=True) if not re.match(r"^nccl.*Kernel", kernel["name"])
        ]
        total = max(end for _, end in spans) - min(start for start, _ in spans)
        own, communications = intervals_of(simulated, rank)
        rounding = len(spans) * 1e-3
        assert union(compute) == pytest.approx(union(own), abs=rounding)
        assert union(spans) - union(compute) == pytest.approx(union(own + communications) - union(own), abs=rounding)
        last = max(end for _, end in own + communications)
        assert total - union(spans) == pytest.approx(last - union(own + communications), abs=rounding)


def events_of(file):
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


@each_plan
def test_a_host_launches_in_order_and_ahead_of_its_device(case, tmp_path):
    """Each kernel is launched once, inside an operator of the host, and begins no earlier."""
    _, files = written(tmp_path, case)
    for file in files:
        events = [event for event in events_of(file) if event["ph"] == "X"]
        launches = {e["args"]["correlation"]: e for e in events if e["cat"] == "cuda_runtime"}
        kernels = {e["args"]["correlation"]: e for e in events if e["cat"] == "kernel"}
        operators = {e["args"]["External id"]: e for e in events if e["cat"] == "cpu_op" and "args" in e}
        assert launches.keys() == kernels.keys() == operators.keys()
        assert all(launches[k]["ts"] + launches[k]["dur"] <= kernels[k]["ts"] for k in kernels)
        assert all(one["ts"] + one["dur"] < other["ts"] for one, other in pairwise(operators.values()))
        assert min(event["ts"] for event in events) >= 0
        assert all(0 not in (event["pid"], event["tid"]) for event in events)
        streams = defaultdict(list)
        for kernel in kernels.values():
            streams[kernel["tid"]].append((kernel["ts"], kernel["ts"] + kernel["dur"]))
        for spans in streams.values():
            assert all(one[1] <= other[0] + 1e-6 for one, other in pairwise(sorted(spans)))


def test_the_rank_stands_in_the_file_where_tools_look_for_it(tmp_path):
    """HolisticTraceAnalysis looks for `"rank": 3` in each line of a file, from the first."""
    _, files = written(tmp_path, {"plan": "tp=4"})
    for rank, file in enumerate(files):
        first = gzip.decompress(file.read_bytes()).decode().splitlines()[0]
        assert re.search(r'"rank":\s+(\d+)', first)[1] == str(rank)


def test_one_rank_alone_is_read_too(tmp_path):
    simulated = result("ulysses=4", layers=5)
    simulated.to_kineto_traces(tmp_path, layers=[1, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.json.gz"]
    read = load_kineto_trace(tmp_path / "rank_0.json.gz")
    calls = Counter(task.collective for task in read.tasks if task.collective)
    assert calls == {"all_to_all": 2 * 8, "all_reduce": 1}


def test_copies_to_the_host_are_those_of_a_profiler(tmp_path):
    """Of two layers that leave and come back: memory copies, on a stream that is read as theirs."""
    simulated, (file,) = written(tmp_path, {"plan": "cpu_offload_layers=2", "layers": 4, "hardware": "dgx-h100"})
    copies = [event for event in events_of(file) if event.get("cat") == "gpu_memcpy"]
    assert [event["name"].split()[1] for event in copies] == ["DtoH", "DtoH", "HtoD", "HtoD"]
    spans = simulated.spans.query("lane == 'host'")
    assert [event["dur"] for event in copies] == pytest.approx(spans["duration_us"].tolist(), abs=2e-3)
    read = load_kineto_trace([file])
    lanes = {span.lane for leaf in read.leaves for span in leaf.stretch.recording.spans}
    assert any("copies" in lane or "copy" in lane for lane in lanes)
