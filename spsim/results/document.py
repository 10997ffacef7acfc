"""A result for other programs, and in one line for people."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from spsim.results.derived import FITS_SCOPE
from spsim.results.figures import documented
from spsim.results.sensitivity import effects_document
from spsim.units import MS_PER_S

if TYPE_CHECKING:
    from spsim.results.result import Result

SCHEMA_VERSION = 2
"""Of the documents of `run --json` and `compare --json`; 1 had no number."""
LONGEST = 120
"""Characters of a name in one line."""


def brief(result: Result) -> str:
    """What `repr` shows: model, hardware, plan, time and memory."""
    scenario = result.scenario
    names = (scenario.model.name, scenario.hardware.name, scenario.plan.label)
    model, hardware, plan = (shorten(name, LONGEST, placeholder="…") for name in names)
    fits = "fits" if result.fits else "does not fit"
    return (
        f"{type(result).__name__}({model} on {hardware}, {plan}: {result.step_time_s * MS_PER_S:.3f} ms, "
        f"{result.device_memory_gib:.1f} of {result.capacity_gib:.1f} GiB, {fits})"
    )


def document(result: Result) -> dict[str, Any]:
    """Figures in SI units or those of their names, what they hang on, and how sure they are."""
    scenario = result.scenario
    return {
        "schema_version": SCHEMA_VERSION,
        "scope": result.scope,
        "hardware": scenario.hardware.name,
        "model": scenario.model.name,
        "plan": scenario.plan.model_dump(),
        "workload": scenario.workload.model_dump(),
        "gpus": scenario.plan.gpus,
        "nodes": result.nodes,
        "attention": result.attention,
        **dict(documented(result)),
        "engine": {"events": result.events, "folded": result.folded, "reasons": list(result.reasons)},
        "fits_scope": FITS_SCOPE[result.scope],
        "waterfall": result.waterfall,
        "stage_peaks": [spot._asdict() for spot in result.stage_peaks],
        "collectives": [asdict(call) for call in result.collectives],
        "assumed": list(result.assumed),
        "inherited": list(result.inherited),
        "assumed_effects": effects_document(result.assumed_effects),
        "flagged": list(result.flagged),
        "error_band": None if result.error_band is None else asdict(result.error_band),
        "prior_band": None if result.prior_band is None else asdict(result.prior_band),
        "far_off": [asdict(part) for part in result.far_off],
        "notes": list(result.notes),
        **({"perturbations": list(result.perturbations)} if result.perturbations else {}),
    }
