"""Folding: identical passes of layers are run through the engine once and walked.

At the end of a pass every lane of a rank is free when its last kernel ends, so all that a pass hands to the
next is when each rank ends. A pass is therefore a function (phase, starts of the ranks relative to the first)
-> (recording, ends), and equal arguments are run once. Should a communication outlast the kernels of its
pass, folding turns itself off: then, or on request, all passes are run through the engine as one program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spsim.engine.engine import run
from spsim.engine.recording import COMPUTE_LANE, ENDED, Integers, Moments, Recording, columns
from spsim.engine.tasks import RankProgram, Task
from spsim.engine.trace import Phase, Stretch
from spsim.step.schedule import LayerSchedule, Pass

Durations = Mapping[Phase, Mapping[int, Sequence[int]]]
"""Phase -> simulated rank -> picoseconds of each task of the pass."""

OUTLASTS = "layers are not folded: a communication outlasts the kernels of its pass"


@dataclass(frozen=True, slots=True)
class Step:
    """What is run: layers and micro-batches of a schedule, with its numbers."""

    schedule: LayerSchedule
    durations: Durations
    sizes: Mapping[Phase, Sequence[int] | Integers]
    """Bytes of each buffer of a pass."""
    layers: int
    micro_batches: int
    slowdown: float

    def sweeps(self) -> Iterator[tuple[Pass, Sequence[int | None], int | None]]:
        """(pass, layers in order, micro-batch): each micro-batch goes up through all layers and down again."""
        for micro_batch in range(self.micro_batches):
            yield self.schedule.forward, range(self.layers), micro_batch
            yield self.schedule.backward, range(self.layers - 1, -1, -1), micro_batch
        if self.schedule.sync.items:
            yield self.schedule.sync, (None,), None


def run_step(step: Step, *, fold: bool) -> tuple[list[Stretch], int, str]:
    """The stretches of a step, the number of tasks that the engine ran, and a reason if layers are not folded."""
    if fold:
        walk = _Walk(step)
        stretches = walk.stretches()
        if stretches is not None:
            return stretches, walk.events, ""
    stretches = _unfolded(step)
    return (
        stretches,
        sum(len(stretch.recording.spans) for stretch in stretches),
        OUTLASTS if fold else "layers are not folded: it was switched off",
    )


class _Walk:
    """Remembers the passes that were run, by phase and relative starts."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.ranks = tuple(step.schedule.copies)
        self.events = 0
        self.known: dict[tuple[Phase, tuple[int, ...]], tuple[Recording, tuple[int, ...]]] = {}

    def stretches(self) -> list[Stretch] | None:
        """The whole step, or None where a pass leaves a lane busy. Once the ranks leave a layer as they
        entered it, all further layers are alike.
        """
        found: list[Stretch] = []
        starts = (0,) * len(self.ranks)
        first_task = 0
        for this, layers, micro_batch in self.step.sweeps():
            done = 0
            while done < len(layers):
                shift = min(starts)
                relative = tuple([start - shift for start in starts])
                recording, ends = self._known(this, relative)
                if not ends:
                    return None
                advance = min(ends)
                left = tuple([end - advance for end in ends])
                alike = len(layers) - done if left == relative else 1
                brings = this.entry if done == 0 else None
                drops = this.result if done + alike == len(layers) else None
                found.append(
                    Stretch(
                        recording, this.phase, layers[done : done + alike], micro_batch, shift, advance, first_task,
                        brings, drops,
                    )
                )  # fmt: skip
                first_task += alike * len(this.items)
                starts = tuple([shift + alike * advance + start for start in left])
                done += alike
        return found

    def _known(self, this: Pass, relative: tuple[int, ...]) -> tuple[Recording, tuple[int, ...]]:
        key = (this.phase, relative)
        if key not in self.known:
            self.known |= self._run_alone() if len(self.ranks) == 1 else {key: self._run(this, relative)}
        return self.known[key]

    def _run(self, this: Pass, starts: tuple[int, ...]) -> tuple[Recording, tuple[int, ...]]:
        moments = run(
            self.step.schedule.programs[this.phase],
            slowdown=self.step.slowdown,
            durations=self.step.durations[this.phase],
            starts=dict(zip(self.ranks, starts, strict=True)),
        )
        return self._recorded(this, moments)

    def _run_alone(self) -> dict[tuple[Phase, tuple[int, ...]], tuple[Recording, tuple[int, ...]]]:
        """All passes of a rank that stands for all: it meets no other, so that its passes can run side by side."""
        (rank,), step = self.ranks, self.step
        passes = dict(enumerate((step.schedule.forward, step.schedule.backward, step.schedule.sync)))
        moments = run(
            {number: step.schedule.programs[this.phase][rank] for number, this in passes.items()},
            slowdown=step.slowdown,
            durations={number: step.durations[this.phase][rank] for number, this in passes.items()},
        )
        return {
            (this.phase, (0,)): self._recorded(this, {rank: moments[number]})
            for number, this in passes.items()
            if this.items
        }

    def _recorded(self, this: Pass, moments: Mapping[int, Sequence[Moments]]) -> tuple[Recording, tuple[int, ...]]:
        """A pass and the end of each rank; no ends where a lane is busy beyond the kernels."""
        recording = _recording(self.step, this, moments)
        self.events += sum(map(len, moments.values()))
        return recording, tuple(recording.ends.values()) if self._lanes_free(this, recording) else ()

    def _lanes_free(self, this: Pass, recording: Recording) -> bool:
        """Whether nothing outlasts the last kernel of each rank; after the synchronisation nothing follows."""
        last = this.last_kernel
        return last is None or all(recording.times[rank][last, ENDED] == end for rank, end in recording.ends.items())


