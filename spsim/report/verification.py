"""Tables and sentences of a verification."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10

from rich.table import Table

from spsim.measuring.processes.matching import device_of
from spsim.measuring.verify import CaseComparison, Quantity, Verification
from spsim.measuring.verify.comparison import WALL
from spsim.measuring.verify.records import PASSES
from spsim.program.placement import COLLECTIVE_SHORT
from spsim.report.table import table
from spsim.report.words import COLLECTIVES, missed, signed
from spsim.units import MIB


def headline(found: Verification) -> str:
    """Where it was measured, and by which profile simulated."""
    where = found.environment
    return (
        f"measured on {found.ranks} × {where.device}, {where.backend}, torch {where.torch}; "
        f"simulated with {found.hardware.name} ({found.hardware.datasheet.device})"
    )


def warnings(found: Verification) -> Iterator[str]:
    """What must be known before the times are read."""
    if not found.times_comparable:
        yield (
            f"times cannot be compared: {found.hardware.name} is of {device_of(found.hardware)}, but the layers ran "
            f"on {found.environment.device}; bytes and collectives can; for times, calibrate this device"
        )
    if found.flagged:
        yield missed(found.flagged)


def circumstances(found: Verification) -> str:
    """What a reader of a picture must know."""
    return f"{_caution(found)}{headline(found)} · medians of the slowest rank, bars p10–p90 · {_load(found)}"


def _caution(found: Verification) -> str:
    return "" if found.times_comparable else "times cannot be compared · "


def profiled_note(found: Verification, case: CaseComparison) -> str:
    """What a reader of a timeline must know."""
    profiled = "the profiled pass is not the median of the timed ones"
    return f"{_caution(found)}{profiled} · load average {case.load_average:.1f}"


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
            cells = [
                _cells(case[name], errors=found.times_comparable)
                for name in (f"{phase}_compute_ms", f"{phase}_communication_ms", f"{phase}_ms")
            ]
            title, load = (case.case.name, f"{case.load_average:.1f}") if phase == PASSES[0] else ("", "")
            made.add_row(title, phase, *(text for pair in cells for text in pair), load)
    made.caption, made.caption_justify = _time_caption(found), "left"
    return made


CASE = "Case: plan, attention kernel, sequence × micro-batch × hidden size."
"""How the name of a case is read."""


def _time_caption(found: Verification) -> str:
    """How the columns are read, and why they are not of the same thing."""
    cpu = found.environment.backend == "gloo"
    sign = " and its error, simulated / measured − 1" if found.times_comparable else ""
    compute = (
        "CPU time of the pass outside its collectives, with Python and autograd; simulated: kernels alone"
        if cpu
        else "kernels of the device, measured and simulated"
    )
    return (
        f"{CASE} Simulated: the time{sign}. Compute: {compute}. Communication: from the arrival of the last rank, "
        "measured under torch.profiler in passes of its own, so it can be more than the pass. "
        "Load: average of the last minute"
    )


def _cells(quantity: Quantity, *, errors: bool) -> list[str]:
    if not quantity.measured and not quantity.predicted:
        return ["–", "–"]
    spread = f"{_digits(quantity.measured)} [{_digits(quantity.p10)}–{_digits(quantity.p90)}]"
    simulated = _digits(quantity.predicted)
    return [spread, f"{simulated} {_percent(quantity)}" if errors else simulated]


def _digits(value: float) -> str:
    """Three significant digits of a time from a microsecond on."""
    return f"{value:.{min(3, max(0, 2 - floor(log10(value))))}f}" if value > 0 else "0"


def _percent(quantity: Quantity) -> str:
    return f"{signed(quantity.error_percent, 0)} %"


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
    made.caption = (
        f"{CASE} Kept: activations and masks that autograd holds on the fullest rank. Statistics: what else it holds, "
        f"mean and reciprocal deviation of norms and log-sum-exp of flash attention. {COLLECTIVES}; as measured"
    )
    made.caption_justify = "left"
    return made


def _collectives(case: CaseComparison, phase: str) -> str:
    """Such as `2 AG 0.50`."""
    parts = []
    for kind, short in COLLECTIVE_SHORT.items():
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
    if found.times_comparable:
        errors = "; ".join(
            f"{kind} {error['median_percent']:.0f} % and {error['max_percent']:.0f} %"
            for kind, error in found.errors().items()
        )
        yield f"Error of simulated times, median and largest: {errors}."
    yield (
        f"Meanwhile {_load(found)}, of which {found.ranks} are these ranks; wall-clock times of a busy machine say "
        "little."
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
