"""Traces of torch.profiler: files written by hand with known intervals, and one that torch really wrote."""

import gzip
import json
import math
import os
import re
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest

import spsim
from spsim import MeasuredSpan, load_kineto_trace, measured_trace, plots
from spsim.cli import main
from spsim.errors import InputError
from spsim.pytorch.kineto.names import collective, operator_class, short_name
from spsim.results import metrics, tables
from spsim.units import PS_PER_US

GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"
NORM = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int, float)"
NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
BASE_NS = 1_700_000_000_000_000_000


def event(name, category, start, duration, *, thread=1, **arguments):
    """A complete event as torch writes it; underscores of argument names are spaces."""
    named = {key.replace("_", " "): value for key, value in arguments.items()}
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": duration, "args": named
    }  # fmt: skip


def launched(name, issued, start, duration, *, correlation, thread=1, stream=7, **arguments):
    """A kernel and the call that launched it, from a thread of the host."""
    return [
        event("cudaLaunchKernel", "cuda_runtime", issued, 2, thread=thread, correlation=correlation),
        event(name, "kernel", start, duration, thread=stream, correlation=correlation, stream=stream, **arguments),
    ]


def call(name, elements, **more):
    """What torch writes about a collective of two ranks."""
    return {
        "Collective_name": name, "In_msg_nelems": elements, "Out_msg_nelems": elements, "dtype": "BFloat16",
        "Group_size": 2, "Process_Group_Name": "3", "Process_Group_Description": "tp",
        "Process_Group_Ranks": "[0, 1]", **more,
    }  # fmt: skip


def gpu_rank(rank, late):
    """A forward and a backward pass of one GPU; `late` microseconds until its first kernel, the clock off by 1 ms."""
    return {
        "baseTimeNanoseconds": BASE_NS + 1_000_000 * rank,
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 2},
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
            *launched(NORM, 0 - 1000 * rank, 100 + late - 1000 * rank, 10, correlation=1),
            *launched(GEMM, 5 - 1000 * rank, 110 + late - 1000 * rank, 40, correlation=2),
            *launched("copy_kernel", 8 - 1000 * rank, 120 + late - 1000 * rank, 20, correlation=3, stream=13),
            *launched(
                NCCL, 10 - 1000 * rank, 150 + late - 1000 * rank, 70 - late, correlation=4, stream=20,
                **call("allreduce", 1024),
            ),
            # The backward pass is issued while the forward pass still runs, by another thread of the host.
            event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 50 - 1000 * rank, 30, thread=2),
            *launched(GEMM, 60 - 1000 * rank, 230 - 1000 * rank, 50, correlation=5, thread=2),
            *launched("mystery", 90 - 1000 * rank, 300 - 1000 * rank, 5, correlation=6),
            event("Optimizer.step#Adam.step", "user_annotation", 95 - 1000 * rank, 10),
            *launched("multi_tensor_apply_kernel", 100 - 1000 * rank, 305 - 1000 * rank, 5, correlation=7),
        ],
    }  # fmt: skip


@pytest.fixture
def gpu_trace(tmp_path):
    """Two ranks, the second 30 us late, one file of each form."""
    plain, packed = tmp_path / "rank0.json", tmp_path / "rank1.json.gz"
    plain.write_text(json.dumps(gpu_rank(0, late=0)))
    packed.write_bytes(gzip.compress(json.dumps(gpu_rank(1, late=30)).encode()))
    return load_kineto_trace([packed, plain])


def rows(trace, **where):
    """(name, start, end) of the spans of a trace that have some values, in microseconds."""
    frame = tables.spans_frame(trace)
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return [(row.name, round(row.start_us), round(row.end_us)) for row in frame.itertuples(index=False)]


def test_kernels_stand_on_lanes_by_stream_and_ranks_share_a_clock(gpu_trace):
    """Times count from the first kernel of rank 0; the base times of the files differ by 1 ms."""
    assert rows(gpu_trace, rank=0, lane="compute", part="forward", micro_batch=0) == [
        ("vectorized_layer_norm_kernel", 0, 10), (GEMM, 10, 50),
    ]  # fmt: skip
    assert rows(gpu_trace, rank=1, lane="compute", part="forward", micro_batch=0) == [
        ("vectorized_layer_norm_kernel", 30, 40), (GEMM, 40, 80),
    ]  # fmt: skip
    assert rows(gpu_trace, rank=0, lane="compute, stream 13") == [("copy_kernel", 20, 40)]


