"""How sure a result is: flags and an error band, from the held-out errors of a calibrated profile.

The error of a class of kernels or collectives is common to all of them (a rate that is off by 10 % is off for
every product), and those of different classes are independent. So a time has the relative error

    sqrt( sum over classes of (share of the time x held-out error)^2 )

Shares are of the first simulated rank: of kernels their own time, of collectives what no kernel hides,
divided among them by their own times. Held-out errors are 90th percentiles, and so is the band. Classes
without one add nothing; `known_share` says how much of the step has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

from spsim.costs.collectives import CommCost
from spsim.costs.models import compute_cost
from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE, Outline, Recording
from spsim.engine.trace import Trace
from spsim.inputs.hardware import HardwareProfile, leaves
from spsim.inputs.quantities import Provenance
from spsim.program.instructions import Communication, HostCopy, Instruction
from spsim.program.mesh import Axis, nodes_of
from spsim.program.placement import Collective
from spsim.step.gradients import Sync
from spsim.step.preparation import PreparedStep
from spsim.work import MemoryBound

Classes = tuple[str, ...]
"""Dotted paths of the coefficients whose error a task has: one of a kernel, all curves of a collective."""


@dataclass(frozen=True, slots=True)
class ErrorBand:
    """Half-widths in percent of the time; None where nothing of it has a held-out error."""

    step_time_percent: float | None
    layer_forward_percent: float | None
    layer_backward_percent: float | None
    known_share: float
    """Of the step time, what comes from coefficients with a held-out error."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a calibration says about one class."""

    error_percent: float
    flagged: bool


@lru_cache(maxsize=64)
def held_out_errors(profile: HardwareProfile) -> Mapping[str, HeldOut]:
    """Held-out errors by dotted path of the coefficient."""
    found = {}
    for path, leaf in leaves(profile.coefficients):
        numbers = (leaf,) if isinstance(leaf, Provenance) else leaf
        errors = [number.held_out_error_percent for number in numbers if number.held_out_error_percent is not None]
        if errors:
            found[path] = HeldOut(max(errors), any(number.flagged for number in numbers))
    return found


@lru_cache(maxsize=64)
def is_calibrated(profile: HardwareProfile) -> bool:
    """Whether products, which take most of a step, have held-out errors: without them a band would say little."""
    return any(path.startswith("gemm.fraction.") for path in held_out_errors(profile))


@lru_cache(maxsize=64)
def has_flags(profile: HardwareProfile) -> bool:
    """Whether any coefficient is flagged."""
    return any(error.flagged for error in held_out_errors(profile).values())


def held_out_of(profile: HardwareProfile, classes: Classes) -> HeldOut | None:
    """The worst of the coefficients of some classes; None where none has an error."""
    known = [
        error
        for path, error in held_out_errors(profile).items()
        if any(path == name or path.startswith(f"{name}.") for name in classes)
    ]
    return HeldOut(max(e.error_percent for e in known), any(e.flagged for e in known)) if known else None


