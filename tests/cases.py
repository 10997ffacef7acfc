"""Small scenarios for the tests: one place that fills in what a test does not care about."""

from spsim import Model, Scenario, Workload, simulate
from spsim.simulation import layer_program

A100 = "dgx-a100-80gb"
H100 = "dgx-h100"


def model(**changes):
    """A GPT of two layers: hidden 256, 8 heads, flash attention, no dropout, unless changed."""
    return Model(**{"layers": 2, "hidden": 256, "heads": 8, "vocab": 512, **changes})


def scenario(plan="", *, seq_len=256, micro_batch=1, global_batch=None, hardware=A100, **model_changes):
    """A scenario of the small model under a plan, an object or text."""
    return Scenario(
        hardware=hardware,
        model=model(**model_changes),
        plan=plan,
        workload=Workload(seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch),
    )


def result(plan="", *, fold=True, **settings):
    """The simulation of a small scenario."""
    return simulate(scenario(plan, **settings), fold=fold)


def program(plan="", *, seq_len=256, micro_batch=1, **model_changes):
    """The compiled layer of a small scenario, after the checks of `Scenario`."""
    checked = scenario(plan, seq_len=seq_len, micro_batch=micro_batch, **model_changes)
    return layer_program(checked.model, checked.plan, checked.workload)
