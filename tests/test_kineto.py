"""Traces of torch.profiler: files written by hand with known intervals, and one that torch really wrote."""

import gzip
import json
from collections import Counter
from itertools import pairwise

import pytest

import spsim
from spsim import MeasuredSpan, load_kineto_trace, measured_trace, plots
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
    """What autograd's engine launched is backward, what an optimizer launched its own, whenever it ran."""
    assert rows(gpu_trace, rank=0, part="backward") == [(GEMM, 130, 180)]
    assert rows(gpu_trace, rank=0, part="optimizer") == [("multi_tensor_apply_kernel", 205, 210)]
    assert rows(gpu_trace, rank=0, part="forward", micro_batch=1) == [("mystery", 200, 205)]


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
        (b"{\"traceEvents\": [{\"ph\": \"X\", \"name\": \"a\"}]}", "is not as torch.profiler writes it"),
        (b"{\"traceEvents\": [3]}", "is not as torch.profiler writes it"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": NaN, "dur": 1}]}', "'a' has ts nan; times must be finite"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 0, "dur": Infinity}]}', "'a' has dur inf"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 0, "dur": -2}]}', "dur -2.0; .* must not be negative"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 0}]}', r"KeyError\('dur'\)"),
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
