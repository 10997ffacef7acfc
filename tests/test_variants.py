"""Passes that carry messages of replicas: steps of a whole small model, walked, against recorded steps and by hand.

The model is that of `test_replicas`: an embedding, 4 layers, and a norm with the head.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.workload import Precision, Workload
from spsim.program.assembly import EMBEDDING, HEAD, layer_program, step_programs
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import LAYER, Communication, Compute, Instruction, Program
from spsim.program.mesh import mesh_of
from spsim.program.region import Region
from spsim.program.strategies import SplitRule
from spsim.results.metrics import peak_memory
from spsim.step.closing import Optimizer, replica_closings
from spsim.step.groups import replica_groups
from spsim.step.issue import block_passes
from spsim.step.itinerary import Blocks, Item, Loop, Run, Visit, accumulation, segments_of, visits
from spsim.step.messages import Synchronisation
from spsim.step.replicas import parameters_of, synchronisation
from spsim.step.replicated import ReplicatedChunk, root_of
from spsim.step.segments import Segment
from tests.test_itinerary import assert_equal, both, step
from tests.test_replicas import DDP, DEEPSPEED, FSDP, ROOT, Call, calls_of

TOKENS = 8


@cache
def programs(
    h: int, dp: int, layers: int = 4, *, tied: bool = False, precision: Precision = "bf16"
) -> tuple[Program, ...]:
    """Of the blocks of the model on so many replicas, in the order of the forward pass."""
    model = Model(
        layers=layers, hidden=h, heads=4, vocab=512, ffn_hidden=4 * h, positions="none", tied_embeddings=tied
    )  # fmt: skip
    found = step_programs(model, Plan(dp=dp), Workload(seq_len=TOKENS, precision=precision))
    return (found[EMBEDDING], *[found[LAYER]] * layers, found[HEAD])


class Walk:
    """A step of the model, its kernels and messages of so many picoseconds each, on one rank for all."""

    def __init__(
        self, sync: Synchronisation, plan: Plan, blocks: Sequence[Program], *, micro_batches: int = 2,
        kernel: int = 100, message: int = 30,
    ) -> None:  # fmt: skip
        rows = [list(same) for _, same in groupby(blocks, key=id)]
        named = {f"block {i}": block_passes(row[0], plan, f"block {i}") for i, row in enumerate(rows)}
        middle = range(len(rows)) if len(rows) == 1 else range(1, len(rows) - 1)
        chunk = tuple(Run(f"block {i}", len(row), numbered=i in middle) for i, row in enumerate(rows))
        self.groups = replica_groups(plan)
        items = [*ReplicatedChunk(sync, named, chunk, self.groups).items(micro_batches)]
        closing = replica_closings(sync, self.groups, {}, (), Optimizer(plan, "bf16"))
        items += [Visit(made.segment, None, micro_batches - 1) for made in closing]
        self.segments = {segment.name: segment for segment in segments_of(items)}
        durations = {
            name: [kernel if task.lane == "compute" else message for task in segment.tasks]
            for name, segment in self.segments.items()
        }
        sizes = {name: self._sizes(segment) for name, segment in self.segments.items()}
        self.step = step(tuple(items), durations, ranks=(0,), sizes=sizes)
        self.folded, self.unfolded, self.events = both(self.step)

    def _sizes(self, segment: Segment) -> list[int]:
        """Of its own buffers nothing, so that memory is that of the messages."""
        return [0] * len(segment.buffer_ids) + list(segment.added_bytes)

    def calls(self) -> list[Call]:
        """Messages in order of their posts; those of the optimizer belong to no micro-batch."""
        found = []
        segment_of = {segment.outline: name for name, segment in self.segments.items()}
        for piece in self.folded.pieces:
            labels = piece.recording.outline.labels
            for span in piece.spans():
                info = labels[span.task - piece.first_task]
                if info.collective:
                    closing = segment_of[piece.recording.outline] in ("optimizer", "parameter_gather")
                    m = "-" if closing else str(1 + (piece.micro_batch or 0))
                    found.append((span.posted_ps, span.task, m, info))
        return [(m, info.collective, info.message_bytes) for _, _, m, info in sorted(found, key=lambda f: f[:2])]


def without_types(calls: Sequence[Call]) -> list[tuple[str, str, int]]:
    return [call[:3] for call in calls]


# ------------------------------------------------------------ recorded steps


@pytest.mark.parametrize("case", FSDP)
def test_fully_sharded(case: str) -> None:
    precision, options = FSDP[case]
    plan = Plan(**{"dp": 2, "dp_library": "fsdp", "zero": 3} | options)
    blocks = programs(64, plan.dp, tied="tied" in case)
    found = synchronisation(parameters_of(blocks), plan, precision, root=ROOT)
    found = replace(found, reductions_in="last") if case.endswith("sync_last") else found
    walk = Walk(found, plan, blocks)
    assert walk.calls() == without_types(calls_of(case))
    assert_equal(walk.folded, walk.unfolded)


@pytest.mark.parametrize("case", DDP)
def test_ddp(case: str) -> None:
    h, precision, limit = DDP[case]
    plan = Plan(dp=2, dp_library="ddp", bucket_elements=limit)
    found = synchronisation(parameters_of(programs(h, 2)), plan, precision)
    walk = Walk(found, plan, programs(h, 2))
    assert walk.calls() == without_types(calls_of(case))
    assert_equal(walk.folded, walk.unfolded)


@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed(case: str) -> None:
    plan = Plan(**{"dp": 2, "dp_library": "deepspeed"} | DEEPSPEED[case])
    blocks = programs(512 if "h512" in case else 64, plan.dp, tied="tied" in case)
    walk = Walk(synchronisation(parameters_of(blocks), plan, "bf16"), plan, blocks)
    assert walk.calls() == without_types(calls_of(case))
    assert_equal(walk.folded, walk.unfolded)


# ------------------------------------------------------------ by hand

WEIGHTS = 49_984
"""Elements of a layer at width 64."""
TABLE = 512 * 64


def kernels(blocks: Sequence[Program], phase: str) -> int:
    """Of a pass of all blocks."""
    return sum(isinstance(step, Compute) for block in blocks for step in getattr(block, phase))


def of_layers(sync: Synchronisation, plan: Plan, layers: int, **times: int) -> Walk:
    """A step of layers alone."""
    return Walk(sync, plan, programs(64, plan.dp, layers)[1:-1], **times)


@pytest.mark.parametrize("layers", [30, 60])
def test_a_bucket_of_three_layers_is_a_loop(layers: int) -> None:
    """What three layers send comes again and again, whatever their number, and only the last bucket is exposed, for all
    but the kernel of 100 ps that follows the last gradient.
    """
    plan = Plan(dp=2, distributed_optimizer=True, dp_overlap="gradients", bucket_elements=3 * WEIGHTS)
    blocks = programs(64, 2, layers)[1:-1]
    sync = synchronisation(parameters_of(blocks), plan, "bf16")
    walk = of_layers(sync, plan, layers, message=900)
    passes = 100 * 2 * (kernels(blocks, "forward") + kernels(blocks, "backward"))
    # Then two kernels up to the norm, its all-reduce, four kernels, and a gather of each bucket.
    assert walk.folded.end_ps == passes - 100 + 900 + 200 + 900 + 400 + 900 * layers // 3
    assert [loop.runs for loop in walk.step.itinerary if isinstance(loop, Loop)] == [layers] * 3 + [layers // 3]
    assert walk.events < 1000
    assert_equal(walk.folded, walk.unfolded)


@pytest.mark.slow
@pytest.mark.parametrize("elements", [WEIGHTS // 3, 2 * WEIGHTS // 3, 5 * WEIGHTS // 2, 7 * WEIGHTS // 2])
@pytest.mark.parametrize("message", [30, 400, 2500])
def test_buckets_that_close_anywhere(elements: int, message: int) -> None:
    """Several in a layer, or one in several: folded as unfolded, and in all what the bytes say."""
    plan = Plan(dp=2, distributed_optimizer=True, dp_overlap=True, bucket_elements=elements)
    sync = synchronisation(parameters_of(programs(64, 2, 24)[1:-1]), plan, "bf16")
    walk = of_layers(sync, plan, 24, message=message)
    assert_equal(walk.folded, walk.unfolded)
    sent = [size for _, collective, size in walk.calls() if collective == "reduce_scatter"]
    assert sent == [4 * own.bucket.elements for own in sync.reductions]
    assert 24 * WEIGHTS <= sum(sent) / 4 < 24 * WEIGHTS + 128 * len(sent)


def test_parameters_that_arrive_late() -> None:
    """Messages of 10 us: each gather begins when the lane is free, a kernel waits for the last one, and what follows
    it is the rest of the layer that the last bucket begins in.
    """
    plan = Plan(dp=2, distributed_optimizer=True, dp_overlap=True, bucket_elements=4 * WEIGHTS)
    blocks = programs(64, 2, 8)[1:-1]
    sync = synchronisation(parameters_of(blocks), plan, "bf16")
    assert len(sync.forward) == 2
    walk = of_layers(sync, plan, 8, message=10_000)
    forward = [piece for piece in walk.folded.pieces if piece.phase == "forward" and piece.micro_batch == 0]
    ends = [span.end_ps for piece in forward for span in piece.spans() if span.lane == "compute"]
    assert max(ends) == 2 * 10_000 + 4 * 100 * kernels(blocks[:1], "forward")


def test_memory_of_units_that_are_gathered() -> None:
    """In the backward pass of a layer: the root (2 bytes an element), this layer and the next one gathered, the
    gradients of the layer and of the head (2), and the copy of the former that is reduced (4). At the end nothing.
    """
    plan = Plan(dp=2, dp_library="fsdp", zero=3)
    blocks = programs(64, 2)
    walk = Walk(synchronisation(parameters_of(blocks), plan, "bf16", root=ROOT), plan, blocks)
    head = TABLE + 128
    gathered, gradients, copied = 2 * (TABLE + head + 2 * WEIGHTS), 2 * (WEIGHTS + head), 4 * WEIGHTS
    assert peak_memory(walk.folded, {0: 0}).bytes == gathered + gradients + copied
    assert sum(change.bytes for change in walk.folded.memory) == 0


def test_what_is_kept_for_the_backward_pass() -> None:
    """Zero 2: all layers and the root when the backward pass begins; then the gradients of the head and the last layer,
    and its copy.
    """
    plan = Plan(dp=2, dp_library="fsdp", zero=2)
    blocks = programs(64, 2)
    walk = Walk(synchronisation(parameters_of(blocks), plan, "bf16", root=ROOT), plan, blocks)
    head = TABLE + 128
    gathered, gradients, copied = 2 * (TABLE + head + 4 * WEIGHTS), 2 * (head + WEIGHTS), 4 * WEIGHTS
    assert peak_memory(walk.folded, {0: 0}).bytes == gathered + gradients + copied
    assert sum(change.bytes for change in walk.folded.memory) == 0


@pytest.mark.parametrize("options", ["ring=4", "ring=4,ring_cut=contiguous,recompute=full", "ulysses=2,tp=2"])
def test_passes_of_several_parts(options: str) -> None:
    """Rings and recomputation with FSDP: shards over all ranks that use a weight whole."""
    plan = parse_plan(f"dp=2,dp_library=fsdp,zero=3,{options}")
    model = Model(layers=4, hidden=64, heads=4, vocab=512, ffn_hidden=256)
    blocks = [layer_program(model, plan, Workload(seq_len=64))] * 4
    sync = synchronisation(parameters_of(blocks), plan, "bf16")
    walk = Walk(sync, plan, blocks)
    assert walk.groups["shard"].ranks == 2 * plan.ring * plan.ulysses
    assert_equal(walk.folded, walk.unfolded)
    gathered = [size for _, collective, size in walk.calls() if collective == "all_gather" and size == 2 * WEIGHTS]
    assert len(gathered) == (2 * 4 * 2 if plan.tp == 1 else 0)


def test_a_unit_is_what_placement_derives_for_its_weights() -> None:
    """Weights that rest sharded, gathered one by one for each use and reduced after: in sum the messages of a unit."""
    model, plan = Model(layers=1, hidden=64, heads=4, vocab=512, ffn_hidden=256), Plan(dp=2, dp_library="fsdp", zero=3)
    operators = transformer_layer(model, Workload(seq_len=TOKENS), 2)
    region = Region(operators, {"dp": SplitRule(("b",), ("b",), shards_weights=True)}, mesh_of(plan))
    derived = compile_region(region, plan, causal=True)
    sync = synchronisation(parameters_of(programs(64, 2, 1)[1:-1]), plan, "bf16")
    for messages, steps in ((sync.forward, derived.forward), (sync.backward, derived.backward)):
        assert messages[0].message_bytes == sum(s.message_bytes for s in steps if named(s) == "all_gather")
    reduced = sum(step.message_bytes for step in derived.backward if named(step) == "reduce_scatter")
    assert sync.reductions[0].bucket.message_bytes == reduced


def named(step: Instruction) -> str:
    return step.collective if isinstance(step, Communication) else ""


@pytest.mark.parametrize("library", ["megatron", "ddp", "fsdp", "deepspeed"])
def test_one_replica_sends_nothing(library: str) -> None:
    plan = Plan(dp_library=library, zero=3 if library == "fsdp" else 0, dp_overlap=True)
    sync = synchronisation(parameters_of(programs(64, 1)), plan, "bf16", root=ROOT)
    assert sync.reductions
    assert Walk(sync, plan, programs(64, 1)).calls() == []


# ------------------------------------------------------------ all micro-batches

CHUNK = (Run("embedding", numbered=False), Run("layer", 4), Run("head", numbered=False))


def blocks_of(plan: Plan) -> Blocks:
    """The passes of the blocks of the model."""
    first, layer, *_, last = programs(64, plan.dp)
    named = {"embedding": first, "layer": layer, "head": last}
    return {name: block_passes(program, plan, name) for name, program in named.items()}


def written_out(items: Sequence[Item]) -> list[tuple[object, ...]]:
    return [(v.segment.name, v.layer, v.micro_batch, v.brings, v.drops) for v in visits(items)]


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 7])
def test_without_messages_in_passes_a_step_is_as_any_other(micro_batches: int) -> None:
    """What is reduced after the last micro-batch changes no pass."""
    plan = Plan(dp=2, distributed_optimizer=True)
    sync = synchronisation(parameters_of(programs(64, 2)), plan, "bf16")
    chunk = ReplicatedChunk(sync, blocks_of(plan), CHUNK, replica_groups(plan))
    expected = accumulation(blocks_of(plan), CHUNK, micro_batches)
    assert written_out(chunk.items(micro_batches)) == written_out((expected,))


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("options", "own"),
    [("distributed_optimizer,dp_overlap", 3), ("distributed_optimizer,dp_overlap=gradients", 2), ("zero=3", 1)],
)
def test_micro_batches_that_are_alike_are_a_loop(options: str, own: int, micro_batches: int) -> None:
    """The first gathers, the last reduces; under FSDP all do both."""
    plan = parse_plan(f"dp=2,{options}")
    sync = synchronisation(parameters_of(programs(64, 2)), plan, "bf16", root=root_of(CHUNK))
    chunk = ReplicatedChunk(sync, blocks_of(plan), CHUNK, replica_groups(plan))
    items = chunk.items(micro_batches)
    assert {id(segment) for segment in segments_of(items)} <= {*map(id, chunk.segments)}
    layers = [visit.layer for visit in visits(items) if visit.segment.tasks and visit.layer is not None]
    assert layers == [0, 1, 2, 3, 3, 2, 1, 0] * micro_batches
    kinds = {
        tuple(name for name, _, m, *_ in written_out(items) if m == micro_batch) for micro_batch in range(micro_batches)
    }
    assert len(kinds) == min(own, micro_batches)
