"""What perturbations cost: steps with and without them, how these spread over seeds, and who is to blame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spsim.errors import InputError
from spsim.inputs.perturbations import SlowRanks
from spsim.inputs.scenario import Scenario
from spsim.lazy import lazy
from spsim.program.mesh import mesh_of
from spsim.results.result import Result
from spsim.simulation import side_by_side, simulate
from spsim.step.blame import Blame, Culprit, blame
from spsim.step.blame_stages import blame_stages
from spsim.step.jitter import Draws
from spsim.step.lockstep import Lockstep
from spsim.step.lockstep_stages import StagedLockstep
from spsim.step.ranks import Ranks
from spsim.studies.comparison import LONGEST_REPR
from spsim.units import MIB, MS_PER_S, seconds

if TYPE_CHECKING:
    import pandas as pd

LEAST = 1e-9
"""In place of a drawn factor of 0: kernels take no time."""
AT_ONCE = 128 * MIB
"""Of arrays that a walk of many seeds keeps."""
MOST_SEEDS = 100_000
PERCENTILES = (50, 95, 99)
MOST_ROWS = 20
"""Of blame, in a document."""


Beyond = Counter[tuple[int, int, Culprit]]


class Share(NamedTuple):
    """What one rank, operator or both explain of the time that is lost."""

    lost_s: float
    share: float
    rank: int | None = None
    """The first of those that it stands for; None for all."""
    ranks: int | None = None
    """How many it stands for."""
    operator: str | None = None
    phase: str | None = None


@dataclass(frozen=True)
class PerturbedSteps:
    """Steps of a scenario under perturbations; times in seconds."""

    scenario: Scenario
    """With its perturbations."""
    before: Result
    """Unperturbed."""
    step_s: Sequence[float]
    """Of each seed; of one where nothing is drawn."""
    beyond: Beyond
    """First rank, how many are alike, operator -> picoseconds that it takes longer on the longest way, of all seeds."""

    def __repr__(self) -> str:
        own, mean_s = self.scenario, float(np.mean(self.step_s))
        shown = (
            f"PerturbedSteps({own.model.name} on {own.hardware.name}, {own.plan.label}: {MS_PER_S * mean_s:.3f} ms "
            f"instead of {self.before.step_time_s * MS_PER_S:.3f}; {', '.join(own.perturbations.labels)})"
        )
        return shorten(shown, LONGEST_REPR, placeholder=" …)")

    @lazy
    def after(self) -> Result | None:
        """Perturbed, simulated when somebody asks; None where jitter makes each seed another step."""
        return None if self.scenario.perturbations.jitters else simulate(self.scenario)

    @property
    def shown(self) -> list[int]:
        """For a picture the rank that explains most, or else the first that is perturbed, and its neighbour."""
        if self.after is None:
            return [0]
        marked = [rank for slow in self.scenario.perturbations.slow_ranks for rank in slow.ranks]
        first = next((own.rank for own in self.by_rank if own.rank is not None), marked[0] if marked else 0)
        world = self.before.prepared.world
        inner = [axis for axis in world.axes if axis not in ("pp", "dp", "shard")]
        return [first, world.neighbours(first, inner[-1])[0]] if inner else [first]

    @property
    def lost_s(self) -> float:
        """By which the mean step is longer."""
        return float(np.mean(self.step_s)) - self.before.step_time_s

    @property
    def percentiles_s(self) -> dict[int, float]:
        """Step times that so many percent of the seeds do not exceed, between two in a straight line."""
        found = np.percentile(self.step_s, PERCENTILES).tolist()
        return dict(zip(PERCENTILES, found, strict=True))

    @lazy
    def by_rank(self) -> list[Share]:
        """What each rank explains, the most first."""
        return self._shares(lambda rank, ranks, _: {"rank": rank, "ranks": ranks})

    @lazy
    def by_operator(self) -> list[Share]:
        """What each operator explains, of all ranks."""
        return self._shares(lambda _, __, culprit: culprit._asdict())

    @lazy
    def by_both(self) -> list[Share]:
        """What each operator of each rank explains."""
        return self._shares(lambda rank, ranks, culprit: {"rank": rank, "ranks": ranks, **culprit._asdict()})

    def _shares(self, key: Any) -> list[Share]:
        total = self.beyond.total()
        found: Counter[tuple[tuple[str, Any], ...]] = Counter()
        for own, ps in self.beyond.items():
            found[tuple(key(*own).items())] += ps
        ordered = sorted(found.items(), key=lambda row: (-abs(row[1]), str(row[0])))
        return [Share(self.lost_s * ps / total, ps / total, **dict(own)) for own, ps in ordered if ps]

    def to_json(self) -> dict[str, Any]:
        """The document of `run --perturb --json`; without what shares of blame do not say."""
        times = {f"p{percent}_ms": MS_PER_S * time for percent, time in self.percentiles_s.items()}
        return {
            "perturbations": self.scenario.perturbations.labels,
            "seeds": len(self.step_s),
            "before_ms": MS_PER_S * self.before.step_time_s,
            "after_ms": {
                "mean_ms": MS_PER_S * float(np.mean(self.step_s)),
                "min_ms": MS_PER_S * min(self.step_s),
                "max_ms": MS_PER_S * max(self.step_s),
                **times,
            },
            "lost_ms": MS_PER_S * self.lost_s,
            "blame": {
                "by_rank": [*_rows(self.by_rank)],
                "by_operator": [*_rows(self.by_operator)],
                "by_rank_and_operator": [*_rows(self.by_both)],
            },
        }

    def frame(self) -> pd.DataFrame:
        """The step of each seed, counted from that of the jitter."""
        import pandas as pd

        return pd.DataFrame({"seed": range(len(self.step_s)), "step_ms": [MS_PER_S * time for time in self.step_s]})

    def plot(self, path: str | Path) -> None:
        """Draw the step before and after, and the spread over seeds; see `plots.plot_perturbed`."""
        from spsim import plots

        plots.save(plots.plot_perturbed(self), Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write a page that a browser opens without a network: what is lost, over seeds, and who is to blame."""
        from spsim.report.page import write_perturbed

        write_perturbed(self, Path(path))