def test_a_collective_starts_when_its_last_rank_is_there(gpu_trace):
    """Rank 0 posts at 50 us and waits for rank 1 until 80 us; the transfer is the rest of both kernels."""
    frame = tables.spans_frame(gpu_trace)
    frame = frame[frame["collective"] == "all_reduce"]
    assert [round(time) for time in frame["posted_us"]] == [50, 80]
    assert [round(time) for time in frame["start_us"]] == [80, 80]
    assert [round(time) for time in frame["end_us"]] == [120, 120]
    assert set(frame["message_bytes"]) == {2048}
    assert set(frame["axis"]) == {"tp"}


def test_the_phase_is_that_of_the_launch(gpu_trace):
    """What autograd's engine launched is backward, what an optimizer launched its own, whenever it ran; what comes
    between them, such as gradient clipping, belongs to the step.
    """
    assert rows(gpu_trace, rank=0, part="backward") == [(GEMM, 130, 180)]
    assert rows(gpu_trace, rank=0, part="optimizer") == [("mystery", 200, 205), ("multi_tensor_apply_kernel", 205, 210)]
    assert rows(gpu_trace, rank=0, part="forward", micro_batch=1) == []


def test_metrics_of_a_measured_trace(gpu_trace):
    """Rank 0 has 70 us of posted all-reduce and no kernel meanwhile, rank 1 40; streams that overlap count once."""
    microseconds = {rank: time / PS_PER_US for rank, time in metrics.exposed_communication(gpu_trace).items()}
    assert microseconds == {0: 70, 1: 40}
    assert metrics.layer_window(gpu_trace, "forward", layer=None) == 120 * PS_PER_US
    assert metrics.compute_by_class(gpu_trace, 0) == {
        "norm": 10 * PS_PER_US, "gemm": 90 * PS_PER_US, "elementwise": 25 * PS_PER_US, "other": 5 * PS_PER_US,
    }  # fmt: skip
    assert set(tables.operators_frame(gpu_trace)["operator"]) >= {"all_reduce", GEMM}


def test_kernels_at_once_hide_communication_once():
    """Two streams run 0-10 and 5-15 under a transfer 0-20: 5 us are exposed."""
    spans = [
        MeasuredSpan(0, "compute", "a", "gemm", 0, 10),
        MeasuredSpan(0, "compute, stream 2", "b", "gemm", 5, 15),
        MeasuredSpan(0, "tp", "all_reduce", "communication", 0, 20, collective="all_reduce"),
    ]
    assert metrics.exposed_communication(measured_trace(spans)) == {0: 5 * PS_PER_US}


def test_metadata_of_nccl_may_stand_on_the_operator_and_ranks_be_shortened(tmp_path):
    """Older versions write the call on record_param_comms; a long list of ranks ends in an ellipsis."""
    arguments = {key.replace("_", " "): value for key, value in call("_reduce_scatter_base", 64).items()}
    arguments |= {"Out msg nelems": 32, "Process Group Ranks": "[0, 1, ...]", "Process Group Description": "undefined"}
    document = gpu_rank(0, late=0)
    document["traceEvents"] = [
        {**event("record_param_comms", "cpu_op", 0, 9), "args": arguments | {"External id": 5}},
        *launched("ncclDevKernel_Generic(x)", 1, 10, 5, correlation=1, stream=20, External_id=5),
    ]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    trace = load_kineto_trace(path)
    (info,) = trace.tasks
    assert (info.collective, info.axis, info.message_bytes, info.sent_bytes) == ("reduce_scatter", "group 3", 128, 0)


def test_skewed_clocks_are_left_as_they_are():
    """A rank that ends before its peer starts did not wait for it: the clocks disagree, and no span is moved."""
    spans = [
        MeasuredSpan(rank, "tp", "all_reduce", "communication", start, start + 5, collective="all_reduce", group=(0, 1))
        for rank, start in ((0, 0.0), (1, 100.0))
    ]
    assert [span.start_ps for span in measured_trace(spans).spans] == [0, 100 * PS_PER_US]


