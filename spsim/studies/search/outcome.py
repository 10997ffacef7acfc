"""What a search has found: the best plans and what the next takes more, the front of time and memory, all plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan, plan_text
from spsim.inputs.scenario import Scenario
from spsim.results.document import SCHEMA_VERSION
from spsim.simulation import simulate
from spsim.studies.comparison import LABELLED, LONGEST_REPR, SHARDED, Difference
from spsim.studies.plan_accounts import PlanAccount
from spsim.studies.ranking import tie
from spsim.studies.search.candidates import Candidate
from spsim.studies.search.rounds import Row, fits
from spsim.units import MS_PER_S

if TYPE_CHECKING:
    import pandas as pd

SECONDS_PER_HOUR = 3600
FITS, TOO_LARGE, FAILED = "fits", "does not fit", "failed"
"""What a plan that was simulated came to,"""
CANNOT_FIT, CANNOT_WIN = "cannot fit", "cannot be among the best"
"""and why it was not."""


@dataclass(frozen=True)
class Found:
    """A plan that was simulated and fits."""

    candidate: Candidate
    row: Row
    """Of a sweep."""

    def __repr__(self) -> str:
        shown = f"Found({self.plan.text}, micro_batch={self.candidate.micro_batch}: {MS_PER_S * self.step_s:.3f} ms)"
        return shorten(shown, LONGEST_REPR, placeholder=" …)")

    @property
    def plan(self) -> Plan:
        """Degrees and options."""
        return self.candidate.plan

    @property
    def scenario(self) -> Scenario:
        """To simulate or to write for a library."""
        own = self.candidate.family.scenario
        return Scenario(hardware=own.hardware, model=own.model, plan=own.plan, workload=self.candidate.workload)

    @property
    def step_s(self) -> float:
        """Time of a step."""
        return float(self.row["step_time_ms"]) / MS_PER_S

    @property
    def memory_gib(self) -> float:
        """Of the fullest GPU, with what is not the tensors'."""
        return float(self.row["device_memory_gib"])

    @property
    def headroom_gib(self) -> float:
        """What that leaves of its memory."""
        return float(self.row["capacity_gib"]) - self.memory_gib

    @property
    def name(self) -> str:
        """Label, further options and micro-batch."""
        shown = (*LABELLED, *SHARDED) if "ZeRO" in self.plan.label else LABELLED
        further = {name: value for name, value in self.plan.differing.items() if name not in shown}
        micro_batch = f"micro-batch {self.candidate.micro_batch}"
        return ", ".join([self.plan.label, *filter(None, plan_text(further).split(",")), micro_batch])

    def gpu_hours(self, tokens: int) -> float:
        """Of all GPUs together, for so many tokens."""
        return tokens / float(self.row["tokens_per_s_per_gpu"]) / SECONDS_PER_HOUR

    def to_json(self) -> dict[str, Any]:
        """What a list of plans shows."""
        return {
            "name": self.name,
            "plan": self.plan.text,
            "seq_len": self.candidate.seq_len,
            "micro_batch": self.candidate.micro_batch,
            "step_time_s": self.step_s,
            "mfu": self.row["mfu"],
            "tokens_per_s_per_gpu": self.row["tokens_per_s_per_gpu"],
            "device_memory_gib": self.memory_gib,
            "headroom_gib": self.headroom_gib,
        }


