"""Tables and sentences for a terminal."""

from spsim.report.calibration import calibration_lines, calibration_table, rates_table
from spsim.report.comparison import comparison_lines, memory_table, plans_table, time_table
from spsim.report.scenarios import (
    comparison_table,
    error_table,
    explanation_table,
    hardware_table,
    model_table,
    notes,
    operator_table,
    saving_lines,
    skipped_lines,
    summary,
)
from spsim.report.table import table

__all__ = [
    "calibration_lines",
    "calibration_table",
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
    "rates_table",
    "saving_lines",
    "skipped_lines",
    "summary",
    "table",
    "time_table",
]
