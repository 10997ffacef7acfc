"""Backward passes in halves, as zero-bubble schedules run them: what each half runs, what is kept between them, and
what they gain.
"""

from collections import Counter

import pytest

from spsim import simulate
from spsim.engine.recording import COMPUTE_LANE
from spsim.inputs.plan import parse_plan
from spsim.program.instructions import LAYER
from spsim.step.issue import block_passes, halved_passes
from spsim.step.pipeline.orders import Action
from tests.cases import program
from tests.test_stages_simulated import staged

PLANS = [
    "", "tp=4", "tp=4,sequence_parallel", "tp=4,sequence_parallel,tp_backward_overlap=false", "ulysses=4", "ring=4",
    "tp=2,sequence_parallel,ring=4,recompute=full", "tp=2,recompute=selective",
]  # fmt: skip
GQA = {"kv_heads": 2, "gated_mlp": True, "ffn_hidden": 704}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("changes", [{}, GQA], ids=["gpt", "llama"])
def test_halves_are_the_whole(plan, changes):
    """Each task is in one half: products for weights, and what is gathered for them, in the second."""
    made = program(plan, **changes)
    whole = block_passes(made, parse_plan(plan), LAYER)["backward"]
    halves = halved_passes(made, parse_plan(plan), LAYER)
    first, second = map(_tasks, halves)
    assert first + second == _tasks(whole)
    assert {(label.part, label.purpose) for label in second} <= {("wgrad", ""), ("backward", "regather")}
    assert not any(label.part == "wgrad" for label in first)
    if "sequence_parallel" in plan:
        assert [label.operator_class for label in second if label.purpose == "regather"]


def _tasks(block):
    found = Counter()
    for part in block.parts:
        for label in part.segment.labels:
            found[label] += part.runs
    return found


def test_what_is_kept_until_the_weights_are_done():
    """Between the halves all is there that the forward pass kept, and gradients that products for weights read: of 256
    positions in 16 bits, 256 wide of fc2, projection, q, k and v, 1,024 wide of fc1.
    """
    result = simulate(staged("pp=2,virtual_pp=2,pp_schedule=zbv", 4, layers=8))
    chunk = result.staged.ran.stages[1][0]
    sorts = result.staged.ran.sorted.sorts
    _, left = result.staged._levels
    forward, inputs, weights = (left[sorts.index((chunk.runs, work))] for work in WORKS)
    assert forward > 0
    boundary = 2 * 256 * 256
    assert inputs == len(chunk.runs) * 2 * (boundary * (1 + 1 + 3) + 2 * 256 * 1024)
    assert forward + inputs + weights == 0


WORKS = ("forward", "input gradients", "weight gradients")


def test_the_first_stage_of_the_model_runs_all_at_once():
    """Its input needs no gradient: nothing for I, and the whole backward pass for W."""
    result = simulate(staged("pp=2,virtual_pp=2,pp_schedule=interleaved_zero_bubble", 4, layers=8))
    ran = result.staged.ran

    def tasks(stage, kind):
        return sum(node.tasks for node in ran.alone[ran.sorted.place(stage, Action(kind, 0, 0))].nodes)

    assert tasks(0, "I") == 0
    whole = sum(len(part.segment.tasks) for part in result.prepared.passes["backward"].parts)
    embedding = sum(len(part.segment.tasks) for part in result.prepared.blocks["embedding"]["backward"].parts)
    assert tasks(0, "W") == 2 * whole + embedding
    inputs, weights = (tasks(1, kind) for kind in "IW")
    assert inputs + weights == 2 * whole


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_products_for_weights_fill_the_bubble(schedule):
    """A shorter step than one-forward-one-backward on as many chunks, by less waiting in all."""
    plan = "pp=4,virtual_pp=2,pp_sends=torch"
    usual, filled = (
        simulate(staged(f"{plan},pp_schedule={name}", 12, layers=8, hidden=1024, seq_len=4096))
        for name in ("1f1b", schedule)
    )
    assert filled.step_ps < usual.step_ps
    waits = [sum(own.stage for own in result.staged.idle.values()) for result in (usual, filled)]
    assert waits[1] < waits[0]
    if schedule == "interleaved_zero_bubble":  # each stage has the same layers
        kernels = [
            sum(s.end_ps - s.start_ps for s in own.trace.spans if s.lane == COMPUTE_LANE) for own in (usual, filled)
        ]
        assert kernels[0] == kernels[1]
