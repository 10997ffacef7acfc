"""Tables and sentences for a terminal."""

from spsim.report.scenarios import (
    comparison_lines,
    comparison_table,
    error_table,
    explanation_table,
    hardware_table,
    memory_table,
    model_table,
    notes,
    operator_table,
    plans_table,
    saving_lines,
    skipped_lines,
    summary,
    time_table,
)
from spsim.report.table import table

__all__ = [
    "comparison_lines",
    "comparison_table",
    "error_table",
    "explanation_table",
    "hardware_table",
    "memory_table",
    "model_table",
    "notes",
    "operator_table",
    "plans_table",
    "saving_lines",
    "skipped_lines",
    "summary",
    "table",
    "time_table",
]