def test_pictures_of_a_measured_trace(gpu_trace):
    """It is drawn alone, and under a simulated run on the same axis."""
    alone = plots.plot_timeline(gpu_trace, ranks=[0, 1])
    lanes = [label.get_text() for label in alone.axes[0].get_yticklabels()]
    assert lanes == ["rank 0  compute", "tp", "compute, stream 13", "rank 1  compute", "tp", "compute, stream 13"]
    model = spsim.Model(layers=1, hidden=1024, heads=8, vocab=1000)
    scenario = spsim.Scenario(hardware="dgx-h100", model=model, plan="tp=2", workload={"seq_len": 512})
    both = plots.plot_timelines({"simulated": spsim.simulate(scenario), "measured": gpu_trace})
    assert len(both.axes) == 2
    assert both.axes[0].get_xlim() == both.axes[1].get_xlim()
    headers = [text.get_text() for axes in both.axes for text in axes.texts]
    assert any(text.startswith("simulated: ") for text in headers)
    assert any(text.startswith("measured: ") and "against simulated" in text for text in headers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(AttentionKernel<>)", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNN", "gemm"),
        ("Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV", "gemm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>", "norm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::masked_scale_kernel<bool> >(int)", "dropout"),
        ("triton_per_fused_native_layer_norm_0", "norm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_dropout", "dropout"),
        ("aten::addmm", "gemm"),
        (
            "void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("void at::native::embedding_backward_feature_kernel<float, long>(long const*)", "embedding"),
        ("aten::nll_loss_forward", "cross_entropy"),
        ("aten::normal_", "other"),
        ("my_own_kernel", "other"),
    ],
)
def test_operator_classes(name, expected):
    assert operator_class(name) == expected


def test_names_of_collectives_and_kernels():
    assert [collective(name) for name in ("_allgather_base", "c10d::alltoall_base_", "ncclDevKernel_SendRecv")] == [
        "all_gather", "all_to_all", "send_receive",
    ]  # fmt: skip
    assert short_name("void at::native::elementwise_kernel<128, 4>(int)") == "elementwise_kernel"


