"""Measured against simulated: the same figures of the same layers, side by side."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from spsim.engine.pieces import Pass
from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.trace import Trace
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.scenario import Scenario
from spsim.measuring.processes.matching import describes
from spsim.measuring.processes.processes import RankError, RankMemoryError
from spsim.measuring.verify.cases import VerifyCase
from spsim.measuring.verify.ranks import RankPool
from spsim.measuring.verify.records import PASSES, Environment, Job, RankMeasurement
from spsim.program.instructions import Communication
from spsim.pytorch.kineto import align
from spsim.results.measured import MeasuredSpan, measured_trace
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.units import MS_PER_S, PS_PER_MS

WALL = "wall clock"
EXACT = ""
"""The clock of what is counted."""

Samples = Mapping[str, Sequence[float]]
"""Figure -> its values, one a repetition; on the slowest rank."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One figure of one case; its name ends in the unit."""

    name: str
    clock: str
    measured: float
    """Median over the repetitions."""
    p10: float
    p90: float
    predicted: float

    @property
    def error_percent(self) -> float:
        """Of the prediction; 0 where both are 0."""
        if self.measured == self.predicted:
            return 0.0
        return 100 * (self.predicted / self.measured - 1) if self.measured else float("inf")


@dataclass(frozen=True, slots=True)
class CaseComparison:
    """One case, run and simulated."""

    case: VerifyCase
    quantities: tuple[Quantity, ...]
    load_average: float
    """Of the reporting machine over the last minute, when the case had ended."""
    simulated: Result
    measured: Trace
    """The profiled repetition of median length."""

    def __getitem__(self, name: str) -> Quantity:
        return next(quantity for quantity in self.quantities if quantity.name == name)

    @property
    def bytes_equal(self) -> bool:
        """Whether saved bytes are as predicted, to the byte."""
        return all(q.measured == q.predicted for q in self.quantities if q.name.startswith("saved_"))

    @property
    def collectives_equal(self) -> bool:
        """Whether kinds, numbers and bytes of the collectives are as predicted."""
        counted = (q for q in self.quantities if q.clock == EXACT and not q.name.startswith("saved_"))
        return all(q.measured == q.predicted for q in counted)


@dataclass(frozen=True, slots=True)
class Verification:
    """All cases of one run."""

    hardware: HardwareProfile
    environment: Environment
    ranks: int
    cases: Sequence[CaseComparison]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Case -> why it was not measured."""
    failure: str = ""
    """Why the run ended before its last case, if it did."""

    @property
    def times_comparable(self) -> bool:
        """Whether the profile is of the device on which the layers ran."""
        return describes(self.hardware, self.environment.device, gpu=self.environment.backend != "gloo")

    @property
    def flagged(self) -> tuple[str, ...]:
        """Classes of coefficients that a case uses, and whose calibration missed its error limit."""
        return tuple(sorted({name for case in self.cases for name in case.simulated.flagged}))

    def to_frame(self) -> pd.DataFrame:
        """One row per case and figure."""
        return pd.DataFrame(
            [{**_about(found), **_figures(quantity)} for found in self.cases for quantity in found.quantities]
        )

    def errors(self) -> dict[str, dict[str, float]]:
        """Kind of time -> cases and passes, median and largest absolute error in percent."""
        found: dict[str, list[float]] = defaultdict(list)
        for case in self.cases:
            for quantity in case.quantities:
                if quantity.name.endswith("_ms") and quantity.measured:
                    found[time_kind(quantity.name)].append(abs(quantity.error_percent))
        return {
            kind: {"n": len(values), "median_percent": float(np.median(values)), "max_percent": max(values)}
            for kind, values in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The document of `verify --json`."""
        return {
            "hardware": self.hardware.name,
            "environment": asdict(self.environment),
            "ranks": self.ranks,
            "bytes_equal": all(case.bytes_equal for case in self.cases),
            "collectives_equal": all(case.collectives_equal for case in self.cases),
            "times_comparable": self.times_comparable,
            "flagged": list(self.flagged),
            "errors": self.errors(),
            "cases": [
                {**_about(found), "quantities": [_figures(quantity) for quantity in found.quantities]}
                for found in self.cases
            ],
            "skipped": dict(self.skipped),
            "failure": self.failure,
        }


def time_kind(name: str) -> str:
    """`compute`, `communication` or `pass` of the name of a time."""
    return next((kind for kind in ("compute", "communication") if kind in name), "pass")


