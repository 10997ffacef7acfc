"""Traces against memory worked by hand: when a buffer comes and goes, what the outermost layers bring and drop,
and where the pieces of a stretch stand.
"""

from collections import defaultdict

import numpy as np
import pytest

from spsim.engine.engine import run
from spsim.engine.pieces import Move, Stretch
from spsim.engine.recording import BufferUse, Outline, Recording, TaskInfo
from spsim.engine.tasks import Meeting, Task
from spsim.engine.trace import Trace
from spsim.results.metrics import Peak, first_above, peak_memory


def recording(programs, buffers, **settings):
    """The recording of a run; `buffers` are pairs of a use and its bytes."""
    tasks = next(iter(programs.values()))
    labels = [TaskInfo(f"task {task.id}", "elementwise", "forward") for task in tasks]
    outline = Outline([task.lane for task in tasks], labels, [use for use, _ in buffers])
    times = {rank: np.array(moments) for rank, moments in run(programs, slowdown=0.0, **settings).items()}
    return Recording(outline, times, [size for _, size in buffers])


def trace(*stretches, ranks=1):
    """A trace of stretches, tasks described by their labels."""
    copies = {rank: (rank,) for rank in range(ranks)}
    return Trace(stretches, copies, lambda piece: piece.recording.outline.labels)


def in_order(changes):
    """(time, bytes, tensor, task) sorted by time."""
    return sorted((change.time_ps, change.bytes, change.tensor, change.task) for change in changes)


def written(tensor, writer, *readers, outlives=False, category="temporary"):
    """The use of a buffer that a task of the pass writes."""
    return BufferUse(tensor, category, writer, readers, outlives)


def inherited(tensor, *readers, outlives=False):
    """The use of a buffer that was there before the pass."""
    return BufferUse(tensor, "activations", None, readers, outlives)


# ------------------------------------------------------------ one pass


def test_memory_is_freed_after_the_last_reader():
    """x (100 bytes) is written 0-5, read until 8 and until 14; y (30) has no reader and lives while written: 5-8."""
    tasks = [Task(0, "compute", 5), Task(1, "compute", 3), Task(2, "net", 6, needs=(1,))]
    found = recording({0: tasks}, [(written("x", 0, 1, 2), 100), (written("y", 1), 30)])
    assert in_order(found.memory) == [(0, 100, "x", 0), (5, 30, "y", 1), (8, -30, "y", 1), (14, -100, "x", 2)]


def test_a_buffer_lives_until_the_slower_of_two_lanes():
    """Read on compute until 10 and on the other lane until 25: freed at 25 by the other lane's task, in whatever
    order the readers are listed.
    """
    tasks = [Task(0, "compute", 1), Task(1, "net", 24, needs=(0,)), Task(2, "compute", 9)]
    for readers in ((1, 2), (2, 1)):
        found = recording({0: tasks}, [(written("x", 0, *readers), 64)])
        assert in_order(found.memory) == [(0, 64, "x", 0), (25, -64, "x", 1)]


def test_memory_is_taken_when_the_writer_is_reached():
    """When the collective is posted (3), not when its peer comes (20); both ranks give it back at 25."""
    programs = {
        rank: [Task(0, "compute", work), Task(1, "net", 5, needs=(0,), meetings=(Meeting((1,), 2),))]
        for rank, work in enumerate((3, 20))
    }
    found = recording(programs, [(written("x", 1), 8)])
    assert sorted((c.rank, c.time_ps, c.bytes) for c in found.memory) == [
        (0, 3, 8), (0, 25, -8), (1, 20, 8), (1, 25, -8),
    ]  # fmt: skip


def test_what_outlives_a_pass_is_taken_and_not_freed():
    """The pass that reads it last frees it, without having taken it."""
    tasks = [Task(0, "compute", 5), Task(1, "compute", 3)]
    first = recording({0: tasks}, [(written("x", 0, 1, outlives=True), 100)])
    last = recording({0: tasks}, [(inherited("x", 0), 100)])
    between = recording({0: tasks}, [(inherited("x", 0, 1, outlives=True), 100)])
    assert in_order(first.memory) == [(0, 100, "x", 0)]
    assert in_order(last.memory) == [(5, -100, "x", 0)]
    assert not between.memory


def test_changes_carry_their_category():
    """As the buffer has it, when taken and when freed."""
    found = recording({0: [Task(0, "compute", 5)]}, [(written("x", 0, category="communication buffers"), 1)])
    assert {change.category for change in found.memory} == {"communication buffers"}


# ------------------------------------------------------------ stretches

LAYERS = 3


def tower(shift=0, first_task=0, advance=8):
    """Three layers that each turn their input (10 bytes, read until 5) into an output (written 5-8), and keep an
    activation (4, from 0 on): the first gets its input from outside, and nobody keeps the output of the last.
    """
    layer = recording(
        {0: [Task(0, "compute", 5), Task(1, "compute", 3)]},
        [
            (inherited("input", 0), 10),
            (written("kept", 0, 1, outlives=True), 4),
            (written("output", 1, outlives=True), 10),
        ],
    )
    return Stretch(layer, "forward", 0, 0, shift, first_task, LAYERS, Move(advance, 2, 1), brings=(0,), drops=(2,))


def test_the_outermost_layers_bring_and_drop():
    """Input from 0, freed at 5; the outputs at 8 and 16 are inputs of the next; the last is freed at its end, 24."""
    assert in_order(trace(tower()).memory) == sorted(
        [
            (0, 10, "input", 0), (5, -10, "input", 0), (13, -10, "input", 2), (21, -10, "input", 4),
            (5, 10, "output", 1), (13, 10, "output", 3), (21, 10, "output", 5), (24, -10, "output", 5),
            (0, 4, "kept", 0), (8, 4, "kept", 2), (16, 4, "kept", 4),
        ]
    )  # fmt: skip