# ------------------------------------------------------------ what torch writes


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A profile of one forward and backward pass on this CPU, and how often each operator ran."""
    torch = pytest.importorskip("torch")
    first, norm = torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)
    x = torch.randn(8, 4, 16, 64)

    def step():
        hidden = torch.nn.functional.gelu(norm(first(x)))
        heads = torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
        heads.reshape(-1, 64).transpose(0, 1).sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    path = tmp_path_factory.mktemp("profile") / "cpu.json"
    profile.export_chrome_trace(str(path))
    return load_kineto_trace(path), Counter(event.name for event in profile.events())


def test_a_trace_that_torch_wrote(recorded):
    """The operators of both passes in order, each once, none inside another."""
    trace, _ = recorded
    forward = [name for name, *_ in rows(trace, part="forward")]
    assert [name for name in forward if name not in ("clone", "ones_like")] == [
        "linear", "layer_norm", "gelu", "scaled_dot_product_attention", "sum",
    ]  # fmt: skip
    backward = tables.spans_frame(trace).query("part == 'backward'")
    assert Counter(backward["operator_class"])["gemm"] == 1, "the input needs no gradient"
    assert {"attention", "norm", "elementwise"} <= set(backward["operator_class"])
    assert set(tables.spans_frame(trace)["lane"]) == {"compute"}


def test_spans_of_a_lane_do_not_overlap(recorded):
    trace, _ = recorded
    spans = sorted(trace.spans, key=lambda span: span.start_ps)
    assert all(before.end_ps <= after.start_ps for before, after in pairwise(spans))


def test_views_are_no_spans(recorded):
    """Torch recorded views; they move no data."""
    trace, counts = recorded
    assert counts["aten::transpose"] > 0
    assert not {"transpose", "t", "view"} & {info.name for info in trace.tasks}


# ------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"{\"traceEvents\": [", "is not JSON, or is cut short"),
        (b"[]", "has no list 'traceEvents'"),
        (b"{\"traceEvents\": []}", "neither kernels nor operators"),
        (b"[1", "is not JSON"),
        (b"{\"traceEvents\": [3]}", "event 0 of traceEvents is '3', but must be a table"),
    ],
)  # fmt: skip
def test_bad_files(content, complaint, tmp_path):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as problem:
        load_kineto_trace(path)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "trace.json.gz"
    for content in (gzip.compress(json.dumps(gpu_rank(0, 0)).encode())[:-20], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"trace.json.gz: .*(cut short or damaged|cannot be read)"):
            load_kineto_trace(path)


def test_a_rank_given_twice(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(gpu_rank(0, 0)))
    with pytest.raises(InputError, match=r"b.json: is of rank 0, as is .*a.json; give one file a rank"):
        load_kineto_trace([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(InputError, match="no files"):
        load_kineto_trace([])


def test_a_file_given_twice(tmp_path):
    """Without information on ranks it would be taken for two."""
    document = {key: value for key, value in gpu_rank(0, 0).items() if key != "distributedInfo"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"a.json: is given 2 times; give one file a rank"):
        load_kineto_trace([path, tmp_path / "." / "a.json"])
    assert len(load_kineto_trace(tmp_path.glob("*.json")).copies) == 1


@pytest.mark.parametrize("paths", [5, None, [5]])
def test_no_paths(paths):
    with pytest.raises(InputError, match=r"(5|None) is no path; give the path"):
        load_kineto_trace(paths)


def test_a_send_receive_has_one_name():
    """Whatever the width of its bar; a kind of collective without an abbreviation is drawn too."""
    spans = [
        MeasuredSpan(0, "ring", "x", "communication", start, end, collective=kind)
        for start, end, kind in ((0, 100, "send_receive"), (101, 109, "send_receive"), (110, 118, "broadcast"))
    ]
    texts = [text.get_text() for text in plots.plot_timeline(measured_trace(spans)).axes[0].texts]
    assert "P2P" not in texts
    assert texts.count("send-receive") == 2
    assert "broadcast" in texts


def test_bad_spans():
    with pytest.raises(InputError, match="no spans"):
        measured_trace([])
    with pytest.raises(InputError, match=r"'mm' of rank 0 .* times must not go back"):
        measured_trace([MeasuredSpan(0, "compute", "mm", "gemm", 5, 4)])


def kernel(**arguments):
    """A kernel of NCCL with some arguments, or without them, as a file of its own."""
    named = {key.replace("_", " "): value for key, value in arguments.items()}
    return {"ph": "X", "cat": "kernel", "name": NCCL, "pid": 0, "tid": 7, "ts": 5, "dur": 1, "args": named}


OF_EVENTS = [
    *({**kernel(), key: value} for key, values in {
        "ts": (None, "5", True, math.nan, math.inf, 10**400), "dur": (None, [1], -2, math.inf, 1e300),
        "pid": ([1], None), "tid": ([1], {}), "name": (None, 5), "cat": (5,),
    }.items() for value in values),
    *(kernel(**{key: value}) for key, values in {
        "correlation": ([8], None, True), "stream": ([7],), "device": ([0],), "External id": ([1], {}),
    }.items() for value in values),
    *(kernel(**call("allreduce", 4, **{key: value})) for key, values in {
        "In_msg_nelems": (None, "abc", -1, 10**30, 1.5, True), "Process_Group_Name": ([3],),
        "Process_Group_Ranks": ("5", "[null]", "x", 5, None, [-1]), "Group_size": ("2", None),
        "dtype": ([1],), "Collective_name": (None,),
        "Process_Group_Description": ({},),
    }.items() for value in values),
]  # fmt: skip
"""Events of which one value is of the wrong kind."""


@pytest.mark.parametrize("wrong", OF_EVENTS, ids=lambda wrong: json.dumps(wrong)[60:160])
def test_a_value_of_the_wrong_kind_is_one_line_with_file_and_event(wrong, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [kernel(), wrong]}))
    with pytest.raises(InputError, match=r"trace.json: event 1 of traceEvents.* must be ") as problem:
        load_kineto_trace(path)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("key", ["Input Dims", "Input type"])
@pytest.mark.parametrize("value", [5, None, [[4, "8"], [4, 4]], [[10**9, 10**9]], [[[[[[1]]]]]], "[]", [5], {}])
def test_shapes_of_the_wrong_kind(key, value, tmp_path):
    """On the host, where the sizes of collectives are read from shapes."""
    arguments = {"Input Dims": [[4]], "Input type": ["float"]} | {key: value}
    reduced = event("c10d::allreduce_", "cpu_op", 0, 9) | {"args": arguments}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [reduced]}))
    with pytest.raises(InputError, match=rf"trace.json: event 0 .*'c10d::allreduce_'.*'{key}' is .* must be "):
        load_kineto_trace(path)


@pytest.mark.parametrize(
    "head",
    [
        {"distributedInfo": [1]}, {"distributedInfo": {"rank": "x"}}, {"distributedInfo": {"rank": -1}},
        {"distributedInfo": {"world_size": None}}, {"distributedInfo": {"pg_config": 5}},
        {"distributedInfo": {"pg_config": [5]}}, {"distributedInfo": {"pg_config": [{"ranks": 5}]}},
        {"distributedInfo": {"pg_config": [{"ranks": [[0], [1]]}]}}, {"baseTimeNanoseconds": "now"},
        {"baseTimeNanoseconds": 1.5},
    ],
)  # fmt: skip
def test_a_head_of_the_wrong_kind(head, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [kernel()], **head}))
    with pytest.raises(InputError, match=r"trace.json: .*(must be|is no process group)"):
        load_kineto_trace(path)


def test_clocks_of_different_days(tmp_path):
    """A file without its base time beside one with it; picoseconds of fifty years do not fit in 64 bits."""
    paths = []
    for rank, base in ((0, 0), (1, BASE_NS)):
        paths.append(tmp_path / f"{rank}.json")
        head = {"baseTimeNanoseconds": base, "distributedInfo": {"rank": rank}}
        paths[-1].write_text(json.dumps({**head, "traceEvents": [kernel()]}))
    with pytest.raises(InputError, match="more than a hundred days"):
        load_kineto_trace(paths)
    paths[0].write_text(json.dumps({"traceEvents": [kernel(), {**kernel(), "ts": BASE_NS / 1000}]}))
    with pytest.raises(InputError, match=r"0.json: 'all_reduce' ends 1.7e\+15 us after the first event"):
        load_kineto_trace(paths[0])


def test_no_file_without_end_is_read(tmp_path, monkeypatch):
    """Devices, pipes and directories are no files; what is inflated has a limit."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match=f"{path}: is not a regular file"):
            load_kineto_trace(path)
    monkeypatch.setattr("spsim.pytorch.kineto.profile.MAX_BYTES", 2**24)
    packed = tmp_path / "large.json.gz"
    packed.write_bytes(gzip.compress(b" " * 2**25))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"large.json.gz: holds more than 0.0156 GiB"):
        load_kineto_trace(packed)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


