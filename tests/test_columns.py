"""Many workloads at once are, to the bit, what the engine finds one by one; and what that does not cover falls back."""

from collections import defaultdict
from dataclasses import replace
from random import Random

import numpy as np
import pandas as pd
import pytest

from spsim import Point, Scenario, load_profile, simulate, sweep
from spsim.costs.collectives import CommCost
from spsim.engine.engine import Meeting, RankProgram, Task
from spsim.engine.recording import BufferUse, TaskInfo
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.program.instructions import LAYER
from spsim.results import metrics
from spsim.simulation import simulate_many
from spsim.step.columns.order import covered
from spsim.step.columns.step import BlockColumns
from spsim.step.folding import Step, fold_step
from spsim.step.itinerary import Run, accumulation
from spsim.step.segments import BlockPass, Call, Part, Segment
from spsim.studies.rows import row
from tests.cases import A100, DEGREES, H100, model

pytestmark = pytest.mark.slow

MANY = 12
"""Workloads of a synthetic block."""


# ------------------------------------------------------------ collectives


@pytest.mark.parametrize("hardware", [H100, A100, "mi300x-8", "gb200-nvl72", "l40s-8"])
def test_collectives_of_many_messages_are_those_of_each(hardware):
    rng, cost, compared = Random(hardware), CommCost(load_profile(hardware)), 0
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"):
        for ranks, nodes in ((2, 1), (8, 1), (4, 2), (16, 2), (16, 16), (24, 3), (64, 8)):
            messages = [rng.choice([1, 1000, 2 ** rng.randint(0, 40), rng.randint(1, 2**36)]) for _ in range(40)]
            try:
                one_by_one = [cost.duration(collective, message, ranks, nodes) for message in messages]
            except (InputError, ValueError):
                continue
            assert cost.duration(collective, np.array(messages), ranks, nodes).tolist() == one_by_one
            compared += 1
    assert compared >= 5


# ------------------------------------------------------------ synthetic blocks