def _recording(step: Step, this: Pass, moments: Mapping[int, Sequence[Moments]]) -> Recording:
    times = {rank: columns(own) for rank, own in moments.items()}
    return Recording(this.outline, times, step.sizes[this.phase])


# Without folding


def _unfolded(step: Step) -> list[Stretch]:
    """All passes as one program: communication that waits for nothing in its pass waits for the kernel before."""
    passes = [
        (this, layer, micro_batch, layer == layers[0], layer == layers[-1])
        for this, layers, micro_batch in step.sweeps()
        for layer in layers
    ]
    order = [this for this, *_ in passes]
    programs = {rank: RankProgram(list(_concatenated(step, rank, order))) for rank in step.schedule.copies}
    durations = {rank: [ps for this in order for ps in step.durations[this.phase][rank]] for rank in programs}
    moments = run(programs, slowdown=step.slowdown, durations=durations)
    stretches = []
    first = 0
    for this, layer, micro_batch, brings, drops in passes:
        stop = first + len(this.items)
        recording = _recording(step, this, {rank: own[first:stop] for rank, own in moments.items()})
        edges = (this.entry if brings else None, this.result if drops else None)
        stretches.append(Stretch(recording, this.phase, (layer,), micro_batch, 0, 0, first, *edges))
        first = stop
    return stretches


def _concatenated(step: Step, rank: int, order: Sequence[Pass]) -> Iterator[Task]:
    """The tasks of all passes of one rank, numbered through."""
    first = 0
    last_kernel: int | None = None
    for this in order:
        before = last_kernel
        for task in step.schedule.programs[this.phase][rank].tasks:
            needs = tuple(need + first for need in task.needs)
            if task.meetings and not needs and before is not None:
                needs = (before,)
            meetings = tuple(replace(m, key=(m.key[0] + first, *m.key[1:])) for m in task.meetings)
            yield replace(task, id=task.id + first, needs=needs, meetings=meetings)
            if task.lane == COMPUTE_LANE:
                last_kernel = task.id + first
        first += len(this.items)
