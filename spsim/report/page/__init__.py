"""A report as one page that a browser opens without a network: sentences, charts by Plotly, and the tables."""

from spsim.report.page.fragments import comparison_fragment, result_fragment
from spsim.report.page.perturbed import write_perturbed
from spsim.report.page.plans import write_comparison, write_result
from spsim.report.page.search import write_search
from spsim.report.page.sweep import write_sweep

__all__ = [
    "comparison_fragment",
    "result_fragment",
    "write_comparison",
    "write_perturbed",
    "write_result",
    "write_search",
    "write_sweep",
]
