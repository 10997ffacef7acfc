"""What goes to a rank, and what one rank measured of one case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spsim.engine.pieces import Pass
from spsim.measuring.verify.cases import VerifyCase
from spsim.results.measured import MeasuredSpan

PASSES: tuple[Pass, ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Job:
    """One case, and how often."""

    case: VerifyCase
    warm_up: int
    repeats: int
    """Timed repetitions."""
    profiled: int
    """Repetitions that torch.profiler records, apart from the timed ones, which it would slow down."""


@dataclass(frozen=True, slots=True)
class RankMeasurement:
    """One case on one rank; the lists have one entry a repetition."""

    rank: int
    pass_s: Mapping[Pass, Sequence[float]]
    """Seconds from a barrier to the end of a pass, on the wall clock."""
    compute_s: Mapping[Pass, Sequence[float]]
    """Seconds of the kernels of a pass: the CPU clock of the thread, or the profiler's kernels on a GPU."""
    saved_bytes: Mapping[str, int]
    """Category -> bytes that autograd kept, each storage once."""
    collectives: Sequence[tuple[str, str, int]]
    """(pass, collective, message bytes) in issue order; what is recomputed is backward."""
    base_ns: int
    """Time of day from which the spans count."""
    spans: Sequence[MeasuredSpan]
    """Of the profiled repetitions, each a micro-batch."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the ranks run."""

    device: str
    """As its maker calls it."""
    backend: str
    torch: str
    compute_clock: str
