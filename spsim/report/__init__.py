"""Tables and sentences for a terminal, a module for each thing that is reported; `table` is the look of them all."""

from spsim.report.table import table

__all__ = ["table"]
