"""Where whole steps go: from the ideal time of the model's FLOPs a bar for each part, down to the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spsim.plots.colours import COLOURS, MUTED
from spsim.plots.figure import add_legend, add_title, describe, describe_workload
from spsim.plots.waterfall import TOTAL, Panel, Row, draw_panels
from spsim.results.accounts import IDLE, PEERS, SLOWED, STAGES, SYNC, is_exposed
from spsim.results.result import Result
from spsim.results.waterfall import IDEAL, REST, noticeable
from spsim.units import MS_PER_S, US_PER_S

KERNELS, COMMUNICATION, WAITS = "kernels", "communication", "waiting"
LOOKS = {KERNELS: COLOURS["gemm"], COMMUNICATION: COLOURS["communication"], WAITS: COLOURS["softmax"], REST: MUTED}


def plot_steps(results: Mapping[str, Result]) -> Figure:
    """A panel for each run by its name, two beside each other, with the same parts on one scale."""
    runs = [*results.values()]
    longest = max(run.step_time_s for run in runs)
    scale, unit = (MS_PER_S, "ms") if longest >= 1 / MS_PER_S else (US_PER_S, "µs")
    falls = noticeable([run.waterfall for run in runs])
    headings = [*results] if len(runs) > 1 else [""]
    panels = [Panel(name, unit, [*_rows(fall, scale, unit)]) for name, fall in zip(headings, falls, strict=True)]
    figure = draw_panels(panels, min(2, len(panels)), together=True)
    add_legend(figure, [Patch(facecolor=colour, label=look) for look, colour in LOOKS.items() if _shown(look, falls)])
    scenario = runs[0].scenario
    model = describe(runs[0]) if len(runs) == 1 else f"{scenario.model.name}, {scenario.hardware.name}"
    add_title(figure, f"{model}: from ideal FLOPs to the step", f"{describe_workload(*runs)} · percent of each step")
    return figure


def _rows(fall: Mapping[str, float], scale: float, unit: str) -> Iterator[Row]:
    step, level = sum(fall.values()), 0.0
    for part, took in fall.items():
        look = TOTAL if part == IDEAL else LOOKS[_look(part)]
        label = f"{took * scale:.1f} {unit} ({100 * took / step:.1f} %)"
        yield Row(part, level * scale, (level + took) * scale, look, label)
        level += took
    yield Row("step", 0.0, step * scale, TOTAL, f"{step * scale:.1f} {unit}")


def _look(part: str) -> str:
    """What a part is a kind of."""
    if is_exposed(part) or part in (SLOWED, SYNC):
        return COMMUNICATION
    return WAITS if part in (PEERS, STAGES, IDLE) else REST if part == REST else KERNELS


def _shown(look: str, falls: list[dict[str, float]]) -> bool:
    return any(_look(part) == look for fall in falls for part in fall if part != IDEAL)
