"""What holds for every plan: order, lanes, memory, bounds on times. Plans, models and shapes are random."""

from collections import defaultdict
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.results.metrics import exposed_communication
from spsim.units import PS_PER_S
from tests.cases import random_scenarios, result

pytestmark = pytest.mark.slow

LAYERS, MICRO_BATCHES = 2, 2


def runs(fold=None):
    """Random runs of two layers and two micro-batches, folded or not unless it is given."""
    return random_scenarios(fold=st.booleans() if fold is None else fold, layers=LAYERS, micro_batches=MICRO_BATCHES)


random_runs = settings(max_examples=40, deadline=None, derandomize=True)


def spans_by_rank(found):
    """{rank: {task: span}}."""
    ranks = defaultdict(dict)
    for span in found.trace.spans:
        ranks[span.rank][span.task] = span
    return ranks


def instances(program):
    """(layer, steps) of each pass in the order of issue: forward up the layers, backward down."""
    for _ in range(MICRO_BATCHES):
        yield from ((layer, program.forward) for layer in range(LAYERS))
        yield from ((layer, program.backward) for layer in reversed(range(LAYERS)))


def data_dependencies(program):
    """(writer, reader) tasks, derived from what the steps read and write; tasks are numbered in issue order.

    Between layers the output of one is the input of the next, and gradients return.
    """
    first = 0
    written = {}
    for layer, steps in instances(program):
        if layer > 0 and steps is program.forward:
            written[layer, program.inputs[0].id] = written[layer - 1, program.outputs[0].id]
        if layer < LAYERS - 1 and steps is program.backward:
            written[layer, program.output_gradients[0].id] = written[layer + 1, program.input_gradients[0].id]
        for task, step in enumerate(steps, first):
            for buffer in step.reads:
                if (layer, buffer) in written:
                    yield written[layer, buffer], task
            for buffer in step.writes:
                written[layer, buffer.id] = task
        first += len(steps)
        if layer == 0 and steps is program.backward:
            written.clear()


@random_runs
@given(runs())
def test_tasks_start_after_what_they_read_was_written(run):
    """On every rank, from the program's buffers alone."""
    found = result(**run)
    dependencies = set(data_dependencies(found.program))
    assert len(dependencies) > len(found.program.instructions)
    for spans in spans_by_rank(found).values():
        assert all(spans[writer].end_ps <= spans[reader].posted_ps for writer, reader in dependencies)


@random_runs
@given(runs())
def test_a_lane_runs_one_task_at_a_time_in_order(run):
    """A task is posted after the one before it on its lane has ended; work starts after posting."""
    found = result(**run)
    for spans in spans_by_rank(found).values():
        lanes = defaultdict(list)
        for task in sorted(spans):
            lanes[spans[task].lane].append(spans[task])
        assert sum(map(len, lanes.values())) == len(found.trace.tasks)
        for lane in lanes.values():
            assert all(span.posted_ps <= span.start_ps <= span.end_ps for span in lane)
            assert all(before.end_ps <= after.posted_ps for before, after in pairwise(lane))


@random_runs
@given(runs(fold=st.just(False)))
def test_a_collective_starts_together_after_the_last_of_its_group(run):
    """All ranks of a group start when the last was posted, and end together."""
    found = result(**run)
    ranks = spans_by_rank(found)
    for task, info in enumerate(found.trace.tasks):
        if info.collective and info.collective != "send_receive":
            for rank, group in found.trace.groups[info.axis].items():
                spans = [ranks[member][task] for member in group]
                assert ranks[rank][task].start_ps == max(span.posted_ps for span in spans)
                assert len({span.end_ps for span in spans}) == 1


@random_runs
@given(runs())
def test_memory_is_never_negative_and_returns_to_zero(run):
    """In the order of events, in every category, on every rank; a task takes memory before it gives any back."""
    found = result(**run)
    held = defaultdict(int)
    for change in sorted(found.trace.memory, key=lambda c: (c.time_ps, c.task, c.bytes < 0)):
        held[change.rank, change.category] += change.bytes
        assert held[change.rank, change.category] >= 0
    assert held
    assert set(held.values()) == {0}
    curve = found.memory_curve
    assert (curve.filter(like="_gib") >= 0).all(axis=None)
    assert curve["total_gib"].max() == pytest.approx(found.peak_memory_gib)


@random_runs
@given(runs())
def test_memory_lives_from_its_writer_to_its_last_reader(run):
    """What a task allocates appears when it is posted, and every freeing is the end of a task."""
    found = result(**run)
    ranks = spans_by_rank(found)
    for change in found.trace.memory:
        span = ranks[change.rank][change.task]
        assert change.time_ps == (span.posted_ps if change.bytes > 0 else span.end_ps)