# ------------------------------------------------------------ other versions and devices


def loaded(tmp_path, events, **head):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events, **head}))
    return load_kineto_trace(path)


def passes(trace):
    """Phase, number and names of the kernels of each pass."""
    found = {}
    for info in trace.tasks:
        found.setdefault((info.part, info.micro_batch), []).append(info.name)
    return found


def step(start, number, *between, engine=2):
    """One kernel of each phase from `start` on, and further events."""
    first = 10 * number
    return [
        *launched("forward", start + 10, start + 15, 10, correlation=first),
        event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", start + 30, 10, thread=engine),
        *launched("backward", start + 32, start + 40, 10, correlation=first + 1, thread=engine),
        *between,
        event("Optimizer.step#SGD.step", "user_annotation", start + 70, 10),
        *launched("step", start + 72, start + 80, 10, correlation=first + 2),
    ]


COPY = "Memcpy DtoD (Device -> Device)"


def steps(*between, count=3, **more):
    """Some steps with something of their own in each; `between` takes the start and a correlation."""
    return [
        e for n in range(count) for e in step(100 * n, n, *(x for b in between for x in b(100 * n, 10 * n)), **more)
    ]


@pytest.mark.parametrize(
    ("name", "engine"),
    [("aten::copy_", 2), *(("torch.distributed.ddp.reducer::copy_bucket_to_grad", thread) for thread in (1, 2))],
)
def test_what_ddp_copies_after_the_last_gradient_is_backward(name, engine, tmp_path):
    """On a thread of autograd's engine whatever it is called; else, as on a CPU, by the reducer's name."""

    def copied(start, first):
        yield event(name, "cpu_op", start + 45, 10, thread=engine)
        yield from launched("copy_kernel", start + 50, start + 55, 5, correlation=first + 5, thread=engine)

    events = [*steps(copied, engine=engine), event("aten::mm", "cpu_op", 8, 10), event("aten::mm", "cpu_op", 108, 10)]
    trace = loaded(tmp_path, events)
    expected = {"forward": ["forward"], "backward": ["backward", "copy_kernel"], "optimizer": ["step"]}
    assert passes(trace) == {(phase, n): names for phase, names in expected.items() for n in range(3)}


