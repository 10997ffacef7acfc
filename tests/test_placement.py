"""Placements: collectives, their order and duality, local sizes, bytes on the wire, the grid of ranks."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.inputs.plan import Plan
from spsim.program.mesh import AXES, Mesh, mesh_of, nodes_of
from spsim.program.placement import (
    PARTIAL,
    REPLICATE,
    local_bytes,
    local_elements,
    message_bytes,
    redistribute,
    sent_bytes,
    shard,
)
from spsim.program.strategies import split_rules

S, A = shard("s"), shard("a")


@dataclass(frozen=True)
class Sized:
    """A tensor as placement sees it."""

    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    itemsize: int = 2


def one_axis(placement, axis="tp"):
    """A layout on a mesh of one axis."""
    return ((axis, placement),)


def collectives(source, target, **options):
    """(axis, collective) of each step of a redistribution."""
    return [(step.axis, step.collective) for step in redistribute(source, target, **options)]


# ------------------------------------------------------------ which collective


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (PARTIAL, REPLICATE, ["all_reduce"]),
        (PARTIAL, S, ["reduce_scatter"]),
        (S, REPLICATE, ["all_gather"]),
        (S, A, ["all_to_all"]),
        (REPLICATE, S, [None]),
        (REPLICATE, REPLICATE, []),
        (S, S, []),
        (PARTIAL, PARTIAL, []),
    ],
)
def test_collective_of_each_change_of_placement(source, target, expected):
    """The table of DTensor; a slice of a replicated tensor is free."""
    found = collectives(one_axis(source), one_axis(target))
    assert [collective for _, collective in found] == expected


@pytest.mark.parametrize("source", [REPLICATE, S])
def test_nothing_becomes_partial(source):
    """The rules never ask for it, so asking is a defect."""
    with pytest.raises(AssertionError):
        redistribute(one_axis(source), one_axis(PARTIAL))


@pytest.mark.parametrize(
    ("arrives", "needed", "expected"),
    [
        (PARTIAL, REPLICATE, ["all_reduce"]),  # replicated into a column-parallel linear
        (PARTIAL, S, ["reduce_scatter"]),  # shard -> replicated into a column-parallel linear, or K and V
        (REPLICATE, REPLICATE, []),  # partial -> replicated
        (S, REPLICATE, ["all_gather"]),  # partial -> shard, and replicated -> shard
        (A, S, ["all_to_all"]),  # shard of s -> shard of a
    ],
)
def test_collective_of_the_gradient(arrives, needed, expected):
    """A sum and a copy are each other's dual, a shard is its own."""
    found = collectives(one_axis(arrives), one_axis(needed), backward=True)
    assert [collective for _, collective in found] == expected


# ------------------------------------------------------------ several axes


USP = Mesh({"ring": 2, "ulysses": 4})


def test_keys_under_usp_move_innermost_first():
    """K goes from s-shards to heads over ulysses, inside the node, and is gathered over ring after that."""
    source = (("ring", S), ("ulysses", S))
    target = (("ring", REPLICATE), ("ulysses", A))
    assert collectives(source, target) == [("ulysses", "all_to_all"), ("ring", "all_gather")]


def test_their_gradient_moves_outermost_first():
    """The way back, in reverse."""
    source = (("ring", PARTIAL), ("ulysses", A))
    target = (("ring", S), ("ulysses", S))
    found = collectives(source, target, backward=True)
    assert found == [("ring", "reduce_scatter"), ("ulysses", "all_to_all")]


def test_bytes_of_each_step_follow_from_the_layout_reached():
    """K of 16 x 8 elements on 8 ranks: 32 bytes a rank before and after the all-to-all; the gather over two
    ring ranks makes 64 of them.
    """
    key = Sized(("s", "a"), (16, 8))
    source = (("ring", S), ("ulysses", S))
    target = (("ring", REPLICATE), ("ulysses", A))
    steps = redistribute(source, target)
    assert [message_bytes(step, key, USP) for step in steps] == [32, 64]


