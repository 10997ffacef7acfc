"""Tables and sentences of a user's microbenchmarks against a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from spsim.report.table import table
from spsim.studies.microbenchmarks import KernelErrors, MeasuredKernel, summary

SHOWN = 20


def worst_table(rows: Sequence[MeasuredKernel]) -> Table:
    """The rows that err most."""
    columns = ["kernel", "shape", "measured", "predicted", "error", "note"]
    predicted = [row for row in rows if row.error_percent is not None]
    worst = sorted(predicted, key=lambda row: -abs(row.error_percent or 0.0))[:SHOWN]
    title = f"The {len(worst)} rows of {len(rows)} that err most" if len(worst) < len(rows) else "Rows, by their error"
    made = table(title, columns, numbers=["measured", "predicted", "error"])
    for row in worst:
        made.add_row(
            row.group, shape(row), f"{row.measured_us:.4g} us", f"{row.predicted_us:.4g} us",
            f"{row.error_percent:+.1f} %", row.note,
        )  # fmt: skip
    return made


def shape(row: MeasuredKernel) -> str:
    """The sizes of a row."""
    names = ("m", "n", "k", "batch", "heads", "kv_heads", "head_dim", "tokens", "queries", "keys", "causal")
    return ", ".join(f"{name} {row.columns[name]}" for name in names if name in row.columns)


def summary_table(groups: Mapping[str, KernelErrors]) -> Table:
    """Errors by kind, kernel and direction."""
    columns = ["kernels", "rows", "mean", "90th percentile", "largest", "bias"]
    made = table("Errors", columns, numbers=columns[1:])
    for name, errors in groups.items():
        sizes = (errors.mean_percent, errors.p90_percent, errors.largest_percent)
        made.add_row(name, str(errors.rows), *(f"{size:.1f} %" for size in sizes), f"{errors.bias_percent:+.1f} %")
    return made


def headline(rows: Sequence[MeasuredKernel]) -> str:
    """Mean errors by kind of kernel."""
    found = summary(rows)
    return "; ".join(f"{name}: {errors.rows} rows, mean {errors.mean_percent:.1f} %" for name, errors in found.items())


def skipped_lines(rows: Sequence[MeasuredKernel]) -> list[str]:
    """Rows without a prediction, by reason."""
    reasons: dict[str, int] = {}
    for row in rows:
        if row.skipped:
            reasons[row.skipped] = reasons.get(row.skipped, 0) + 1
    return [f"skipped, {reason}: {count} row{'s' if count > 1 else ''}" for reason, count in reasons.items()]