def test_what_was_launched_before_the_recording_cuts_no_pass(tmp_path):
    """Kernels without a launch belong to the first pass; later ones follow the kernel before them on their stream."""
    early = [e for n in range(5) for e in launched("early", 0, 1 + 2 * n, 2, correlation=900 + n)[1:]]
    other = [e for n in range(5) for e in launched("early", 0, 20 * n, 9, correlation=910 + n, stream=9)[1:]]
    last = launched("known", 95, 98, 2, correlation=920, stream=9)
    late = launched("lost", 0, 150, 2, correlation=930)[1:]
    trace = loaded(tmp_path, [*steps(), *early, *other, *last, *late])
    found = passes(trace)
    assert Counter(phase for phase, _ in found) == {"forward": 3, "backward": 3, "optimizer": 3}
    assert found["backward", 1] == ["backward", "lost"]
    assert found["forward", 0].count("early") == 10


def test_copies_and_cleared_gradients_make_no_pass(tmp_path):
    """A loss read back after the step, inputs copied by another thread meanwhile, gradients set to zero at the end."""

    def copied(start, first):
        for at, correlation, thread in ((35, 5, 3), (90, 6, 1)):
            yield event(
                "cudaMemcpyAsync", "cuda_runtime", start + at, 1, thread=thread, correlation=first + correlation
            )
            yield {
                **launched("Memcpy DtoH", 0, start + at + 3, 2, correlation=first + correlation)[1],
                "cat": "gpu_memcpy",
            }
        yield event("Optimizer.zero_grad#SGD.zero_grad", "user_annotation", start + 92, 5)
        yield from launched("fill", start + 93, start + 95, 2, correlation=first + 7)

    assert Counter(phase for phase, _ in passes(loaded(tmp_path, steps(copied)))) == {
        "forward": 3, "backward": 3, "optimizer": 3,
    }  # fmt: skip


def test_backward_before_torch_1_10(tmp_path):
    """Nothing encloses `MmBackward`, and hooks run beside it; categories, names and threads are of another form."""

    def renamed(one):
        former = {"cpu_op": "Operator", "user_annotation": "Operator", "cuda_runtime": "Runtime", "kernel": "Kernel"}
        arguments = one["args"] | {"external id": 4}
        name = one["name"].replace("autograd::engine::evaluate_function: MmBackward0", "MmBackward")
        return {**one, "cat": former[one["cat"]], "name": name, "tid": str(one["tid"]), "args": arguments}

    operators = [event("aten::mm", "cpu_op", 8 + 100 * n, 4, thread=1) for n in range(3)]
    hooks = [event("aten::mul", "cpu_op", 41 + 100 * n, 2, thread=2) for n in range(2)]
    found = passes(loaded(tmp_path, [renamed(e) for e in (*operators, *hooks, *steps())]))
    assert Counter(phase for phase, _ in found) == {"forward": 3, "backward": 3, "optimizer": 3}
    assert passes(loaded(tmp_path, [renamed(event("aten::mm", "cpu_op", 0, 5))])) == {("forward", 0): ["mm"]}


