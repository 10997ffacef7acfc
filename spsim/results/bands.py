"""How far shipped profiles are off, from published measurements: bands of times and of ratios between plans.

A profile that no calibration wrote has no held-out errors of its own. What there is are the rows of `validate`, of
`experiments/collectives.py` and of `experiments/longcontext.py`; `experiments/bands.py` makes a table of them:

- **ratio**: of two plans measured beside each other, predicted over measured ratio of their times. What both plans
  share cancels, so this is the band of a difference. A family of pairs is what the plans differ in, on machines whose
  GPUs are joined in one way.
- **time**: predicted over measured times of whole training steps, on a machine, on machines joined in one way, or on
  any; where no steps were measured, of layers, else of attention alone.
- **part**: the same of collectives and of core attention, to flag results that are made of parts known to be far off.

Ratios are of layers, since no published steps of one model differ in one of those ways; else of attention alone. Plans
that differ in how a step is spread over stages or what else no pairs were measured of have the band of times.

A band is the 90th percentile, as that of a calibration is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import exp, log, sqrt
from typing import TYPE_CHECKING

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.resources import error_bands, read_text
from spsim.program.placement import Collective
from spsim.units import MIB

if TYPE_CHECKING:
    from spsim.results.result import Result

FAR_OFF_PERCENT = 25.0
"""Error from which on a part is known to be far off: the median of every published table reaches it."""
FEWEST_ROWS = 3
"""Rows of a part below which nothing is said of it."""
SIZES = (0, MIB, 32 * MIB, 256 * MIB, 2**60)
"""Where messages of collectives are divided, in bytes."""
FEW_NODES = 4
"""Up to so many nodes are one family, and all beyond another."""
REPEATED_PERCENT = 1.0
"""The least that published runs of one configuration differ by, of 1 to 5: no ratio of measured times says less."""
ANY = "any"
"""All machines together."""


@dataclass(frozen=True, slots=True)
class Band:
    """A half-width in percent and where it comes from."""

    percent: float
    of: str
    """What was measured, in words."""
    rows: int = 0
    """Measurements, or pairs of them; none for held-out errors of a calibration."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table."""

    what: str
    """Of what: `steps`, `layers`, `attention` or `collective`."""
    rows: int
    best: float
    """Median error of the table that agrees best."""
    p90: float


Key = tuple[str, str, str, int]
"""What it is of, machine, family, smallest message."""


@cache
def table() -> Mapping[Key, Entry]:
    """The shipped bands."""
    reader = csv.DictReader(io.StringIO(read_text(error_bands())))
    return {
        (row["of"], row["machine"], row["family"], int(row["from_bytes"] or 0)): Entry(
            row["what"], int(row["rows"]), float(row["best_table_percent"]), float(row["p90_percent"])
        )
        for row in reader
    }


# Families


def link(hardware: HardwareProfile) -> str:
    """How the GPUs of a node are joined."""
    return hardware.datasheet.topology[0].kind


_OF_FAMILIES = ("tp", "sequence_parallel", "ulysses", "ring", "ring_cut", "recompute", "recompute_modules")
"""Options of a plan that families are made of."""
_STATE = ("distributed_optimizer", "zero", "moment_dtype", "precision_aware_optimizer")
"""How and in what optimizer state is kept: it changes the end of a step alone."""


def pair_families(one: Plan, other: Plan) -> tuple[str, ...]:
    """What two plans differ in, one family for each; how optimizer state is kept is left out."""
    degrees = [(plan.tp, plan.ulysses, plan.ring) for plan in (one, other)]
    found = []
    if degrees[0] != degrees[1]:
        axis = "the ring" if one.ring + other.ring > 2 else "Ulysses" if one.ulysses + other.ulysses > 2 else "tp"
        found.append(f"degree of {axis}")
    if one.tp > 1 < other.tp and one.sequence_parallel != other.sequence_parallel:
        found.append("sequence parallelism")
    if one.ring > 1 < other.ring and one.ring_cut != other.ring_cut:
        found.append("ring cut")
    if (one.recompute, one.recompute_modules) != (other.recompute, other.recompute_modules):
        found.append("recomputation")
    further = [name for name in Plan.model_fields if name not in (*_OF_FAMILIES, *_STATE)]
    found += [name for name in further if getattr(one, name) != getattr(other, name)]
    return tuple(found)