def _rows(shares: Sequence[Share]) -> Iterator[dict[str, Any]]:
    for share in shares[:MOST_ROWS]:
        own = {name: value for name, value in share._asdict().items() if value is not None}
        yield {"lost_ms": MS_PER_S * own.pop("lost_s"), **own}


def perturb(scenario: Scenario, perturbations: Any = None, *, seeds: int = 1) -> PerturbedSteps:
    """Simulate a scenario with and without perturbations: its own, or what is given, a TOML file, tables or objects.
    Where they draw jitter, `seeds` steps are simulated, of seeds that count from that of the jitter.

    Raises `InputError` where a perturbation is of no rank or link of the plan, or cannot be simulated.
    """
    own = scenario if perturbations is None else scenario.perturbed(perturbations)
    before = simulate(scenario.perturbed(()))
    if not isinstance(seeds, int) or not 1 <= seeds <= MOST_SEEDS:
        raise InputError(f"perturb: seeds = {seeds!r} is no number from 1 to {MOST_SEEDS:,}")
    if not own.perturbations.jitters:
        step_ps, beyond = _certain(own)
    elif own.perturbations.windows or own.network == "flows":
        step_ps, beyond = [*_one_by_one(own, seeds)], Counter()
    else:
        step_ps, beyond = _of_seeds(own, seeds)
    return PerturbedSteps(own, before, [*map(seconds, step_ps)], beyond)


def _certain(scenario: Scenario) -> tuple[list[int], Beyond]:
    """The step where nothing is drawn, and the blame if it can be told."""
    with suppress(InputError):
        return _of_seeds(scenario, 1)
    return [simulate(scenario).step_ps], Counter()


def _one_by_one(scenario: Scenario, seeds: int) -> Iterator[int]:
    """The step of each seed where what is drawn is of ranks: to the engine each is a slow rank of its own."""
    own = scenario.perturbations
    if any(jitter.each == "kernel" and jitter.changes for jitter in own.jitters):
        raise InputError(
            "perturbations: jitter of each kernel is not simulated with from_s and to_s, nor with network = 'flows'; "
            'leave one of them out, or draw it with each = "rank"'
        )
    unlike, stages = Ranks(mesh_of(scenario.plan), "each"), scenario.plan.pp
    draws = Draws(own.jitters, unlike.shape, range(seeds))
    ranks = [unlike.on_stage(stage, rank) for stage in range(stages) for rank in unlike.in_rows]
    factors = np.concatenate([draws.whole_step(stage).reshape(-1, seeds) for stage in range(stages)])
    for drawn in factors.T.tolist():
        slow = [SlowRanks(ranks=(rank,), factor=max(factor, LEAST)) for rank, factor in zip(ranks, drawn, strict=True)]
        yield simulate(scenario.perturbed((*own.slow_ranks, *own.slow_links, *slow))).step_ps


def _of_seeds(scenario: Scenario, seeds: int) -> tuple[list[int], Beyond]:
    """The step of each seed, as many at once as fit."""
    walk, unperturbed = side_by_side(scenario, 1)
    step_ps: list[int] = []
    beyond: Beyond = Counter()
    at_once = max(1, AT_ONCE // walk.nbytes)
    for first in range(0, seeds, at_once):
        own = range(first, min(first + at_once, seeds))
        walk.seeds = len(own)
        draws = Draws(scenario.perturbations.jitters, walk.shape, own)
        if isinstance(walk, StagedLockstep) and isinstance(unperturbed, StagedLockstep):
            found = blame_stages(walk, unperturbed, draws)
        elif isinstance(walk, Lockstep) and isinstance(unperturbed, Lockstep):
            found = blame(walk, unperturbed, draws)
        beyond.update(_counted(walk.ranks, found))
        step_ps += found.ended.reshape(-1, len(own)).max(axis=0).tolist()
    return step_ps, beyond


def _counted(ranks: Ranks, found: Blame) -> Beyond:
    stages = next((len(own) for own in found.beyond.values()), 0) // ranks.number
    alike = [(rank, len(ranks.copies[rank])) for rank in ranks.in_rows]
    copies = [(ranks.on_stage(stage, rank), count) for stage in range(stages) for rank, count in alike]
    return Counter(
        {
            (*own, culprit): int(ps)
            for culprit, by_rank in found.beyond.items()
            for own, ps in zip(copies, by_rank, strict=True)
            if ps
        }
    )
