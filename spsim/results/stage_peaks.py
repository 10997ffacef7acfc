"""Where memory is fullest on each stage of a pipeline, and where it runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spsim.results import metrics
from spsim.results.derived import STATIC
from spsim.results.staged import Spot

if TYPE_CHECKING:
    from spsim.results.result import Result


def stage_peaks(result: Result) -> list[Spot]:
    """Of each stage, of several ranks that are simulated for one the fullest; empty where no plan makes stages."""
    plan, trace = result.scenario.plan, result.trace
    if result.staged:
        return result.staged.peaks(result.statics)
    if plan.pp == 1:
        return []
    static = {rank: own.total for rank, own in result.statics.items()}
    found: dict[int, Spot] = {}
    for rank in sorted(trace.copies):
        stage, peak = result.prepared.world.coordinate(rank, "pp"), metrics.peak_of(trace, rank, static[rank])
        if stage not in found or peak.bytes > found[stage].bytes:
            operator = None if peak.task is None else result.task_name(peak.task)
            found[stage] = Spot(stage, rank, peak.bytes, operator)
    return [*found.values()]


def running_out(result: Result) -> str:
    """The operator at which memory runs out, of what does not fit."""
    static, limit = result.static.total, result.limit
    if static > limit:
        return result.task_name(None)
    if result.known and result.spot:
        return result.known.first_above(result.spot.stage, static, limit) or STATIC
    return result.task_name(metrics.first_above(result.trace, result.peak.rank, static, limit))