@random_runs
@given(runs())
def test_times_are_bounded_by_the_step(run):
    """The busiest lane, the windows of a layer, and exposed communication with compute fit in the step."""
    found = result(**run)
    step = found.step_time_s
    work = defaultdict(int)
    for span in found.trace.spans:
        work[span.rank, span.lane] += span.end_ps - span.start_ps
    assert step * PS_PER_S >= max(work.values()) * (1 - 1e-12)
    assert 0 < found.layer_forward_s < step
    assert 0 < found.layer_backward_s < step
    assert found.layer_forward_s + found.layer_backward_s + found.weight_sync_s <= step
    assert 0 <= found.exposed_comm_s <= step
    for rank, exposed in exposed_communication(found.trace).items():
        assert exposed + work[rank, "compute"] <= found.trace.end_ps


@random_runs
@given(runs())
def test_utilisation_is_below_one_and_consistent(run):
    """Hardware FLOPs are at least model FLOPs; a causal count is at most the full one."""
    found = result(**run)
    rounding = 1 + 1e-12
    assert 0 < found.mfu_causal <= found.mfu * rounding
    assert found.mfu <= found.hfu * rounding
    assert found.mfu_causal < 1


@random_runs
@given(runs())
def test_peak_memory_is_the_largest_sum(run):
    """Over all instants, the sum of all changes up to and at that instant: frees count before allocations."""
    found = result(**run)
    fullest = 0
    for rank in found.trace.copies:
        at = defaultdict(int)
        for change in found.trace.memory:
            at[change.time_ps] += change.bytes if change.rank == rank else 0
        fullest = max(fullest, *accumulate(at[time] for time in sorted(at)))
    assert found.peak.bytes == found.static.total + fullest


@pytest.mark.parametrize("plan", ["", "tp=4", "ulysses=2,ring=2,recompute=full"])
def test_rates_follow_from_the_published_flops(plan):
    """Per layer and micro-batch 3 (24 s b h^2 + 4 s^2 b h) (Korthikanti et al. 2022, appendix A), 4 forward
    passes instead of 3 in hardware FLOPs under full recomputation, half of the square under a causal mask.
    """
    s, b, h, layers, micro_batches = 512, 2, 256, 3, 4
    found = result(plan, seq_len=s, micro_batch=b, layers=layers, global_batch=b * micro_batches)
    linear, square = 24 * s * b * h**2, 4 * s**2 * b * h
    rate = layers * micro_batches / found.step_time_s / found.scenario.plan.gpus
    assert found.tflops_per_gpu == pytest.approx(3 * (linear + square) * rate / 1e12)
    assert found.mfu == pytest.approx(3 * (linear + square) * rate / 312e12)
    assert found.mfu_causal == pytest.approx(3 * (linear + square / 2) * rate / 312e12)
    assert found.hfu == pytest.approx((4 if "full" in plan else 3) * (linear + square) * rate / 312e12)
    tokens = s * b * micro_batches / found.step_time_s / found.scenario.plan.gpus
    assert found.tokens_per_s_per_gpu == pytest.approx(tokens)


@pytest.mark.parametrize("plan", ["tp=4", "tp=4,sequence_parallel", "tp=8,recompute=full"])
def test_without_overlap_compute_and_communication_take_turns(plan):
    """The step is the sum of all kernels and all collectives; all communication is exposed."""
    found = result(f"{plan},tp_backward_overlap=false")
    assert found.trace.end_ps == sum(span.end_ps - span.start_ps for span in found.trace.spans)


@pytest.mark.parametrize(("plan", "collective"), [("tp=4", "all_reduce"), ("tp=4,sequence_parallel", "reduce_scatter")])
def test_gradients_of_column_parallel_inputs_move_behind_the_weight_gradient(plan, collective):
    """Each of the 2 a layer is posted when a weight gradient starts: after the data gradient, and after the
    re-gather that both wait for under sequence parallelism.
    """
    found = result(plan)
    tasks = found.trace.tasks
    spans = found.trace.spans
    starts = {s.start_ps for s in spans if tasks[s.task].part == "wgrad" and tasks[s.task].name in ("qkv", "fc1")}
    moved = [s for s in spans if tasks[s.task].purpose == "gradient" and tasks[s.task].collective == collective]
    assert len(moved) == 2 * LAYERS
    assert all(span.posted_ps in starts for span in moved)