@dataclass(frozen=True)
class PlanSearch:
    """A search that found a plan at least."""

    hardware: HardwareProfile
    gpus: int
    candidates: Sequence[Candidate]
    """All plans with their bounds."""
    rows: Mapping[int, Row]
    """Of those that were simulated, by their place among all."""
    refused: Mapping[str, int]
    """Rules that combinations broke, which are no plans, and how many."""
    most: int
    """As many best plans are asked for."""
    tokens: int | None = None
    """For which GPU-hours are asked for."""

    def __repr__(self) -> str:
        shown = (
            f"PlanSearch({len(self.candidates)} plans of {self.gpus} GPUs of {self.hardware.name}, best "
            f"{self.found[0]!r})"
        )
        return shorten(shown, LONGEST_REPR, placeholder=" …)")

    @cached_property
    def found(self) -> list[Found]:
        """All that were simulated and fit, the shortest step first."""
        fitting = [Found(self.candidates[place], row) for place, row in sorted(self.rows.items()) if fits(row)]
        return sorted(fitting, key=lambda own: (own.step_s, own.memory_gib))

    @property
    def best(self) -> list[Found]:
        """The shortest steps: those that simulating all plans would find."""
        return self.found[: self.most]

    @property
    def front(self) -> list[Found]:
        """No plan is shorter and takes less memory than one of these; the shortest step first."""
        found: list[Found] = []
        for own in self.found:
            if not found or own.memory_gib < found[-1].memory_gib:
                found.append(own)
        return found

    @cached_property
    def accounts(self) -> list[PlanAccount]:
        """Where the time and the memory of the best plans go."""
        return [PlanAccount(own.name, own.plan.text, simulate(own.scenario)) for own in self.best]

    @cached_property
    def differences(self) -> list[Difference]:
        """From each of the best to the next."""
        return [Difference(one, other) for one, other in pairwise(self.accounts)]

    @property
    def tied(self) -> list[int]:
        """Places among what was found that tie with the first."""
        first, *others = self.found
        return [place for place, own in enumerate(others, 1) if tie(first.row, own.row, self.hardware)]

    @cached_property
    def outcomes(self) -> list[str]:
        """What became of each plan."""
        return [self._outcome(place) for place in range(len(self.candidates))]

    def _outcome(self, place: int) -> str:
        row = self.rows.get(place)
        if row is None:
            room = next(iter(self.rows.values()))["capacity_gib"]
            return CANNOT_FIT if self.candidates[place].memory_gib > room else CANNOT_WIN
        return FAILED if row["error"] else FITS if fits(row) else TOO_LARGE

    @property
    def counts(self) -> dict[str, int]:
        """How many plans came to what."""
        count = Counter(self.outcomes)
        return {name: count[name] for name in (CANNOT_FIT, CANNOT_WIN, TOO_LARGE, FAILED, FITS)}

    def frame(self) -> pd.DataFrame:
        """A row for each plan: what became of it, its bounds, and the columns of a sweep where it was simulated."""
        import pandas as pd

        every = self.candidates
        families = {id(own.family): (own.plan.label, own.plan.text) for own in every}
        labels, texts = zip(*(families[id(own.family)] for own in every), strict=True)
        own = {
            "strategy": labels,
            "plan": texts,
            "seq_len": [own.seq_len for own in every],
            "micro_batch": [own.micro_batch for own in every],
            "outcome": self.outcomes,
            "least_step_time_ms": [own.step_s * MS_PER_S for own in every],
            "least_device_memory_gib": [own.memory_gib for own in every],
        }
        simulated = pd.DataFrame.from_dict(dict(self.rows), orient="index")
        return pd.DataFrame(own).join(simulated.drop(columns=[name for name in own if name in simulated]))

    def plot_front(self, path: str | Path) -> None:
        """Draw time against memory; see `plots.plot_front`."""
        from spsim import plots

        plots.save(plots.plot_front(self), path)

    def to_html(self, path: str | Path) -> None:
        """Write the page of the search, which a browser opens without a network."""
        from spsim.report.page import write_search

        write_search(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`."""
        scenario = self.best[0].scenario
        return {
            "schema_version": SCHEMA_VERSION,
            "hardware": self.hardware.name,
            "model": scenario.model.name,
            "gpus": self.gpus,
            "workload": scenario.workload.model_dump(exclude={"micro_batch"}),
            "plans": len(self.candidates),
            "outcomes": self.counts,
            "refused": dict(self.refused),
            "best": [self._document(place) for place in range(len(self.best))],
            "tied_with_first": [self.found[place].name for place in self.tied],
            "front": [own.to_json() for own in self.front],
        }

    def _document(self, place: int) -> dict[str, Any]:
        """One of the best, with its difference to the next."""
        own = self.best[place]
        hours = {} if self.tokens is None else {"gpu_hours": own.gpu_hours(self.tokens)}
        ahead = {"ahead_of_next": self.differences[place].to_json()} if place < len(self.differences) else {}
        return {**own.to_json(), **hours, **ahead}