@pytest.mark.parametrize(
    ("runtime", "work", "arguments"),
    [
        ("xpu_runtime", "kernel", {}), ("xpu_driver", "kernel", {}), ("musa_runtime", "kernel", {}),
        ("mtia_runtime", "mtia_ccp_events", {}), ("privateuse1_driver", "kernel", {}),
        ("npu_runtime", "npu_kernel", {"stream": 3}), ("tpu_runtime", "tpu_op", {}),
        ("tpu_call", "tpu_op", {"device": 0}),
    ],
)  # fmt: skip
def test_devices_by_other_names(runtime, work, arguments, tmp_path):
    """Whatever the categories of calls and work are called, phases follow from the calls, and nothing is lost."""
    others = {"cuda_runtime": runtime, "kernel": work}
    events = [{**e, "cat": others.get(e["cat"], e["cat"])} for e in steps(count=1)]
    for one in events:
        one["args"].pop("stream", None)
        one["args"] |= arguments if one["cat"] == work else {}
    found = passes(loaded(tmp_path, events))
    assert found == {("forward", 0): ["forward"], ("backward", 0): ["backward"], ("optimizer", 0): ["step"]}


def test_what_frames_or_awaits_work_is_none(tmp_path):
    framing = [
        event(name, category, 0, 500, stream=7, correlation=3)
        for name, category in (
            ("Optimizer.step", "gpu_user_annotation"), ("Stream Sync", "cuda_sync"), ("event_wait", "mtia_ccp_events"),
            ("range", "cuda_profiler_range"), ("Optimizer.step", "mlu_user_annotation"), ("a", "gcu_sync"),
            ("b", "mlu_notifier"), ("c", "hardware_counters"), ("d", "xpu_scope_profiler"), ("e", "cpu_op"),
        )
    ]  # fmt: skip
    assert {info.name for info in loaded(tmp_path, [*steps(), *framing]).tasks} == {"forward", "backward", "step"}


SEND = "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)"
GATHER = "ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclWorkElem)"


@pytest.mark.parametrize(
    ("name", "annotation", "operator", "kind", "message_bytes"),
    [
        (SEND, ("nccl:all_to_all", [[6144]]), None, "all_to_all", 4 * 6144),
        (SEND, ("nccl:all_to_all", [[3, 2], [5, 2]]), None, "all_to_all", 4 * 16),
        (SEND, ("nccl:all_to_all", [[4]]), ("c10d::alltoall_base_", [[6], [4], [], []]), "all_to_all", 4 * 6),
        (SEND, ("nccl:send 0->1", [[5]]), None, "send_receive", 4 * 5),
        (SEND, ("nccl:coalesced", []), ("c10d::alltoall_", [[[3], [4]], [[3], [5]]]), "all_to_all", 4 * 8),
        (NCCL, ("nccl:all_reduce", [[2, 8]]), ("c10d::allreduce_", [[], []]), "all_reduce", 4 * 16),
        (NCCL, ("nccl:_reduce_scatter_base", [[8]]), ("c10d::_reduce_scatter_base_", [[1], [8]]), "reduce_scatter", 32),
        (GATHER, ("nccl:_all_gather_base", [[5]]), ("c10d::_allgather_base_", [[40], [5], []]), "all_gather", 4 * 40),
        (GATHER, ("nccl:all_gather", [[5]]), None, "all_gather", 4 * 5 * 8),
        (SEND, None, None, "send_receive", 0),
        (NCCL, ("nccl:all_reduce", None), None, "all_reduce", 0),
    ],
)  # fmt: skip
def test_collectives_before_torch_2_3(name, annotation, operator, kind, message_bytes, tmp_path):
    """By the annotation and the operator that the launch lies in, of fp32; the run has 8 ranks."""
    around = []
    for (called, dims), category in ((annotation or ("", None), "user_annotation"), (operator or ("", None), "cpu_op")):
        shapes = {} if dims is None else {"Input_Dims": dims, "Input_type": ["TensorList", "float"]}
        around += [event(called, category, 10, 60, **shapes)] if called else []
    other = event("nccl:all_gather", "user_annotation", 0, 9, Input_Dims=[[1000]], Input_type=["float"])
    trace = loaded(tmp_path, [other, *around, *launched(name, 30, 100, 50, correlation=1)],
                   distributedInfo={"rank": 0, "world_size": 8})  # fmt: skip
    (info,) = trace.tasks
    assert (info.collective, info.message_bytes) == (kind, message_bytes)