class Block:
    """A random block of a forward and a backward pass, each of up to three segments, one of which runs often."""

    def __init__(self, seed):
        self.rng = Random(seed)
        self.coefficients = np.array([[self.rng.choice([0, 1, 7, 100]) for _ in range(6)] for _ in range(5)], float)
        self.coefficients[:, 0] += 1
        self.slots, self.positions, self.count = {}, {}, 1
        self.passes = {phase: self._pass(phase) for phase in ("forward", "backward")}
        self.segments = [part.segment for own in self.passes.values() for part in own.parts]
        shape = (self.count, MANY)
        longest = self.rng.choice([20, 1000, 1000, 10**9, 10**13])
        zeros = self.rng.choice([0, 0, 0, 0.02])
        self.times = np.array(
            [self.rng.randint(self.rng.random() >= zeros, longest) for _ in range(self.count * MANY)]
        ).reshape(shape)
        slow = self.rng.choice([1, 1, 3, 10])
        for segment in self.segments:
            for call in segment.calls:
                self.times[self.slots[segment.name][call]] *= slow
        largest = self.rng.choice([30] * 9 + [10**14])
        self.basis = np.array([[1] + [self.rng.randint(1, largest) for _ in range(5)] for _ in range(MANY)], float).T
        self.slowdown = self.rng.choice([0.0, 0.12, 0.5, 0.740001])

    def _pass(self, phase):
        runs = [1] if self.rng.random() < 0.3 else [1, self.rng.randint(2, 9), 1]
        parts = []
        for index, count in enumerate(runs):
            parts.append(Part(self._segment(phase, index, last=index == len(runs) - 1), count))
        entry, result = parts[0].segment.buffers[0], parts[-1].segment.buffers[-1]
        assert entry.writer is None
        return BlockPass(tuple(parts), (0,), (len(parts[-1].segment.buffers) - 1,) if result.outlives else ())

    def _segment(self, phase, index, *, last):
        rng, name, tasks, calls = self.rng, f"{phase} {index}", [], {}
        lanes = rng.choice([["compute", "tp", "ring"], ["compute"] * 2 + ["tp", "ring"], ["compute", "ring", "ring"]])
        for task in range(rng.randint(2, 8)):
            lane = rng.choice(lanes) if task else "compute"
            needs = sorted(rng.sample(range(task), min(task, rng.randint(0, 2))))
            if index and rng.random() < 0.4:
                needs.append(f"{phase} arrival")
            tasks.append(Task(task, lane, needs=tuple(needs)))
        end = len(tasks)
        waited = range(end) if last and rng.random() < 0.9 else rng.sample(range(end), min(end, 2))
        names = (f"{phase} arrival",) if last and index else ()
        tasks.append(Task(end, "compute", needs=(*waited, *names)))
        tasks = [
            task if task.lane == "compute" else Task(task.id, task.lane, 0, task.needs, (Meeting((name, task.id), 1),))
            for task in tasks
        ]
        calls = {task.id: Call(("tp",)) for task in tasks if task.lane != "compute"}
        exports = {f"{phase} arrival": max(calls)} if calls and not last else {}
        labels = tuple(TaskInfo(f"{name} {task.id}", rng.choice(["gemm", "norm"]), phase) for task in tasks)
        buffers = [BufferUse("entry", "activations", None, (0,), False)]
        for writer in rng.sample(range(end + 1), rng.randint(1, end + 1)):
            readers = sorted(rng.sample(range(writer, end + 1), rng.randint(0, min(2, end + 1 - writer))))
            outlives = rng.random() < 0.2
            buffers.append(BufferUse(f"buffer {writer}", "activations", writer, tuple(readers), outlives))
        buffers.append(BufferUse("result", "activations", end, (), last))
        self.slots[name] = np.arange(self.count, self.count + len(tasks))
        self.count += len(tasks)
        largest = int(self.coefficients.sum(axis=1).argmax()) if rng.random() < 0.5 else rng.randrange(5)
        self.positions[name] = np.array([largest if use.writer in calls else rng.randrange(5) for use in buffers])
        joins = frozenset(rng.sample(["tp", "ring"], rng.randint(0, 2))) if last else frozenset()
        return Segment(name, phase, tuple(tasks), labels, calls, exports, joins, tuple(buffers), ())

    def columns(self, layers, micro_batches):
        """All workloads at once."""
        block = BlockColumns({LAYER: self.passes}, self.slots, self.positions, self.coefficients)
        return block, block.run([Run(LAYER, layers)], micro_batches, self.times, 0, 0, self.basis, self.slowdown)

    def trace(self, itinerary, point):
        """One workload by the engine."""
        sizes = (self.coefficients @ self.basis[:, point]).astype(int)
        walked = fold_step(
            Step(
                itinerary,
                {segment.name: {0: RankProgram(segment.tasks)} for segment in self.segments},
                {name: {0: self.times[slots, point].tolist()} for name, slots in self.slots.items()},
                {name: sizes[positions] for name, positions in self.positions.items()},
                self.slowdown,
            )
        )
        return Trace(walked.nodes, {0: (0,)}, lambda piece: (), overlapping=walked.overlapping)


def test_a_communication_with_a_share_of_its_own_is_left_to_the_engine():
    """Times of many workloads know one share for all; with it the same pass is covered."""
    block = next(block for seed in range(9) for block in Block(seed).passes.values() if block.parts[0].segment.calls)
    own, *others = block.parts
    tasks = tuple(task._replace(slowdown=0.3) if task.meetings else task for task in own.segment.tasks)
    changed = Part(replace(own.segment, tasks=tasks), own.runs)
    assert covered(block)
    assert not covered(BlockPass((changed, *others), block.entry, block.result))


def named(trace, task):
    """Label and layer of a task."""
    piece = trace.piece_of(task)
    return piece.recording.outline.labels[task - piece.first_task], piece.layer


