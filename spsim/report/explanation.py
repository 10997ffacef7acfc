"""Tables and sentences of an explanation."""

from __future__ import annotations

import re

from rich.table import Table

from spsim.program.placement import COLLECTIVE_SHORT
from spsim.report.table import table
from spsim.report.words import COLLECTIVES
from spsim.studies.explanation import DIMENSION_NAMES, Explanation, InsertedCommunication, OperatorExplanation
from spsim.units import MIB


def explanation_table(explanation: Explanation) -> Table:
    """The operator table: does sequence parallelism apply, and what does the plan make of it?"""
    made = table(
        f"{explanation.model}, {explanation.plan}: which operators may run on a sequence shard?",
        ["operator", "dimensions", "may it?", "why", "placed", "GFLOP", "MiB", "kept, MiB", "communication"],
        numbers=["GFLOP", "MiB", "kept, MiB"],
    )
    for column in (0, 2, 4, 8):
        made.columns[column].no_wrap = True
    made.columns[3].min_width = 20
    for row in explanation.operators:
        made.add_row(
            row.operator, row.subscripts, APPLIES_SHORT.get(row.applies, row.applies), row.why, _placed(row),
            f"{row.flops / 1e9:.1f}" if row.flops else "–",
            f"{row.bytes_moved / MIB:.1f}",
            f"{row.saved_bytes_without / MIB:.1f} → {row.saved_bytes_with / MIB:.1f}" if explanation.parts else "–",
            "\n".join(_communication(item) for item in row.communication) or "–",
        )  # fmt: skip
    made.caption = (
        "May it run on a sequence shard (offset: given its position)? GFLOP and MiB moved: one rank, forward. "
        f"{_kept(explanation)}Dimensions: {_dimensions(explanation)}. {COLLECTIVES}"
    )
    made.caption_justify = "left"
    return made


def _kept(explanation: Explanation) -> str:
    return f"Kept for backward: {explanation.without} → {explanation.with_}. " if explanation.parts else ""


def _dimensions(explanation: Explanation) -> str:
    """Those of its operators."""
    used = {letter for row in explanation.operators for letter in re.findall(r"\b[a-z]\b", row.subscripts)}
    return ", ".join(f"{dim} {name}" for dim, name in DIMENSION_NAMES.items() if dim in used)


APPLIES_SHORT = {"yes, with position offset": "offset"}
PART_SHORT = {"forward": "fwd", "backward": "bwd", "recompute": "recomp."}


def _communication(item: InsertedCommunication) -> str:
    purpose = {"input": "", "regather": " again", "gradient": " of gradient"}[item.purpose]
    count = f"{item.count} " if item.count > 1 else ""
    return f"{PART_SHORT[item.part]} {count}{COLLECTIVE_SHORT[item.collective]} {item.axis}{purpose}"


def _placed(row: OperatorExplanation) -> str:
    return "\n".join(f"{axis}: {dim or 'whole'}" for axis, dim in row.placed.items()) or "whole"


def saving_lines(explanation: Explanation) -> list[str]:
    """The saving in words, for the norms and dropouts and for the layer."""
    return [
        f"{name}: {saving['without_bytes'] / MIB:.1f} MiB kept with {explanation.without}, "
        f"{saving['with_bytes'] / MIB:.1f} MiB with {explanation.with_}: {saving['saving_percent']:.1f} % less"
        for name, saving in explanation.parts.items()
    ]