def test_a_piece_stands_at_its_place_in_time_and_tasks():
    """Shift 100, first task 7: the second of three layers starts at 108 with task 9."""
    found = trace(tower(shift=100, first_task=7))
    assert [(s.task, s.posted_ps, s.start_ps, s.end_ps) for s in found.spans] == [
        (7, 100, 100, 105), (8, 105, 105, 108), (9, 108, 108, 113), (10, 113, 113, 116), (11, 116, 116, 121),
        (12, 121, 121, 124),
    ]  # fmt: skip
    assert found.end_ps == 124
    assert found.num_spans == len(found.spans)
    assert {(c.time_ps, c.task) for c in found.memory if c.tensor == "kept"} == {(100, 7), (108, 9), (116, 11)}


@pytest.mark.parametrize(("task", "layer"), [(0, 0), (1, 0), (2, 1), (5, 2), (6, 2), (9, 1), (11, 0)])
def test_a_task_belongs_to_its_piece(task, layer):
    """Three layers of two tasks upwards, then the same down."""
    down = tower(shift=24, first_task=6)._replace(phase="backward", layer=LAYERS - 1, move=Move(8, 2, -1))
    piece = trace(tower(), down).piece_of(task)
    assert (piece.layer, piece.phase) == (layer, "forward" if task < 6 else "backward")
    assert piece.first_task <= task < piece.first_task + 2


def test_equal_pieces_share_one_recording():
    """Three layers and again three are six pieces of one recording."""
    stretch = tower()
    found = trace(stretch, stretch._replace(shift_ps=24, first_task=6, micro_batch=1))
    assert list(found.recordings.values()) == [("forward", 6)]
    assert [(len(infos), count) for _, infos, count in found.described()] == [(2, 6)]
    assert len(found.tasks) == 12


# ------------------------------------------------------------ the peak


def test_memory_is_freed_before_it_is_allocated_at_equal_times():
    """x (100) ends at 5, when y (60) begins: never 160, whichever is listed first."""
    tasks = [Task(0, "compute", 5), Task(1, "compute", 3)]
    buffers = [(written("x", 0), 100), (written("y", 1), 60)]
    for listed in (buffers, buffers[::-1]):
        stretch = Stretch(recording({0: tasks}, listed), "forward", 0, 0, 0, 0)
        assert peak_memory(trace(stretch), defaultdict(lambda: 7)) == Peak(rank=0, bytes=107, time_ps=0, task=0)


def test_a_buffer_is_still_there_while_its_reader_writes():
    """x (100) is read by the task that writes y (60): 160, reached at 5 by task 1."""
    tasks = [Task(0, "compute", 5), Task(1, "compute", 3)]
    stretch = Stretch(recording({0: tasks}, [(written("x", 0, 1), 100), (written("y", 1), 60)]), "forward", 0, 0, 0, 0)
    assert peak_memory(trace(stretch), defaultdict(int)) == Peak(rank=0, bytes=160, time_ps=5, task=1)


def test_layers_that_keep_something_are_fullest_at_the_last():
    """Twelve kept bytes in the third layer, and input or output of 10: 22 from 16 on, first by task 4."""
    assert peak_memory(trace(tower(shift=100)), defaultdict(lambda: 1000)) == Peak(
        rank=0, bytes=1022, time_ps=116, task=4
    )


def test_layers_that_give_back_are_fullest_at_the_first():
    """Each of three layers frees 4 of the 12 bytes at its end, and takes 1 while it runs: 13 in the first."""
    keep = recording({0: [Task(0, "compute", 1)]}, [(written("kept", 0, outlives=True), 12)])
    free = recording({0: [Task(0, "compute", 8)]}, [(inherited("kept", 0), 4), (written("work", 0), 1)])
    found = trace(Stretch(keep, "forward", 0, 0, 0, 0), Stretch(free, "backward", 2, 0, 1, 1, 3, Move(8, 1, -1)))
    assert peak_memory(found, defaultdict(int)) == Peak(rank=0, bytes=13, time_ps=1, task=1)
    assert sum(change.bytes for change in found.memory) == 0


def test_the_fullest_rank_makes_the_peak():
    """x (8) is there until 5 on both ranks; y (3) comes at 9 on rank 0 and at 1 on rank 1: 11 there only."""
    programs = {
        rank: [Task(0, "net", 5, meetings=(Meeting((0,), 2),)), Task(1, "compute", work), Task(2, "compute", 1)]
        for rank, work in enumerate((9, 1))
    }
    stretch = Stretch(recording(programs, [(written("x", 0), 8), (written("y", 2), 3)]), "forward", 0, 0, 0, 0)
    assert peak_memory(trace(stretch, ranks=2), defaultdict(int)) == Peak(rank=1, bytes=11, time_ps=1, task=2)
    assert peak_memory(trace(stretch, ranks=1), defaultdict(int)) == Peak(rank=0, bytes=8, time_ps=0, task=0)


@pytest.mark.parametrize(("limit", "task"), [(113, 0), (114, 2), (117, 2), (118, 4), (121, 4), (122, None)])
def test_the_first_task_above_a_limit(limit, task):
    """100 static; 14 in the first layer, 18 in the second, 22 in the third, each from its first task on."""
    assert first_above(trace(tower()), 0, 100, limit) == task