def test_blocks_with_loops_run_as_in_the_engine():
    """Times, memory, its fullest task and the first that exceeds a limit; most blocks are covered."""
    exact = total = loops = 0
    for seed in range(250):
        made = Block(seed)
        rng, layers, micro_batches = Random(seed), 1 + seed % 4, np.array([1 + (seed + n) % 3 for n in range(MANY)])
        block, found = made.columns(layers, micro_batches)
        spots = found.memory.fullest()
        limits = np.array([float(rng.randint(0, int(found.memory.highest[n]))) for n in range(MANY)])
        above = found.memory.first_above(limits, found.memory.highest > limits)
        exactly = found.exact
        exact, total = exact + exactly.sum(), total + MANY
        loops += exactly.sum() * (len(made.segments) > 2)
        for point in np.flatnonzero(exactly).tolist():
            trace = made.trace(
                (accumulation({LAYER: made.passes}, [Run(LAYER, layers)], int(micro_batches[point])),), point
            )
            assert trace.end_ps == found.end[point]
            for phase in ("forward", "backward"):
                assert metrics.layer_window(trace, phase) == found.phases[phase][point]
            assert metrics.idle(trace)[0] == (found.exposed[point], 0, 0, 0)
            own = metrics.compute_by_class(trace, 0)
            assert {name: own.get(name, 0) for name in block.classes} == {n: t[point] for n, t in found.compute.items()}
            peak = metrics.peak_memory(trace, defaultdict(int))
            assert peak.bytes == found.memory.highest[point]
            leaf, layer, task = (int(column[point]) for column in spots)
            assert named(trace, peak.task) == (block.labels[leaf][task], layer)
            if limits[point] < peak.bytes:
                leaf, layer, task = (int(column[point]) for column in above)
                first = metrics.first_above(trace, 0, 0, int(limits[point]))
                assert named(trace, first) == (block.labels[leaf][task], layer)
    assert exact > 0.5 * total
    assert loops > 0.2 * total


# ------------------------------------------------------------ rows of sweeps


MANY_DEGREES = [(8, 1, 2), (4, 2, 2), (8, 2, 1), (2, 1, 8), (4, 1, 4), (1, 1, 16)]
"""Of several nodes."""


def random_settings(rng):
    """Hardware, model and plan of a random configuration, of one node or several, that simulates."""
    while True:
        many = rng.random() < 0.2
        tp, ulysses, ring = rng.choice(MANY_DEGREES if many else DEGREES)
        kind = rng.choice(["p2p", "p2p", "all_gather", "gather_permute"])
        own = {
            "layers": rng.choice([1, 2, 5]), "hidden": rng.choice([512, 4096]), "heads": 16,
            "kv_heads": rng.choice([1, 2, 4, 8, 16]), "gated_mlp": rng.random() < 0.5, "ffn_hidden": 2816,
            "attention": rng.choice(["flash", "unfused"]) if ring == 1 or kind == "all_gather" else "flash",
            "dropout": rng.choice([0.0, 0.1]), "causal": rng.random() < 0.8, "qk_norm": rng.random() < 0.2,
            "kernels": rng.choice([None, "eager", "compiled"]),
        }  # fmt: skip
        plan = {
            "tp": tp, "ulysses": ulysses, "ring": ring, "sequence_parallel": rng.random() < 0.6, "ring_kind": kind,
            "ring_cut": rng.choice(["zigzag", "zigzag", "contiguous"]), "keep_gathered": rng.random() < 0.3,
            "recompute": rng.choice(["none", "selective", "full"]), "tp_backward_overlap": rng.random() < 0.7,
            "distributed_optimizer": rng.random() < 0.4, "gathers_position_ids": rng.random() < 0.2,
            "ring_gradients": rng.choice(["model_dtype", "fp32"]),
            "ring_messages": rng.choice(["joint", "concatenated", "separate"]),
        }  # fmt: skip
        settings = {"hardware": rng.choice([A100, H100]), "model": model(**own), "plan": plan}
        try:
            Scenario(**settings, workload={"seq_len": 3072})
        except InputError:
            continue
        return settings


def random_workload(rng):
    """Sizes from a kernel that only starts to one that fills the memory many times."""
    micro_batch = rng.choice([1, 1, 2, 3, 4])
    sizes = {"seq_len": 3072 * rng.choice([1, 2, 5, rng.randint(1, 40), 341]), "micro_batch": micro_batch}
    return sizes | ({"global_batch": micro_batch * rng.choice([1, 2, 3, 7])} if rng.random() < 0.6 else {})


def assert_rows(points):
    """The frame of a sweep is that of the rows one by one."""
    pd.testing.assert_frame_equal(sweep(points), pd.DataFrame([row(point) for point in points]), check_exact=True)