def test_ulysses_exchanges_hold_up_the_next_kernel():
    """By hand, one layer with rotary embeddings: each exchange is posted when its tensor is ready and its lane free,
    behind kernels that stand before it, and the kernel that stands after it starts when it ends, whatever it reads.
    """
    spans = result("ulysses=4", layers=1, seq_len=4096, gated_mlp=True, ffn_hidden=704).spans
    first = spans[spans["rank"] == 0].set_index(["name", "part"])
    kernels = first[first["lane"] == "compute"]
    start, end = kernels["start_us"], kernels["end_us"]
    exchanges = first[first["lane"] == "ulysses"]
    posted, done = exchanges["posted_us"].tolist(), exchanges["end_us"].tolist()
    query, key, value, output, *backward = range(8)
    output_gradient, query_gradient, key_gradient, value_gradient = backward
    assert posted == [
        end["rope_q", "forward"],
        done[query],
        done[key],
        end["attention", "forward"],
        end["projection", "dgrad"],
        end["attention", "backward"],
        done[query_gradient],
        done[key_gradient],
    ]
    assert start["attention", "forward"] == done[value] > end["rope_k", "forward"]
    assert start["projection", "forward"] == done[output]
    assert start["attention", "backward"] == done[output_gradient] > end["projection", "wgrad"]
    assert start["rope_k", "backward"] == done[value_gradient] > done[key_gradient]
    assert start["rope_k", "forward"] == posted[query]
    assert start["projection", "wgrad"] == posted[output_gradient]


def test_what_fits_is_the_memory_of_the_device():
    """Context, communicators and reserve count: tensors alone would fit below."""
    found = result("tp=8,sequence_parallel", layers=162, hidden=4096, heads=32, seq_len=4096)
    assert found.static.total / 2**30 < found.peak_memory_gib < found.capacity_gib < found.device_memory_gib
    assert not found.fits
    assert found.out_of_memory_at.endswith("of layer 152")
    assert result("tp=8,sequence_parallel", layers=150, hidden=4096, heads=32, seq_len=4096).fits


SCALED = [
    "",
    "tp=4",
    "tp=4,sequence_parallel",
    "ulysses=4",
    "ring=4",
    "ring=4,ring_cut=contiguous",
    "tp=2,sequence_parallel,ulysses=2,ring=2",
]


@pytest.mark.parametrize("plan", SCALED)
def test_micro_batches_scale_the_step(plan):
    """Each costs the same once the first has set the lanes; the synchronisation comes once."""
    found = {n: result(plan, global_batch=n, seq_len=2048) for n in (1, 2, 3, 6)}
    step = {n: found[n].step_time_s for n in found}
    one = step[3] - step[2]
    assert step[2] - step[1] == pytest.approx(one, rel=1e-6)
    assert step[6] - step[1] == pytest.approx(5 * one, rel=1e-6)
    once = step[1] - one
    assert -1e-6 * one <= once <= found[1].weight_sync_s + 1e-6 * one
    assert found[6].weight_sync_s == pytest.approx(found[1].weight_sync_s, rel=1e-6)


@pytest.mark.parametrize("plan", SCALED)
def test_layers_scale_the_step(plan):
    """Every layer between the first and the last costs the same."""
    found = {n: result(plan, layers=n, seq_len=2048) for n in (2, 3, 4)}
    work = {n: found[n].step_time_s - found[n].weight_sync_s for n in found}
    assert work[4] - work[3] == pytest.approx(work[3] - work[2], rel=1e-6)
    assert work[3] - work[2] < found[2].layer_forward_s + found[2].layer_backward_s + 1e-9


@pytest.mark.parametrize("plan", ["", "tp=2", "tp=8"])
@pytest.mark.parametrize("name", ["seq_len", "micro_batch", "hidden"])
def test_more_work_takes_longer(plan, name):
    """Forward, backward and step grow with the sequence, the batch and the width, on one GPU and under tp."""
    base = {"seq_len": 256, "micro_batch": 1, "hidden": 256}
    grown = [result(plan, **{**base, name: base[name] * factor}) for factor in (1, 2, 3, 4, 8, 16)]
    for times in (
        [found.layer_forward_s for found in grown],
        [found.layer_backward_s for found in grown],
        [found.step_time_s for found in grown],
        [found.peak_memory_gib for found in grown],
    ):
        assert all(less < more for less, more in pairwise(times))


@pytest.mark.parametrize(("strategy", "other"), [("tp=8", "tp=4"), ("ulysses=8", "ulysses=4"), ("ring=8", "ring=4")])
def test_more_ranks_compute_less_each(strategy, other):
    """Compute on the busiest rank falls as the degree doubles, on a shape that fills the device."""

    def compute(plan):
        found = result(plan, seq_len=16384, hidden=4096, heads=32)
        spans = found.spans
        return spans[spans["lane"] == "compute"].groupby("rank")["duration_us"].sum().max()

    assert compute(strategy) < compute(other) < compute("")
