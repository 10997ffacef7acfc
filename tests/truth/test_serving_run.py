"""Prefill under every strategy and decode with a shared cache: the logits of one process, and what is sent."""

import pytest
import torch

from spsim.inputs.plan import parse_plan
from tests.truth.processes import Processes
from tests.truth.serving import BATCH, TOKENS, Served, alone, serve_here

PREFILL = (
    "tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "ring=4,ring_pass=q", "tp=2,ulysses=2", "tp=2,ring=2",
    "tp=2,ring=2,ring_pass=q", "ulysses=2,ring=2",
)  # fmt: skip
DECODE = ("tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "tp=2,ring=2", "tp=2,ulysses=2")
CASES = [
    *(Served(parse_plan(plan)) for plan in PREFILL),
    *(Served(parse_plan(plan), chunk=16) for plan in ("tp=4", "ulysses=4", "ring=4", "ring=4,ring_pass=q")),
    *(Served(parse_plan(plan), "decode") for plan in DECODE),
    Served(parse_plan("tp=2,ring=2"), "decode", kv_heads=2),  # ranks of the ring have the same heads
    Served(parse_plan("ulysses=4"), kv_heads=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda own: f"{own.phase}-{own.plan.text}-{own.chunk}-{own.kv_heads}")
def test_a_served_model(case: Served, quartet: Processes) -> None:
    reference = alone(case.kv_heads)
    expected, token_bytes = case.expected()
    ulysses = case.plan.ulysses if case.phase == "decode" else 1
    parts = reference.chunk(ulysses)
    for rank, (logits, calls, cached) in enumerate(quartet.run(serve_here, case)):
        own = parts[rank // case.plan.tp % ulysses]
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
        assert calls == expected
        assert cached == token_bytes * BATCH * TOKENS // case.plan.ring
