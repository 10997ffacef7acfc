"""Tables of a measured trace."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from spsim.report.table import table
from spsim.report.words import figure, size, time
from spsim.results.measured_summary import TraceSummary
from spsim.units import US_PER_S


def time_table(summary: TraceSummary) -> Table:
    """Time of a rank by operator class, and its share."""
    ranks = f"mean of {summary.ranks} ranks" if summary.ranks > 1 else "one rank"
    made = table(f"Time by class, {ranks}", ["class", "time", "share"], numbers=["time", "share"])
    total = sum(summary.time_us_by_class.values())
    for name, spent in summary.time_us_by_class.items():
        share = f"{100 * spent / total:.1f} %" if total else ""
        made.add_row(name, time(spent / summary.ranks / US_PER_S), share)
    return made


def headline(summary: TraceSummary) -> str:
    """Ranks and passes."""
    ranks = f"{summary.ranks} ranks" if summary.ranks > 1 else "one rank"
    return f"measured run of {ranks}: {', '.join(f'{count} {phase}' for phase, count in summary.passes.items())} passes"


def collective_table(summary: TraceSummary) -> Table:
    """Kinds and messages, and how many of them a rank takes part in."""
    made = table("Collectives of a rank", ["collective", "message", "count"], numbers=["message", "count"])
    for one in summary.collectives:
        message = size(one.message_bytes) if one.message_bytes else "not recorded"
        made.add_row(one.collective.replace("_", "-"), message, figure(one.count))
    return made


def lines(summary: TraceSummary) -> Iterator[str]:
    """What no kernel hides, rank by rank."""
    for rank, spent in summary.exposed_communication_us.items():
        yield f"exposed communication, rank {rank}: {time(spent / US_PER_S)}"
