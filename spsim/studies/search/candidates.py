"""The plans of a space with their bounds. Blocks of plans that split them alike are priced once, here or by workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.workload import Precision, Workload, Workloads
from spsim.studies.points import Point
from spsim.studies.search.blocks import Blocks, blocks_of, of_blocks
from spsim.studies.search.bounds import bounds_of
from spsim.studies.search.space import Family, sized

JOBS = 32
"""Into which what is priced by an executor is divided."""
Size = tuple[int, int]
"""Sequence and micro-batch."""
Given = HardwareProfile | str | Path
"""Hardware as the user gave it: a name is less to send to a worker than a profile."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan for one size of workload, and what it cannot be better than."""

    family: Family
    seq_len: int
    micro_batch: int
    step_s: float
    memory_gib: float

    @property
    def plan(self) -> Plan:
        """That of the family."""
        return self.family.plan

    @property
    def workload(self) -> Workload:
        """With its sizes."""
        return sized(self.family.scenario.workload, self.seq_len, self.micro_batch)

    def point(self, hardware: Given) -> Point:
        """As a sweep takes it."""
        model = self.family.scenario.model
        return Point({"hardware": hardware, "model": model, "plan": self.plan, "workload": self.workload})


class Job(NamedTuple):
    """A plan that `of_blocks` has made, and all sizes that plans of these blocks have."""

    model: Model
    plan: Plan
    sizes: Sequence[Size]
    precision: Precision


def candidates(hardware: Given, families: Iterable[Family], executor: Executor | None) -> Iterator[Candidate]:
    """Every plan and size of some families."""
    groups: dict[Plan, list[Family]] = defaultdict(list)
    for family in families:
        if family.scenario.is_served:  # few, and simulated all: no bound of inference is known
            yield from (Candidate(family, *size, 0.0, 0.0) for size in _sizes(family))
            continue
        groups[of_blocks(family.plan)].append(family)
    jobs = [_job(plan, own) for plan, own in groups.items()]
    for job, blocks, own in zip(jobs, _priced(hardware, jobs, executor), groups.values(), strict=True):
        places = {size: place for place, size in enumerate(job.sizes)}
        for family in own:
            sizes = _sizes(family)
            bounds = bounds_of(family, blocks.at([places[size] for size in sizes]))
            for size, *least in zip(sizes, bounds.step_s.tolist(), bounds.memory_gib.tolist(), strict=True):
                yield Candidate(family, *size, *least)


def _job(plan: Plan, families: Sequence[Family]) -> Job:
    scenario = families[0].scenario
    sizes = dict.fromkeys(size for family in families for size in _sizes(family))
    return Job(scenario.model, plan, [*sizes], scenario.workload.precision)


def _sizes(family: Family) -> list[Size]:
    own = family.workloads
    return [*zip(own.seq_len.tolist(), own.micro_batch.tolist(), strict=True)]


def _priced(hardware: Given, jobs: Sequence[Job], executor: Executor | None) -> Iterator[Blocks]:
    if executor is None:
        yield from _price(hardware, jobs)
        return
    size = max(1, -(-len(jobs) // JOBS))
    parts = [executor.submit(_price, hardware, jobs[start : start + size]) for start in range(0, len(jobs), size)]
    for part in parts:
        yield from part.result()


def _price(hardware: Given, jobs: Sequence[Job]) -> list[Blocks]:
    """The blocks of each job; may run in a worker."""
    profile = load_profile(hardware) if isinstance(hardware, str | Path) else hardware
    found = []
    for job in jobs:
        seq_len, micro_batch = (np.array(column, dtype=np.int64) for column in zip(*job.sizes, strict=True))
        found.append(blocks_of(profile, job.model, job.plan, Workloads(seq_len, micro_batch, job.precision)))
    return found
