"""Kernels in CUDA graphs start after a shorter gap than those of a stream."""

import pytest

from spsim import InputError, Scenario, simulate
from spsim.program.instructions import Compute

GAP_US, GRAPH_US = 4.0, 1.35
"""Of dgx-a100-80gb."""


def result(graphs, *, hardware="dgx-a100-80gb", plan="tp=1", scope="step", **workload):
    settings = {"model": "llama-3-8b", "plan": f"{plan},cuda_graphs={graphs}", "scope": scope}
    return simulate(Scenario(hardware=hardware, workload={"seq_len": 1024, **workload}, **settings))


def test_each_kernel_of_a_layer_saves_the_difference():
    without, per_layer = result("none"), result("per_layer")
    (part,) = without.prepared.passes["forward"].parts
    kernels = sum(isinstance(step, Compute) for step in part.segment.instructions)
    saved = without.layer_forward_s - per_layer.layer_forward_s
    assert saved == pytest.approx(kernels * (GAP_US - GRAPH_US) * 1e-6, rel=0.01)


def test_a_graph_of_the_iteration_holds_embedding_and_head_too():
    """The optimizer stays outside."""
    none, per_layer, whole = (result(graphs) for graphs in ("none", "per_layer", "full_iteration"))
    assert none.step_ps > per_layer.step_ps > whole.step_ps
    assert none.layer_forward_s > per_layer.layer_forward_s == whole.layer_forward_s
    ends = [
        {t.name: s.end_ps - s.start_ps for s in own.trace.spans if (t := own.trace.tasks[s.task]).part == "optimizer"}
        for own in (none, whole)
    ]
    assert ends[0] == ends[1]
    assert ends[0]


def test_steps_of_replicas_are_kept_apart():
    none, per_layer = (result(graphs, plan="dp=2,distributed_optimizer") for graphs in ("none", "per_layer"))
    assert none.step_ps > per_layer.step_ps


def test_the_start_in_a_graph_is_an_assumed_input():
    assert "graph_overhead_us" in result("per_layer", scope="layers").assumed
    assert "graph_overhead_us" not in result("none", scope="layers").assumed


def test_a_profile_without_it_is_refused():
    with pytest.raises(InputError, match=r"mi300x-8 has no graph_overhead_us.* leave cuda_graphs at none"):
        result("per_layer", hardware="mi300x-8")