def collective_family(collective: Collective, ranks: int, nodes: int) -> str:
    """A kind of collective by how its group lies on nodes."""
    across = f"2 to {FEW_NODES}" if nodes <= FEW_NODES else f"more than {FEW_NODES}"
    where = f"among {ranks} GPUs of a node" if nodes == 1 else f"over {across} nodes, {ranks // nodes} GPUs of each"
    return f"{collective.replace('_', '-')} {where}"


def attention_family(plan: Plan, head_dim: int) -> str:
    """Core attention by how it is split, and its head size."""
    ways = [name for name, degree in (("ulysses", plan.ulysses), ("ring", plan.ring)) if degree > 1]
    return f"attention under {' x '.join(ways) or 'one GPU'}, head size {head_dim}"


# Bands


def lead(one: float, other: float) -> float:
    """By how many percent the longer of two times is longer."""
    return 100 * (max(one, other) / min(one, other) - 1)


def off_by(ratio: float) -> float:
    """By how many percent a ratio is off, up or down alike."""
    return 100 * (exp(abs(log(ratio))) - 1)


EXPERTS = "experts"
BIASED_EXPERTS = "experts with biases"
"""Families of times of models with experts; others have none."""


def family_of(model: object) -> str:
    """The family of a model's times."""
    if getattr(model, "experts", None) is None:
        return ""
    return BIASED_EXPERTS if getattr(model, "mlp_bias", False) else EXPERTS


def of_time(hardware: HardwareProfile, family: str = "") -> Band:
    """The band of a time, from measurements on the machine, on those joined in the same way, or on any; of models with
    experts from those of such.
    """
    machines = {
        hardware.name: f"on {hardware.name}",
        link(hardware): f"on GPUs joined by a {link(hardware).replace('_', ' ')}",
        ANY: "on any machine",
    }
    found = ((table().get(("time", machine, family, 0)), where) for machine, where in machines.items())
    entry, where = next((entry, where) for entry, where in found if entry)
    return Band(entry.p90, f"times of {entry.what}{f' with {family}' if family else ''} measured {where}", entry.rows)


def of_pair(hardware: HardwareProfile, one: Plan, other: Plan) -> Band:
    """The band of the ratio between two plans: of all that they differ in together, as errors of independent causes,
    but not below what measurements can tell; of times where there are no pairs, as there are none of plans that spread
    experts.
    """
    if one.ep > 1 or other.ep > 1:
        return of_time(hardware, EXPERTS)
    families = pair_families(one, other)
    entries = [table().get(("ratio", link(hardware), family, 0)) for family in families]
    known = [entry for entry in entries if entry]
    if not known or len(known) < len(families):
        return of_time(hardware)
    percent = max(sqrt(sum(entry.p90**2 for entry in known)), REPEATED_PERCENT)
    what = " and ".join(dict.fromkeys(entry.what for entry in known))
    words = f"ratios of {what} measured under plans that differ in {' and '.join(families)}"
    return Band(percent, words, sum(entry.rows for entry in known))


# Parts that are far off


def far_off(result: Result) -> tuple[Band, ...]:
    """Collectives and core attention of a result that are known to be far off, each once; by at least so much."""
    scenario = result.scenario
    hardware, head_dim = scenario.hardware, getattr(scenario.model, "head_dim", None)
    found = [
        far_off_collective(hardware, call.timed_as, call.message_bytes, call.ranks, call.nodes)
        for call in result.collectives
    ]
    if head_dim is not None:
        found.append(far_off_attention(hardware, scenario.plan, head_dim))
    return tuple(dict.fromkeys(band for band in found if band))


def far_off_collective(
    hardware: HardwareProfile, collective: Collective, message: int, ranks: int, nodes: int
) -> Band | None:
    """How far a collective of that size is off, if that is known and far."""
    start = max(size for size in SIZES if size <= message)
    family = collective_family(collective, ranks, nodes)
    return _far_off(("part", hardware.name, family, start), f"{family}, {_sizes(start)}")


def far_off_attention(hardware: HardwareProfile, plan: Plan, head_dim: int) -> Band | None:
    """How far core attention under a plan is off, if that is known and far."""
    family = attention_family(plan, head_dim)
    return _far_off(("part", hardware.name, family, 0), family)


def _far_off(key: Key, words: str) -> Band | None:
    entry = table().get(key)
    if entry is None or entry.rows < FEWEST_ROWS or entry.best < FAR_OFF_PERCENT:
        return None
    return Band(entry.best, words, entry.rows)


def _sizes(start: int) -> str:
    end = next(size for size in SIZES if size > start)
    if not start:
        return f"below {end // MIB} MiB"
    return f"{start // MIB} MiB and more" if end == SIZES[-1] else f"{start // MIB} to {end // MIB} MiB"