def test_rows_are_those_of_one_workload_at_a_time():
    """Every column of 1,000 rows, of 90 plans; the columns cover all but rings whose ranks differ."""
    rng, covered = Random(7), 0
    for _ in range(90):
        settings = random_settings(rng)
        points = [Point({**settings, "workload": random_workload(rng)}) for _ in range(rng.randint(10, 13))]
        assert_rows(points)
        found = many_of(settings, [point.settings["workload"] for point in points])
        covered += 0 if found is None else found.exact.sum()
    assert covered > 800


@pytest.mark.parametrize("precision", ["fp8", "fp8_delayed"])
@pytest.mark.parametrize("plan", ["tp=8", "tp=4,sequence_parallel", "ulysses=2", "ring=4", "tp=2,recompute=full"])
def test_rows_of_products_in_fp8(plan, precision):
    """With casts, and tokens that no block divides, which are refused."""
    settings = {"hardware": H100, "model": "llama-3-8b", "plan": plan}
    sizes = [{"seq_len": n, "micro_batch": b} for n in (1024, 1032, 4096, 8192) for b in (1, 2, 3)]
    assert_rows([Point({**settings, "workload": {**size, "precision": precision}}) for size in sizes])
    found = many_of(settings, [{**size, "precision": precision} for size in sizes if size["seq_len"] % 1024 == 0])
    assert found.exact.all()
    assert (found.compute_ps["cast"] > 0).all()


def many_of(settings, workloads):
    """Their simulation at once."""
    scenario = Scenario(**settings, workload=workloads[0])
    return simulate_many(
        Grid.of(scenario, [(w["seq_len"], w["micro_batch"], w.get("global_batch")) for w in workloads])
    )


def test_figures_that_are_no_columns_are_equal_too():
    rng = Random(8)
    for _ in range(12):
        settings, workloads = random_settings(rng), [random_workload(rng) for _ in range(4)]
        found = many_of(settings, workloads)
        if found is None:
            continue
        for place, workload in enumerate(workloads):
            one = simulate(Scenario(**settings, workload=workload))
            for name in ("hfu", "mfu_causal", "tflops_per_gpu", "statistics_bytes_per_layer"):
                assert getattr(found, name)[place] == getattr(one, name)


def test_mixed_points_give_the_same_frame():
    """Several families in any order, with labels, errors of all sorts, and settings as text, tables and objects."""
    rng = Random(9)
    bad_sizes = [{"seq_len": 777}, {"seq_len": 0}, {"seq_len": 2**31}, {"seq_len": "long"}, {"seq_len": True}, {}]
    bad_sizes += [{"seq_len": 3072, "micro_batch": None}, {"seq_len": 3072, "micro_batch": 2, "global_batch": 3}]
    bad_sizes += [{"seq_len": 3072, "global_batch": 200_001}, {"seq_len": 3072, "width": 1}, {"seq_len": 3072.0}]
    bad_sizes += [{"seq_len": 3072, "phase": "decode"}, {"seq_len": 3072, "precision": ["bf16"]}, 4096, None]
    for _ in range(50):
        points = []
        for _ in range(rng.randint(1, 4)):
            settings = random_settings(rng)
            settings |= rng.choice(
                [{}, {}, {"plan": "tp=8"}, {"plan": "tp=7"}, {"plan": None}, {"nodes": 1}, {"nod": 1}]
            )
            settings |= rng.choice([{}, {}, {"model": "llama-3-8b"}, {"model": "llama"}, {"hardware": "dgx"}])
            labels = rng.choice(
                [{}, {"set": 1}, {"strategy": "mine", "share": 0.5}, {"seq_len": "short"}, {"ok": True}]
            )
            for _ in range(rng.randint(1, 9)):
                workload = rng.choice(bad_sizes) if rng.random() < 0.2 else random_workload(rng)
                own = {**settings, "plan": dict(settings["plan"])} if isinstance(settings["plan"], dict) else settings
                points.append(Point({**own, "workload": workload}, labels if rng.random() < 0.9 else {"set": 2.5}))
        rng.shuffle(points)
        assert_rows(points)