def _about(found: CaseComparison) -> dict[str, Any]:
    case = found.case
    return {
        "case": case.name, "strategy": case.strategy, "attention": case.model.attention,
        "seq_len": case.workload.seq_len, "micro_batch": case.workload.micro_batch, "hidden": case.model.hidden,
        "heads": case.model.heads, "precision": case.workload.precision, "load_average": found.load_average,
    }  # fmt: skip


def _figures(quantity: Quantity) -> dict[str, Any]:
    return {**asdict(quantity), "error_percent": quantity.error_percent}


# Running


def verify(
    predictions: Sequence[Prediction],
    hardware: HardwareProfile,
    pool: RankPool,
    *,
    repeats: int = 10,
    profiled: int = 5,
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> Verification | None:
    """Run what was predicted; None on a rank that does not report.

    A case that needs too much memory is skipped; any other loss of a rank ends the run, and the result says so.
    """
    done: list[CaseComparison] = []
    skipped: dict[str, str] = {}
    failure, reports = "", True
    for number, prediction in enumerate(predictions):
        case = prediction.case
        progress(number, case.name)
        try:
            ranks = pool.run(Job(case, warm_up=2, repeats=repeats, profiled=profiled))
        except RankMemoryError as error:
            skipped[case.name] = str(error)
            continue
        except RankError as error:
            failure = str(error)
            break
        reports = ranks is not None
        if ranks is not None:
            done.append(_compare(prediction, ranks, pool.environment.compute_clock))
    if not reports:
        return None
    return Verification(hardware, pool.environment, pool.count, done, skipped, failure)


def _compare(prediction: Prediction, ranks: Sequence[RankMeasurement], compute_clock: str) -> CaseComparison:
    spans = align([(rank.base_ns, rank.spans) for rank in ranks])
    measured = {**_times(ranks), **_transfers(measured_trace(spans)), **_counts(ranks)}
    quantities = []
    for name in dict.fromkeys([*prediction.figures, *measured]):
        values = measured.get(name, (0.0,))
        p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
        timed = name.endswith("_ms")
        clock = (compute_clock if time_kind(name) == "compute" else WALL) if timed else EXACT
        quantities.append(Quantity(name, clock, median, p10, p90, prediction.figures.get(name, 0.0)))
    return CaseComparison(
        prediction.case, tuple(quantities), os.getloadavg()[0], prediction.result, _median_repetition(spans)
    )  # fmt: skip


# Measured figures


def _times(ranks: Sequence[RankMeasurement]) -> dict[str, list[float]]:
    found = {}
    for phase in PASSES:
        for name, per_rank in (
            (f"{phase}_compute_ms", [rank.compute_s[phase] for rank in ranks]),
            (f"{phase}_ms", [rank.pass_s[phase] for rank in ranks]),
        ):
            found[name] = [MS_PER_S * max(values) for values in zip(*per_rank, strict=True)]
    return found


def _transfers(trace: Trace) -> dict[str, list[float]]:
    """Milliseconds of communication of each pass and repetition, from the arrival of the last rank."""
    totals: dict[tuple[str, int | None], Counter[int]] = defaultdict(Counter)
    for span in trace.spans:
        info = trace.tasks[span.task]
        if info.collective and info.part in PASSES:
            totals[info.part, info.micro_batch][span.rank] += span.end_ps - span.start_ps
    found: dict[str, list[float]] = defaultdict(list)
    for (phase, _), per_rank in totals.items():
        found[f"{phase}_communication_ms"].append(max(per_rank.values()) / PS_PER_MS)
    return found


def _counts(ranks: Sequence[RankMeasurement]) -> dict[str, list[float]]:
    """Saved bytes of the fullest rank, and the collectives of the one that issued most."""
    saved = [_saved(rank.saved_bytes) for rank in ranks]
    most = max(ranks, key=lambda rank: len(rank.collectives))
    return {
        **{name: [float(max(own[name] for own in saved))] for name in saved[0]},
        **{name: [float(value)] for name, value in _collectives(most.collectives).items()},
    }


def _saved(by_category: Mapping[str, int]) -> dict[str, int]:
    activations = sum(size for name, size in by_category.items() if name in ("activation", "mask"))
    return {
        "saved_activation_bytes": activations, "saved_statistics_bytes": sum(by_category.values()) - activations
    }  # fmt: skip


def _collectives(issued: Iterable[tuple[str, str, int]]) -> Counter[str]:
    """Calls and bytes by pass and kind."""
    found: Counter[str] = Counter()
    for phase, kind, message in issued:
        found[f"{phase}_{kind}_calls"] += 1
        found[f"{phase}_{kind}_bytes"] += message
    return found


def _median_repetition(spans: Sequence[MeasuredSpan]) -> Trace:
    """The repetition whose two passes together take the median time."""
    lengths: dict[int, float] = defaultdict(float)
    for phase in PASSES:
        for number in {span.micro_batch for span in spans}:
            own = [s for s in spans if (s.phase, s.micro_batch) == (phase, number)]
            lengths[number] += max((s.end_us for s in own), default=0) - min((s.asked_us for s in own), default=0)
    middle = sorted(lengths, key=lengths.__getitem__)[len(lengths) // 2]
    return measured_trace(replace(span, micro_batch=0) for span in spans if span.micro_batch == middle)


# Predicted figures


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the simulation says of a case."""

    case: VerifyCase
    result: Result
    figures: Mapping[str, float]


def predict(case: VerifyCase, hardware: HardwareProfile) -> Prediction:
    """Simulate a case; `InputError` where the profile lacks what the plan needs.

    A CPU clock does not see what a collective takes from the core, so kernels are predicted undisturbed; the
    pass and its communication are predicted as they happen together.
    """
    hardware = _of_a_pass(hardware)
    result = simulate(_scenario(case, hardware))
    alone = simulate(_scenario(case, _undisturbed(hardware)))
    figures: dict[str, float] = {}
    for phase in PASSES:
        kernels, transfers = _lane_times(alone.trace, phase)[0], _lane_times(result.trace, phase)[1]
        figures[f"{phase}_compute_ms"] = kernels / PS_PER_MS
        figures[f"{phase}_communication_ms"] = transfers / PS_PER_MS
    figures["forward_ms"] = MS_PER_S * result.layer_forward_s
    figures["backward_ms"] = MS_PER_S * result.layer_backward_s
    figures["saved_activation_bytes"] = result.activation_bytes_per_layer
    figures["saved_statistics_bytes"] = result.statistics_bytes_per_layer
    passes = {"forward": result.program.forward, "backward": result.program.backward}
    steps = ((phase, step) for phase, found in passes.items() for step in found if isinstance(step, Communication))
    figures |= _collectives((phase, step.collective, step.message_bytes) for phase, step in steps)
    return Prediction(case, result, figures)


def _scenario(case: VerifyCase, hardware: HardwareProfile) -> Scenario:
    return Scenario(
        hardware=hardware, model=case.model, plan=case.plan, workload=case.workload, scope="layers"
    )  # fmt: skip


def _of_a_pass(hardware: HardwareProfile) -> HardwareProfile:
    """The profile as a pass of torch meets it that is measured by itself: a burst, too short for the power limit, whose
    weight gradients are added to nothing, of kernels that nobody fused.
    """
    gemm = hardware.coefficients.gemm
    nothing = {dtype: exposed.model_copy(update={"value": 0.0}) for dtype, exposed in gemm.accumulation_exposed.items()}
    coefficients = hardware.coefficients.model_copy(
        update={
            "gemm": gemm.model_copy(update={"sustained_limit": {}, "accumulation_exposed": nothing}),
            "fused_rates": {},
        }
    )
    return hardware.model_copy(update={"coefficients": coefficients})


def _undisturbed(hardware: HardwareProfile) -> HardwareProfile:
    """The profile without the slowdown of kernels by collectives."""
    coefficients = hardware.coefficients
    slowdown = coefficients.overlap_slowdown.model_copy(update={"value": 0.0})
    return hardware.model_copy(
        update={"coefficients": coefficients.model_copy(update={"overlap_slowdown": slowdown})}
    )  # fmt: skip


def _lane_times(trace: Trace, phase: Pass) -> tuple[int, int]:
    """Picoseconds of kernels, and of communication, of the layer's pass on the rank with most of each."""
    kernels: Counter[int] = Counter({0: 0})
    transfers: Counter[int] = Counter({0: 0})
    for recording, (of, count) in trace.recordings.items():
        if of == phase:
            for span in recording.spans:
                chosen = kernels if span.lane == COMPUTE_LANE else transfers
                chosen[span.rank] += count * (span.end_ps - span.start_ps)
    return max(kernels.values()), max(transfers.values())
