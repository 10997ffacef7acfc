"""Ranks of a segment at once are, to the picosecond, the engine; and what that does not cover is left to it."""

from random import Random

import pytest

from spsim.engine.engine import run
from spsim.engine.recording import TaskInfo
from spsim.engine.tasks import Start, Task
from spsim.inputs.plan import parse_plan
from spsim.program.mesh import mesh_of
from spsim.step.abreast import Abreast
from spsim.step.ranks import Ranks
from spsim.step.segments import Call, Segment
from tests.cases import H100, scenario
from tests.replay import SLOWDOWNS

LANES = ("compute", "compute", "ring", "tp")


def segment(rng, *, slowdown=None):
    """Kernels, exchanges and collectives of a ring in random order, on up to three lanes."""
    tasks, calls = [], {}
    for number in range(rng.randint(1, 14)):
        lane = rng.choice(LANES)
        needs = tuple(sorted(rng.sample(range(number), min(number, rng.choice([0, 1, 1, 2])))))
        tasks.append(Task(number, lane, needs=needs, slowdown=None if lane == "compute" else slowdown))
        if lane != "compute":
            calls[number] = Call(("ring",), rng.random() < 0.7)
    labels = tuple(TaskInfo(f"{task.id}", "gemm", "forward") for task in tasks)
    return Segment("one", "forward", tuple(tasks), labels, calls)


def programs_of(own, ranks):
    """Of each rank of a ring."""
    return Ranks(mesh_of(parse_plan(f"ring={ranks}")), "each").programs(own)


@pytest.mark.slow
def test_ranks_at_once_run_as_in_the_engine():
    """Random durations, many of them 0, of ranks that begin apart."""
    rng, held = Random(5), 0
    for _ in range(400):
        ranks, longest, slowdown = rng.randint(4, 7), rng.choice([3, 50, 10**9]), rng.choice(SLOWDOWNS.elements)
        own = segment(rng)
        programs = programs_of(own, ranks)
        durations = {
            rank: [rng.choice([0, rng.randint(0, longest)]) for _ in own.tasks] for rank in programs
        }  # fmt: skip
        starts = [rng.choice([0, rng.randint(0, longest)]) for _ in programs]
        found = Abreast(own, programs).run(durations, starts, slowdown)
        expected = run(
            programs, slowdown=slowdown, durations=durations,
            starts={rank: Start(time) for rank, time in zip(programs, starts, strict=True)},
        )  # fmt: skip
        assert found is not None
        assert {rank: [*map(tuple, own.tolist())] for rank, own in found.items()} == expected
        held += any(turn.holds for turn in Abreast(own, programs).turns) and slowdown > 0
    assert held > 50


def test_what_is_not_covered_is_left_to_the_engine():
    """Few ranks, shares of their own, a peer that never comes, and times that 64 bits might not hold."""
    rng = Random(6)
    own = next(own for own in (segment(rng, slowdown=None) for _ in range(99)) if own.calls)
    programs = programs_of(own, 4)
    durations, starts = {rank: [1] * len(own.tasks) for rank in programs}, [0] * 4
    assert Abreast(own, programs).run(durations, starts, 0.15) is not None
    assert Abreast(own, programs_of(own, 3)).turns == []
    slow = next(own for own in (segment(rng, slowdown=0.3) for _ in range(99)) if own.calls)
    assert Abreast(slow, programs_of(slow, 4)).turns == []
    assert Abreast(own, {rank: program for rank, program in programs_of(own, 5).items() if rank}).turns == []
    assert Abreast(own, programs).run(durations | {0: [2**61] * len(own.tasks)}, starts, 0.15) is None


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ring=8,ring_cut=contiguous", "tp=2,ring=4,ring_cut=contiguous,recompute=full"])
def test_passes_of_contiguous_rings_are_covered(plan):
    """Their ranks differ in durations and peers only."""
    from spsim.step.prepared import prepared_layer

    case = scenario(plan, hardware=H100)
    block = prepared_layer(case.model, case.plan, True)
    assert all(block.abreast[part.segment.name].turns for own in block.passes.values() for part in own.parts)