@pytest.mark.parametrize(
    ("name", "hides"),
    [
        (COPY, True), ("CopyDeviceToDevice", True), ("Memcpy HtoD (Pinned -> Device)", False),
        ("Memcpy DtoH (Device -> Pageable)", False), ("Memcpy PtoP (Device -> Device)", False),
        ("CopyHostToDevice", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("category", ["gpu_memcpy", "Memcpy", "mlu_memcpy"])
def test_copies_from_and_to_the_host_hide_nothing(category, name, hides, tmp_path):
    """30 us of a transfer of 100 us are under a copy: work of the device only where it stays there."""
    copied = {**launched(name, 0, 50, 30, correlation=2)[1], "cat": category}
    trace = loaded(tmp_path, [*launched(NCCL, 0, 10, 100, correlation=1, stream=20, **call("allreduce", 8)), copied])
    assert metrics.exposed_communication(trace) == {0: (70 if hides else 100) * PS_PER_US}
    assert {info.operator_class for info in trace.tasks} == {"communication", "copy"}


# ------------------------------------------------------------ the command


def run_trace(*arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trace", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_the_summary_of_a_trace(tmp_path, capsys):
    """Two steps of two ranks, worked out by hand: 10 us of each kernel, and an all-reduce under half of a copy."""

    def reduced(start, first):
        reducing = {"Collective_name": "allreduce", "In_msg_nelems": 6, "Out_msg_nelems": 6, "dtype": "Float"}
        yield from launched(NCCL, start + 33, start + 50, 8, correlation=first + 4, stream=20, **reducing)
        yield {**launched(COPY, 0, start + 54, 4, correlation=first + 5)[1], "cat": "gpu_memcpy"}

    paths = []
    for rank in (0, 1):
        paths.append(tmp_path / f"rank{rank}.json")
        events = [
            {**e, "name": GEMM if e["name"] in ("forward", "backward") else e["name"]} for e in steps(reduced, count=2)
        ]
        paths[-1].write_text(json.dumps({"traceEvents": events, "distributedInfo": {"rank": rank}}))
    assert run_trace(*paths, "--json", "--out", tmp_path / "out", capsys=capsys)[0] == 0
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document == {
        "ranks": 2,
        "passes": {"forward": 2, "backward": 2, "optimizer": 2},
        "time_us_by_class": {"gemm": 80, "other": 40, "communication": 32, "copy": 16},
        "collectives": [{"collective": "all_reduce", "message_bytes": 24, "count": 2}],
        "exposed_communication_us": {"0": 8, "1": 8},
    }
    assert (tmp_path / "out" / "timeline.png").stat().st_size > 10_000


def test_names_are_shown_as_they_are(tmp_path, capsys):
    """A dollar is no mathematics; what a terminal would obey, and halves of letters, are written out."""
    path = tmp_path / "$x^$\x1b.json"
    names = ("$x^$", "a\x1b[31m\n", "\ud800")
    events = [launched(f"nccl{name}", 0, 100 * n, 90, correlation=n)[1] for n, name in enumerate(names)]
    described = call("allreduce", 4, Process_Group_Description="$x^$\x1b")
    events += launched(NCCL, 0, 300, 90, correlation=9, **described)
    path.write_text(json.dumps({"traceEvents": [*events, *launched("$x^$", 0, 400, 90, correlation=10)]}))
    code, out, _ = run_trace(path, "--out", tmp_path, capsys=capsys)
    assert code == 0
    assert r"nccla\x1b[31m\n" in out
    assert r"nccl\ud800" in out
    assert "\x1b" not in out


def test_the_command_in_words(tmp_path, capsys):
    """Kinds of passes that do not occur are left out; what is not recorded is said; the same bytes twice are one."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": [*launched(SEND, 0, 5, 10, correlation=1)]}))
    code, out, _ = run_trace(path, capsys=capsys)
    assert code == 0
    assert "measured run of one rank: 1 forward passes\n" in out
    assert re.search(r"send-receive +not recorded +1", out)
    assert "exposed communication, rank 0: 10.0 us" in out
    code, out, err = run_trace(tmp_path / "missing.json", "--json", capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {tmp_path / 'missing.json'}: cannot be read")
