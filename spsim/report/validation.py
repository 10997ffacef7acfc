"""Tables and sentences of a validation."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from spsim.report.table import table
from spsim.studies.validation import Comparison, Errors, Validation


def comparison_table(cases: Sequence[Comparison]) -> Table:
    """Measured against predicted, a row a case."""
    columns = ["case", "metric", "measured", "predicted", "error", "note"]
    made = table("Measured against predicted", columns, numbers=["measured", "predicted", "error"])
    for case in cases:
        made.add_row(
            case.case_id, case.metric, f"{case.measured:.4g}",
            "–" if case.predicted is None else f"{case.predicted:.4g}",
            "–" if case.error_percent is None else f"{case.error_percent:+.1f} %",
            "fitted on" if case.fitted else "",
        )  # fmt: skip
    return made


def error_table(title: str, families: dict[str, Errors]) -> Table:
    """Errors by family."""
    columns = ["family", "rows", "mean", "90th percentile", "largest"]
    made = table(title, columns, numbers=columns[1:])
    for name, errors in families.items():
        figures = (errors.mean_abs_error_percent, errors.p90_abs_error_percent, errors.max_abs_error_percent)
        made.add_row(name, str(errors.n), *(f"{figure:.1f} %" for figure in figures))
    return made


def skipped_lines(validation: Validation) -> list[str]:
    """Rows that were not predicted, by reason."""
    reasons: dict[str, list[str]] = {}
    for case in validation.cases:
        if case.skipped is not None:
            reasons.setdefault(case.skipped, []).append(f"{case.case_id} ({case.metric})")
    return [f"skipped, {reason}: {len(cases)} rows, such as {cases[0]}" for reason, cases in reasons.items()]