FORWARD = st.sampled_from([PARTIAL, REPLICATE, S, A])
TARGETS = st.sampled_from([REPLICATE, S, A])
MIRROR = {
    "all_reduce": None,
    "reduce_scatter": "all_gather",
    "all_gather": "reduce_scatter",
    "all_to_all": "all_to_all",
    None: "all_gather",
}
SHORT = dict.fromkeys(AXES, 2)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(FORWARD, min_size=len(AXES), max_size=len(AXES)), st.lists(TARGETS, min_size=len(AXES), max_size=len(AXES))
)
def test_the_gradient_mirrors_the_tensor(sources, targets):
    """Moving the gradient back is the mirrored sequence: each collective's dual, in reverse order."""
    source, target = (tuple(zip(AXES, side, strict=True)) for side in (sources, targets))
    forward = redistribute(source, target)
    moved = {step.axis for step in forward}
    arrives = tuple(
        (axis, PARTIAL if axis in moved and old != PARTIAL and new == REPLICATE else new)
        for axis, old, new in zip(AXES, sources, targets, strict=True)
    )
    needed = tuple((axis, REPLICATE if old == PARTIAL else old) for axis, old in source)
    expected = [(step.axis, MIRROR[step.collective]) for step in reversed(forward)]
    found = collectives(arrives, needed, backward=True)
    assert found == [item for item in expected if item[1] is not None]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(FORWARD, min_size=len(AXES), max_size=len(AXES)),
    st.lists(TARGETS, min_size=len(AXES), max_size=len(AXES)),
    st.booleans(),
)
def test_steps_chain_from_source_to_target(sources, targets, backward):
    """Each step changes one axis, starts where the one before ended, and the last reaches the target."""
    source, target = (tuple(zip(AXES, side, strict=True)) for side in (sources, targets))
    reached = source
    for step in redistribute(source, target, backward=backward):
        assert step.source == reached
        changed = [a for (a, old), (_, new) in zip(step.source, step.target, strict=True) if old != new]
        assert changed == [step.axis]
        reached = step.target
    assert reached == target


# ------------------------------------------------------------ sizes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.fixed_dictionaries({axis: st.integers(2, 4) for axis in AXES}),
    st.lists(st.sampled_from([REPLICATE, PARTIAL, S, A]), min_size=len(AXES), max_size=len(AXES)),
)
def test_local_elements_are_the_largest_part(s, a, degrees, placements):
    """Cutting each dimension in as many parts as its axes say, the fullest rank holds this much."""
    layout = tuple(zip(AXES, placements, strict=True))

    def fullest(dim, size):
        parts = math.prod(degrees[axis] for axis, placement in layout if placement == shard(dim))
        return max(map(len, np.array_split(np.arange(size), parts)))

    tensor = Sized(("s", "a", "d"), (s, a, 5))
    assert local_elements(tensor, layout, Mesh(degrees)) == fullest("s", s) * fullest("a", a) * 5
    assert local_bytes(tensor, layout, Mesh(degrees)) == 2 * local_elements(tensor, layout, Mesh(degrees))


def test_kv_heads_fewer_than_ranks_are_replicated():
    """2 KV heads over 8 ranks: one head each, four times 2 / 8."""
    assert local_elements(Sized(("s", "a"), (10, 2)), one_axis(A), Mesh({"tp": 8})) == 10


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [(PARTIAL, REPLICATE, 96), (PARTIAL, S, 96), (S, REPLICATE, 96), (S, A, 24)],
)
def test_message_bytes_are_those_of_nccl_tests(source, target, expected):
    """12 x 4 elements of 2 bytes over 4 ranks: the whole array, or one rank's buffer for all-to-all."""
    mesh = Mesh({"tp": 4})
    (step,) = redistribute(one_axis(source), one_axis(target))
    assert message_bytes(step, Sized(("s", "a"), (12, 4)), mesh) == expected


# ------------------------------------------------------------ bytes on the wire


def ring_all_gather(parts):
    """Elements that rank 0 sends while whole arrays form on a ring; the result is checked."""
    ranks, sent = len(parts), 0
    have = [{rank: part} for rank, part in enumerate(parts)]
    for step in range(ranks - 1):
        for rank in range(ranks):
            chunk = (rank - step) % ranks
            have[(rank + 1) % ranks][chunk] = have[rank][chunk]
            sent += len(have[rank][chunk]) if rank == 0 else 0
    assert all([mine[i] for i in range(ranks)] == parts for mine in have)
    return sent


def ring_reduce_scatter(arrays):
    """Elements that rank 0 sends while chunk sums travel a ring; the result is checked."""
    ranks, sent = len(arrays), 0
    chunks = [np.split(array, ranks) for array in arrays]
    for step in range(ranks - 1):
        moving = [(rank, (rank - step) % ranks, chunks[rank][(rank - step) % ranks]) for rank in range(ranks)]
        for rank, index, data in moving:
            chunks[(rank + 1) % ranks][index] = chunks[(rank + 1) % ranks][index] + data
            sent += len(data) if rank == 0 else 0
    total = np.split(sum(arrays), ranks)
    assert all((chunks[r][(r + 1) % ranks] == total[(r + 1) % ranks]).all() for r in range(ranks))
    return sent


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sent_bytes_are_counted_on_the_algorithms(ranks):
    """Ring all-gather, reduce-scatter, their sum for all-reduce, and pairwise all-to-all, run and counted."""
    message = 24 * ranks
    whole = np.arange(message)
    gathered = ring_all_gather([list(part) for part in np.split(whole, ranks)])
    scattered = ring_reduce_scatter([whole * (rank + 1) for rank in range(ranks)])
    assert sent_bytes("all_gather", message, ranks) == gathered
    assert sent_bytes("reduce_scatter", message, ranks) == scattered
    assert sent_bytes("all_reduce", message, ranks) == gathered + scattered
    to_others = [part for peer, part in enumerate(np.split(whole, ranks)) if peer != 0]
    assert sent_bytes("all_to_all", message, ranks) == sum(map(len, to_others))
    assert sent_bytes("send_receive", message, ranks) == message