class Account:
    """Which classes the tasks of one result belong to, and the time that each takes."""

    def __init__(
        self, profile: HardwareProfile, precision: str, gpus_per_node: int, prepared: PreparedStep, trace: Trace
    ) -> None:
        self.profile = profile
        self.gpus_per_node = gpus_per_node
        self.prepared = prepared
        self.trace = trace
        self.rank = next(iter(trace.copies))
        self.compute = compute_cost(profile, precision)
        self.comm = CommCost(profile)
        self._collectives: dict[tuple[tuple[Axis, ...], Collective, int | None], Classes] = {}
        self.classes: dict[Outline, list[Classes]] = {
            made.segment.outline: [*map(self._of_closing, made.steps)] for made in prepared.every_closing
        }
        self.classes |= {
            segment.outline: segment.woven(
                map(self._of_step, segment.instructions),
                {task: self._of_collective(s.axes, s.collective, None) for task, s in segment.added.items()},
            )
            for segment in prepared.segments
            if segment.outline not in self.classes
        }

    def _of_closing(self, step: Sync | str) -> Classes:
        if isinstance(step, str):
            return (self.compute.class_of(MemoryBound("optimizer", 0)),)
        return self._of_collective(step.axes, step.collective, None)

    def _of_step(self, step: Instruction) -> Classes:
        if isinstance(step, Communication):
            return () if step.dispatch else self._of_collective((step.axis,), step.timed_as, step.ranks)
        if isinstance(step, HostCopy):
            return ()
        return tuple([self.compute.class_of(work) for work in step.work if work][:1])

    def _of_stages(self, outline: Outline) -> list[Classes]:
        """What stages send each other, which is of no program."""
        return [self._of_collective(("pp",), "send_receive", None)] * len(outline.labels)

    def _of_collective(self, axes: tuple[Axis, ...], collective: Collective, ranks: int | None) -> Classes:
        key = (axes, collective, ranks)
        if key not in self._collectives:
            nodes = nodes_of(self.prepared.world, axes, self.gpus_per_node, ranks)
            paths = self.comm.coefficients_of(collective, nodes)
            self._collectives[key] = tuple(
                path for path in paths if path.startswith(("collectives.", "sends.", "between_nodes."))
            )
        return self._collectives[key]

    def flagged(self) -> tuple[str, ...]:
        """Classes in use whose calibration missed its limit."""
        used = {name for own in self.classes.values() for classes in own for name in classes}
        found = {name: held_out_of(self.profile, (name,)) for name in used}
        return tuple(sorted(name for name, error in found.items() if error and error.flagged))

    def band(self) -> ErrorBand:
        """The error band of the step and of one layer."""
        step: Counter[Classes] = Counter()
        first: dict[str, Recording] = {}
        for recording, (_, count) in self.trace.recordings.items():
            segment = self.prepared.by_outline.get(recording.outline)
            if segment and self.rank in recording.times:
                first.setdefault(segment.variant_of or segment.name, recording)
            step.update({classes: count * time for classes, time in self._times(recording)})
        known = sum(time for classes, time in step.items() if held_out_of(self.profile, classes))
        layers = {phase: self._layer(phase, first) for phase in ("forward", "backward")}
        return ErrorBand(
            self._percent(step, self.trace.end_ps),
            self._percent(layers["forward"], layers["forward"].total()),
            self._percent(layers["backward"], layers["backward"].total()),
            known / self.trace.end_ps if self.trace.end_ps else 0.0,
        )

    def _layer(self, phase: Pass, recordings: Mapping[str, Recording]) -> Counter[Classes]:
        """Picoseconds by class of one pass of the first layer, from recordings by the segment that they are of."""
        total: Counter[Classes] = Counter()
        for part in self.prepared.passes[phase].parts if phase in self.prepared.passes else ():
            recording = recordings.get(part.segment.name)
            times = self._times(recording) if recording else ()
            total.update({classes: part.runs * time for classes, time in dict(times).items()})
        return total

    def _times(self, recording: Recording) -> Iterator[tuple[Classes, float]]:
        """Picoseconds by class of one pass: of kernels, and of communication while none runs, which it makes wait.
        Nothing of what other stages run.
        """
        if self.rank not in recording.times:
            return
        classes = self.classes.get(recording.outline) or self._of_stages(recording.outline)
        spans = [span for span in recording.spans if span.rank == self.rank]
        kernels: Counter[Classes] = Counter()
        transfers: Counter[Classes] = Counter()
        for span in spans:
            counter = kernels if span.lane == COMPUTE_LANE else transfers
            counter[classes[span.task]] += span.end_ps - span.start_ps
        length = max(span.end_ps for span in spans) - min(span.posted_ps for span in spans)
        share = (length - kernels.total()) / transfers.total() if transfers.total() else 0.0
        yield from kernels.items()
        yield from ((name, share * time) for name, time in transfers.items())

    def _percent(self, times: Mapping[Classes, float], length: float) -> float | None:
        errors = {classes: held_out_of(self.profile, classes) for classes in times}
        parts = [times[classes] / length * error.error_percent for classes, error in errors.items() if error]
        return sqrt(sum(part**2 for part in parts)) if parts else None
