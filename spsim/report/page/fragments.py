"""What a notebook shows of a result and of a comparison: the answer, and the figures in a table."""

from __future__ import annotations

from spsim.report import run as of_run
from spsim.report.page.document import fragment
from spsim.report.table import table
from spsim.report.verdict import verdict
from spsim.report.words import figure, time
from spsim.results.result import Result
from spsim.studies.comparison import PlanComparison
from spsim.studies.plan_accounts import PlanAccount


def result_fragment(result: Result) -> str:
    """Of one result."""
    alone = PlanComparison((PlanAccount(result.scenario.plan.label, result.scenario.plan.text, result),))
    return fragment(verdict(alone), of_run.figures_table(result))


def comparison_fragment(comparison: PlanComparison) -> str:
    """Of plans, a row each."""
    served = comparison.accounts[0].result.is_served
    backward = [] if served else ["layer backward"]
    times_of = ["step", "layer forward", *backward, "exposed communication"]
    columns = ["plan", *times_of, "tokens/s/GPU", "GPU memory, GiB"]
    made = table("", [*columns, "fits"], numbers=columns[1:])
    for account in comparison.accounts:
        result = account.result
        passes = (result.layer_forward_s, *(() if served else (result.layer_backward_s,)))
        times = (result.step_time_s, *passes, result.exposed_comm_s)
        made.add_row(
            account.name, *map(time, times), figure(result.tokens_per_s_per_gpu), f"{result.device_memory_gib:.1f}",
            "yes" if result.fits else "no",
        )  # fmt: skip
    return fragment(verdict(comparison), made)