def test_what_the_columns_do_not_cover_is_simulated():
    """Ranks that differ, numbers without an exact float, and steps that overtake them: rows are equal nevertheless."""
    plans = ("ring=4,ring_cut=contiguous", "tp=8", "ring=8")
    sizes = ({"seq_len": 2**28, "micro_batch": 2**20}, {"seq_len": 2**20}, {"seq_len": 2**14, "global_batch": 90_000})
    points = [
        Point({"hardware": H100, "model": name, "plan": plan, "workload": size})
        for plan in plans
        for name in ("gpt-175b", "llama-3-70b")
        for size in (*sizes, {"seq_len": 2**14})
        if not (name.startswith("gpt") and plan.startswith("ring"))
    ]
    assert_rows(points)
    settings = {"hardware": H100, "model": "llama-3-70b", "plan": "ring=4,ring_cut=contiguous"}
    assert many_of(settings, [{"seq_len": 4096, "micro_batch": 1}]) is None
    huge = [{"seq_len": 4096}, {"seq_len": 2**28, "micro_batch": 2**20}, {"seq_len": 2**14, "global_batch": 90_000}]
    huge = [{"micro_batch": 1, **sizes} for sizes in huge]
    assert many_of(settings | {"plan": "tp=8"}, huge).exact.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "others",
    [
        [{"plan": {"tp": 1}}, {"plan": {"tp": True}}],
        [{}, {"plan": None}],
        [{"workload": {"seq_len": 256, "micro_batch": 2, "global_batch": n}} for n in range(1, 6)],
        [{}, {"nodes": 1}, {"nodes": True}, {"nodes": 2}],
        [
            {"workload": {"seq_len": 256, "precision": precision}}
            for precision in ("bf16", "fp32", "fp16", "fp8", "nvfp4")
        ],
        [{"hardware": hardware} for hardware in (H100, A100, load_profile(H100))],
        [{"model": model(layers=layers)} for layers in (2, 3)],
    ],
)
def test_what_differs_is_another_family(others):
    """Also where values are equal and only one is allowed."""
    usual = {"hardware": H100, "model": model(), "workload": {"seq_len": 256}}
    assert_rows([Point({**usual, **other}) for _ in range(3) for other in others])
    labels = [{"a": 1}, {"b": 2}, {"a": "x", "b": 3}, {}, {"a": True}]
    assert_rows([Point({**usual, **others[0]}, own) for _ in range(3) for own in labels])


def test_an_equal_object_is_the_same_family():
    """Families are found by what objects are, not by which."""
    from spsim.studies.grids import tables_of_points

    points = [
        Point({"hardware": H100, "model": model(), "plan": {"tp": 8}, "workload": {"seq_len": 256 * n}})
        for n in range(1, 9)
    ]
    assert [list(table.places) for table in tables_of_points(points)] == [list(range(8))]


def calibrated(percent):
    """H100 with a held-out error of products, flagged."""
    profile = load_profile(H100)
    gemm = profile.coefficients.gemm
    known = gemm.fraction["bf16"].model_copy(update={"held_out_error_percent": percent, "flagged": True})
    gemm = gemm.model_copy(update={"fraction": {**gemm.fraction, "bf16": known}})
    return profile.model_copy(update={"coefficients": profile.coefficients.model_copy(update={"gemm": gemm})})


def test_a_calibrated_profile_has_its_error_band():
    """Its bands are made of spans, which columns do not have."""
    profile = calibrated(5.0)
    points = [
        Point({"hardware": profile, "model": model(), "plan": "tp=8", "workload": {"seq_len": 256 * n}}) for n in (1, 2)
    ]
    assert_rows(points)
    assert (sweep(points)["flagged"] == "gemm.fraction.bf16").all()


@pytest.mark.parametrize("plan", ["ulysses=4,dp=2,zero=3", "dp=8,zero=3,dp_library=fsdp", "tp=2,pp=2,dp=2"])
def test_bands_of_a_whole_step_follow_from_its_products(plan):
    """Products are a part of step and passes, and their error that part of the band, or less where errors of several
    classes are independent; on replicas and stages too.
    """
    made = Scenario(
        hardware=calibrated(5.0), model=model(layers=4), plan=plan, workload={"seq_len": 512, "global_batch": 16}
    )
    band = simulate(made).error_band
    halves = [band.layer_forward_percent, band.layer_backward_percent]
    assert all(0.1 < percent < 5.0 for percent in halves)
    assert 2.0 * band.known_share < band.step_time_percent <= 5.0 * band.known_share
