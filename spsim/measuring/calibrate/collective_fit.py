"""Curves of collectives: the measured bus bandwidth over the message size, by level, collective and ranks.

A curve is what was measured; only the latency of small messages and its change per step are fitted. A curve
serves its number of ranks and those below it that no smaller measurement describes; the largest serves all
beyond. Held out is every other size, each in turn, whose time the rest interpolate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import numpy as np

from spsim.costs.collectives import CommCost
from spsim.costs.curves import CurveTime, algorithm_steps
from spsim.inputs.collective_curves import CollectiveCurve
from spsim.inputs.hardware import HardwareProfile, Level
from spsim.measuring.calibrate.coefficients import with_leaves, without_laws
from spsim.measuring.calibrate.kernel_fit import Fit
from spsim.measuring.calibrate.outcome import ClassFit, Seconds
from spsim.measuring.calibrate.records import Measurement, RowError
from spsim.measuring.calibrate.samples import timed
from spsim.measuring.calibrate.session import title
from spsim.measuring.calibrate.solver import rounded
from spsim.program.placement import Collective, sent_bytes
from spsim.units import GB, US_PER_S

Algorithm = Literal["ring", "nvls", "pairwise", "send_receive"]

SMALLEST = 3
"""Sizes whose median time is the latency: below a page or two the wire takes no time."""
SMALL_BYTES = 16 * 1024
"""Largest message whose time may count as latency."""
PENDING = "pending"
"""Source of a curve until the profile names it."""


@dataclass(frozen=True)
class Series:
    """Times of one collective at one level among some ranks, by message size."""

    level: str
    collective: Collective
    ranks: int
    measured: Mapping[int, float]
    """Message bytes -> seconds, sizes increasing."""

    @cached_property
    def times(self) -> Mapping[int, float]:
        """The same, but no message takes longer than a larger one: what disturbs a measurement only adds time."""
        least = list(accumulate(reversed(list(self.measured.values())), min))[::-1]
        return dict(zip(self.measured, least, strict=True))

    @property
    def sizes(self) -> list[int]:
        """Message sizes."""
        return list(self.measured)

    @property
    def latency(self) -> float:
        """Seconds of the smallest messages."""
        small = [size for size in self.sizes[:SMALLEST] if size <= SMALL_BYTES] or self.sizes[:1]
        return float(np.median([self.times[size] for size in small]))

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """(message bytes, bus bandwidth in GB/s)."""
        return tuple(
            (float(size), rounded(sent_bytes(self.collective, size, self.ranks) / time / GB))
            for size, time in self.times.items()
        )

    def without(self, left_out: Sequence[int]) -> Series:
        """The same with some sizes left out."""
        kept = {size: time for size, time in self.measured.items() if size not in left_out}
        return Series(self.level, self.collective, self.ranks, kept)

    def curve(self, algorithm: Algorithm, step_latency_us: float = 0.0) -> CollectiveCurve:
        """The measured points."""
        return CollectiveCurve(
            source=PENDING, algorithm=algorithm, ranks=self.ranks, latency_us=rounded(self.latency * US_PER_S),
            step_latency_us=rounded(step_latency_us), points=self.points,
        )  # fmt: skip


def measured_series(rows: Sequence[Measurement], profile: HardwareProfile) -> list[Series]:
    """The series that make curves: within the node, or between nodes with one rank of each."""
    times: dict[tuple[str, Collective, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = [level.name for level in profile.datasheet.topology]
    for row in timed(rows, "collective"):
        if row.level not in names:
            raise RowError(
                row,
                f"{title(row)}: {profile.name} has no level {row.level!r}, only {', '.join(names)}; "
                "give the --base that it was measured with",
            )
        _check_fits(row, profile)
        if (row.nodes or 1) in (1, row.ranks):
            message, time = row.message_bytes or 0, row.time_us or 0.0
            times[row.level, row.name, row.ranks or 0][message].append(time / US_PER_S)  # type: ignore[index]
    return [
        Series(*key, {size: float(np.median(found)) for size, found in sorted(by_size.items())})
        for key, by_size in sorted(times.items())
    ]


def _check_fits(row: Measurement, profile: HardwareProfile) -> None:
    """Raise `RowError` where a level, or a node, has fewer GPUs than the row has ranks."""
    ranks, per_node = row.ranks or 0, (row.ranks or 0) // (row.nodes or 1)
    level = next(level for level in profile.datasheet.topology if level.name == row.level)
    if ranks > (level.gpus or ranks) or per_node > profile.gpus_per_node:
        raise RowError(
            row,
            f"{title(row)}: {profile.name} has {level.gpus or profile.gpus_per_node} GPUs "
            f"{'at this level' if level.gpus else 'in a node'}; give the --base that it was measured with",
        )


def fit_collectives(rows: Sequence[Measurement], profile: HardwareProfile) -> Fit:
    """Curves of every measured collective; those of the base stay where nothing was measured."""
    groups: dict[tuple[str, Collective], list[Series]] = {}
    for series in measured_series(rows, profile):
        groups.setdefault((series.level, series.collective), []).append(series)
    classes = []
    for (name, collective), group in groups.items():
        level = next(level for level in profile.datasheet.topology if level.name == name)
        path = f"collectives.{name}.{collective}"
        base = profile.coefficients.collectives.get(name, {}).get(collective, ())
        classes.append(_class(path, group, level))
        if collective != "all_to_all":
            profile = without_laws(profile, name, collective)
        profile = with_leaves(profile, {path: _curves(group, base, level)})
    return Fit(profile, tuple(classes))


def _class(path: str, group: Sequence[Series], level: Level) -> ClassFit:
    measured = np.array([time for series in group for time in series.measured.values()])
    held_out = np.array([time for series in group for time in _left_out_times(series, level)])
    fitted = np.array([_time(series, level, size) for series in group for size in series.sizes])
    found = {
        f"{series.ranks} ranks": f"latency {series.latency * US_PER_S:.4g} us, "
        f"up to {max(rate for _, rate in series.points):g} GB/s"
        for series in group
    }
    return ClassFit(f"{group[0].collective} {level.name}", found, measured, fitted, held_out, (path,))


def _time(series: Series, level: Level, size: int) -> float:
    curve = series.curve("ring")
    return CurveTime(curve, series.collective, full_mesh=level.kind == "full_mesh")(size, series.ranks)


def _left_out_times(series: Series, level: Level) -> Seconds:
    """The time at each size but the first and last from the sizes beside it; every other one left out at once."""
    times = np.full(len(series.sizes), np.nan)
    for start in (1, 2):
        out = series.sizes[start:-1:2]
        rest = series.without(out)
        for size in out:
            times[series.sizes.index(size)] = _time(rest, level, size)
    return times


def _curves(
    group: Sequence[Series], base: Sequence[CollectiveCurve], level: Level
) -> tuple[CollectiveCurve, ...]:  # fmt: skip
    """A curve per number of ranks; a ring of the base stays where only in-network reduction was measured."""
    found: list[CollectiveCurve] = []
    named = [(algorithm_of(series, base, level), series) for series in group]
    for algorithm in dict.fromkeys(algorithm for algorithm, _ in named):
        own = [series for name, series in named if name == algorithm]
        step = _step_latency(own, algorithm, base)
        fewest = [_fewest(algorithm, base), *(series.ranks + 1 for series in own[:-1])]
        for least, series in zip(fewest, own, strict=True):
            limits = {"min_ranks": min(least, series.ranks), "max_ranks": None if series is own[-1] else series.ranks}
            found.append(series.curve(algorithm, step).model_copy(update=limits))
    rings = [curve for curve in base if curve.algorithm == "ring"]
    return tuple(found) if any(c.algorithm != "nvls" for c in found) else (*rings, *found)


def _fewest(algorithm: Algorithm, base: Sequence[CollectiveCurve]) -> int:
    return min((curve.min_ranks for curve in base if curve.algorithm == algorithm), default=2)


def algorithm_of(series: Series, base: Sequence[CollectiveCurve], level: Level) -> Algorithm:
    """What the library uses: in the network where the level can, from as many ranks as the base says."""
    if series.collective in level.in_network_reduction and series.ranks >= _fewest("nvls", base):
        return "nvls"
    return "pairwise" if series.collective == "all_to_all" else (
        "send_receive" if series.collective == "send_receive" else "ring"
    )  # fmt: skip


def _step_latency(group: Sequence[Series], algorithm: Algorithm, base: Sequence[CollectiveCurve]) -> float:
    """Microseconds per step: the slope over the numbers of ranks, else of the base, else all of the latency."""
    steps = [algorithm_steps(algorithm, series.collective, series.ranks) for series in group]
    latencies = [series.latency * US_PER_S for series in group]
    if algorithm in ("nvls", "send_receive"):
        return 0.0
    if len(set(steps)) > 1:
        return max(0.0, float(np.polyfit(steps, latencies, 1)[0]))
    known = [curve.step_latency_us for curve in base if curve.algorithm == algorithm]
    return min(known[0], latencies[0] / steps[0]) if known else latencies[0] / steps[0]


def check_over_nodes(rows: Sequence[Measurement], profile: HardwareProfile) -> ClassFit | None:
    """Collectives of several ranks on each of several nodes: composed of the curves of both levels, not fitted."""
    comm = CommCost(profile)
    found = [
        (row.time_us / US_PER_S, comm.time(row.name, row.message_bytes, row.ranks, row.nodes))  # type: ignore[arg-type]
        for row in timed(rows, "collective")
        if row.ranks and row.nodes and row.message_bytes and row.time_us and 1 < row.nodes < row.ranks
    ]
    if not found:
        return None
    measured, composed = np.array(found).T
    return ClassFit("collectives over nodes", {}, measured, composed, composed, ())
