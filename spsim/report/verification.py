"""Tables and sentences of a verification."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10

from rich.table import Table

from spsim.report.table import table
from spsim.units import MIB
from spsim.verify import CaseComparison, Quantity, Verification
from spsim.verify.comparison import WALL
from spsim.verify.records import PASSES

SHORT = {
    "all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A", "send_receive": "P2P"
}  # fmt: skip


def headline(found: Verification) -> str:
    """Where it was measured, and by which profile simulated."""
    where = found.environment
    return (
        f"measured on {found.ranks} × {where.device}, {where.backend}, torch {where.torch}; "
        f"simulated with {found.hardware.name} ({found.hardware.datasheet.device})"
    )


def circumstances(found: Verification) -> str:
    """What a reader of a picture must know."""
    return f"{headline(found)} · medians of the slowest rank, bars p10–p90 · {_load(found)}"


def _load(found: Verification) -> str:
    loads = [case.load_average for case in found.cases]
    low, high = f"{min(loads):.1f}", f"{max(loads):.1f}"
    return f"load average {low}" + (f" to {high}" if high != low else "")


def time_table(found: Verification) -> Table:
    """Medians and 10th to 90th percentile against the simulation, a row a case and pass."""
    made = table(
        f"Times in ms, median [p10–p90] of the slowest rank: compute on the {found.environment.compute_clock}, "
        f"communication and pass on the {WALL}",
        ["case", "pass", "compute", "simulated", "communication", "simulated", "pass", "simulated", "load"],
        numbers=["compute", "simulated", "communication", "load"],
    )
    made.columns[6].justify = "right"
    for column in made.columns:
        column.no_wrap = True
    for case in found.cases:
        for phase in PASSES:
            cells = [_cells(case[name]) for name in (f"{phase}_compute_ms", f"{phase}_communication_ms", f"{phase}_ms")]
            name, load = (case.case.name, f"{case.load_average:.1f}") if phase == PASSES[0] else ("", "")
            made.add_row(name, phase, *(text for pair in cells for text in pair), load)
    return made


def _cells(quantity: Quantity) -> list[str]:
    if not quantity.measured and not quantity.predicted:
        return ["–", "–"]
    spread = f"{_digits(quantity.measured)} [{_digits(quantity.p10)}–{_digits(quantity.p90)}]"
    return [spread, f"{_digits(quantity.predicted)} {_percent(quantity)}"]


def _digits(value: float) -> str:
    """Three significant digits of a time from a microsecond on."""
    return f"{value:.{min(3, max(0, 2 - floor(log10(value))))}f}" if value > 0 else "0"


def _percent(quantity: Quantity) -> str:
    return f"{quantity.error_percent:+.0f} %".replace("-", "−")


def count_table(found: Verification) -> Table:
    """What must be equal: saved bytes and collectives."""
    columns = ["case", "kept, bytes", "simulated", "statistics, bytes", "simulated", "forward", "backward", "equal"]
    made = table(
        "Kept for the backward pass, and collectives: number, kind, MiB of their messages",
        columns,
        numbers=columns[1:5],
    )
    made.columns[0].no_wrap = True
    for case in found.cases:
        kept, statistics = case["saved_activation_bytes"], case["saved_statistics_bytes"]
        made.add_row(
            case.case.name, f"{kept.measured:,.0f}", f"{kept.predicted:,.0f}", f"{statistics.measured:,.0f}",
            f"{statistics.predicted:,.0f}", *(_collectives(case, phase) for phase in PASSES),
            "yes" if case.bytes_equal and case.collectives_equal else "no",
        )  # fmt: skip
    return made


def _collectives(case: CaseComparison, phase: str) -> str:
    """Such as `2 AG 0.50`."""
    parts = []
    for kind, short in SHORT.items():
        names = {quantity.name for quantity in case.quantities}
        if f"{phase}_{kind}_calls" in names:
            calls, size = case[f"{phase}_{kind}_calls"], case[f"{phase}_{kind}_bytes"]
            parts.append(f"{calls.measured:.0f} {short} {size.measured / MIB:.2f}")
    return ", ".join(parts) or "–"


def lines(found: Verification) -> Iterator[str]:
    """What agrees and what does not, in sentences."""
    count = len(found.cases)
    yield (
        f"Saved bytes are as simulated in {sum(case.bytes_equal for case in found.cases)} of {count} cases; "
        f"kinds, numbers and bytes of collectives in {sum(case.collectives_equal for case in found.cases)} of {count}."
    )
    yield from _differences(found)
    errors = "; ".join(
        f"{kind} {error['median_percent']:.0f} % and {error['max_percent']:.0f} %"
        for kind, error in found.errors().items()
    )
    yield f"Error of simulated times, median and largest: {errors}."
    yield (
        f"Meanwhile {_load(found)}, of which {found.ranks} are these ranks; wall-clock times of a busy machine say "
        "little."
    )
    on_cpu, of_cpu = found.environment.backend == "gloo", _describes_cpu(found)
    if on_cpu and not of_cpu:
        yield (
            f"note: {found.hardware.name} describes {found.hardware.datasheet.device}, but the layers ran on a CPU: "
            "bytes and collectives can be compared, times cannot"
        )
    for name, reason in found.skipped.items():
        yield f"skipped, {reason}: {name}"


def _differences(found: Verification) -> Iterator[str]:
    for case in found.cases:
        for quantity in case.quantities:
            if not quantity.clock and quantity.measured != quantity.predicted:
                yield (
                    f"differs: {case.case.name}: {quantity.name} is {quantity.measured:,.0f}, "
                    f"simulated {quantity.predicted:,.0f}"
                )


def _describes_cpu(found: Verification) -> bool:
    return found.hardware.datasheet.topology[0].kind == "shared_memory"