# ------------------------------------------------------------ the grid of ranks


DEGREES = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(DEGREES, st.sets(st.sampled_from(AXES)))
def test_groups_are_slices_of_the_grid(degrees, axes):
    """World ranks reshaped once to (dp, ring, ulysses, tp): coordinates are indices, groups are slices."""
    mesh = Mesh(degrees)
    grid = np.arange(mesh.ranks).reshape([degrees[axis] for axis in AXES])
    for index in np.ndindex(grid.shape):
        rank = int(grid[index])
        assert tuple(mesh.coordinate(rank, axis) for axis in AXES) == index
        group = grid[tuple(slice(None) if axis in axes else i for axis, i in zip(AXES, index, strict=True))]
        assert mesh.group(rank, tuple(axes)) == tuple(np.ravel(group))
        assert mesh.first(rank, tuple(axes)) == np.min(group)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(DEGREES, st.sets(st.sampled_from(AXES)))
def test_every_group_is_named_once(degrees, axes):
    """In order of first ranks; together they are all ranks."""
    mesh = Mesh(degrees)
    groups = list(mesh.groups(tuple(axes)))
    assert groups == list(dict.fromkeys(mesh.group(rank, tuple(axes)) for rank in range(mesh.ranks)))
    assert {len(group) for group in groups} == {mesh.size(tuple(axes))}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(DEGREES, st.sampled_from(AXES))
def test_neighbours_stand_beside_a_rank_in_its_group(degrees, axis):
    mesh = Mesh(degrees)
    for rank in range(mesh.ranks):
        group = mesh.group(rank, (axis,))
        here = group.index(rank)
        assert mesh.neighbours(rank, axis) == (group[here - 1], group[(here + 1) % len(group)])


def test_a_mesh_of_any_size_costs_the_same():
    """2^48 ranks: nothing is enumerated that was not asked for."""
    mesh = Mesh(dict.fromkeys(("ring", "ulysses", "tp"), 2**16))
    last = mesh.ranks - 1
    assert mesh.first(last, ("ulysses",)) == last - 2**32 + 2**16
    assert mesh.neighbours(last, "ring") == (last - 2**32, 2**32 - 1)
    assert len(mesh.group(last, ("tp",))) == len(next(iter(mesh.groups(("tp",))))) == 2**16
    assert nodes_of(mesh, ("ring", "tp"), 8) == 2**29
    assert nodes_of(mesh, ("ulysses",), 72) == 2**16


def test_consecutive_ranks_differ_in_tp():
    """tp is the innermost axis, ring outside ulysses: 8 ranks as 2 x 2 x 2."""
    mesh = mesh_of(Plan(tp=2, ulysses=2, ring=2))
    assert mesh.axes == ("ring", "ulysses", "tp")
    assert [mesh.group(5, (axis,)) for axis in mesh.axes] == [(1, 5), (5, 7), (4, 5)]
    assert mesh.group(5, ("ring", "ulysses")) == (1, 3, 5, 7)


def test_axes_of_degree_one_are_left_out():
    """They change nothing: a mesh of one rank has no axes."""
    assert Mesh({"tp": 1, "ring": 3, "dp": 1}).axes == ("ring",)
    assert mesh_of(Plan()).axes == ()
    assert mesh_of(Plan()).ranks == 1


# ------------------------------------------------------------ the strategies


@pytest.mark.parametrize(
    ("sequence_parallel", "axis", "token_wise", "mixing"),
    [
        (False, "tp", "a f u v", "a"),
        (True, "tp", "a f u v s", "a"),
        (False, "ulysses", "s", "a"),
        (False, "ring", "s", "s"),
        (False, "dp", "b", "b"),
    ],
)
def test_a_strategy_is_one_line(sequence_parallel, axis, token_wise, mixing):
    """The table of the method: dimensions in order of preference."""
    rule = split_rules(Plan(sequence_parallel=sequence_parallel))[axis]
    assert (rule.token_wise, rule.position_mixing) == (tuple(token_wise.split()), tuple(mixing.split()))


def test_placements_are_values():
    """Equal placements are equal and hashable, so that layouts are keys."""
    assert len({REPLICATE, shard("s"), S, A, PARTIAL}) == 4
