"""How many whole steps a second of CPU time does a sweep evaluate, over spaces as a search for a plan enumerates them?

    python benchmarks/spaces.py [--every N]

Every plan is new: what plans share is compiled once, times, memory and metrics of each are found. Of a dense model the
space is that of `plan`, for several global batches; of a model with experts, degrees and options by hand. With
`--every` one configuration of so many, so that less is shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from time import process_time
from typing import Any, NamedTuple

from rich.console import Console

import spsim
from spsim.inputs.plan import Plan
from spsim.report.table import table
from spsim.studies.search.space import Space

MICRO_BATCHES, CHUNKS = (1, 2, 4, 8), range(1, 9)
RECOMPUTED = ("none", "selective", "full")


class Asked(NamedTuple):
    """A model on so many GPUs of DGX H100."""

    model: str
    gpus: int
    seq_len: int
    batches: Sequence[int]


DENSE = (Asked("gpt-175b", 64, 2048, (64, 128, 256, 512)), Asked("llama-3-70b", 512, 32768, (256, 512, 1024, 2048)))
EXPERTS = Asked("qwen3-30b-a3b", 64, 4096, (256, 512, 1024, 2048))


def dense(asked: Asked) -> Iterator[dict[str, Any]]:
    """All plans of a search for each batch."""
    hardware, model = spsim.load_profile("dgx-h100"), spsim.load_model(asked.model)
    for batch in asked.batches:
        workload = spsim.Workload(seq_len=asked.seq_len, global_batch=batch)
        for family in Space(hardware, model, workload, asked.gpus, {}, {}).families():
            for micro_batch in family.workloads.micro_batch.tolist():
                yield _point(asked, model, family.plan, micro_batch, batch)


def of_experts(asked: Asked) -> Iterator[dict[str, Any]]:
    """Plans that spread experts over replicas, or over tp and replicas."""
    model = spsim.load_model(asked.model)
    degrees = product((1, 2, 4), (1, 2, 4, 8), CHUNKS, (1, 2, 4, 8, 16, 32), (None, 1), RECOMPUTED, (False, True))
    for tp, pp, chunks, ep, expert_tp, recompute, sharded in degrees:
        dp, rest = divmod(asked.gpus, tp * pp)
        alone = chunks > 1 and (pp == 1 or model.layers % (pp * chunks))
        uneven = ep > dp if expert_tp is None else tp == 1 or ep % tp or ep > dp * tp
        if rest or alone or uneven or (ep == 1 and expert_tp):
            continue
        plan = Plan(
            tp=tp, sequence_parallel=tp > 1, pp=pp, virtual_pp=chunks, dp=dp, ep=ep, expert_tp=expert_tp,
            recompute=recompute, distributed_optimizer=sharded,
        )  # fmt: skip
        for micro_batch, batch in product(MICRO_BATCHES, asked.batches):
            number, left = divmod(batch, dp * micro_batch)
            if not left and (chunks == 1 or number % pp == 0):
                yield _point(asked, model, plan, micro_batch, batch)


def _point(asked: Asked, model: spsim.Model, plan: Plan, micro_batch: int, batch: int) -> dict[str, Any]:
    workload = {"seq_len": asked.seq_len, "micro_batch": micro_batch, "global_batch": batch}
    return {"hardware": "dgx-h100", "model": model, "plan": plan, "workload": workload}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    every = parser.parse_args().every
    made = table("Whole steps of plans that are new", columns := ["model", "GPUs", "configurations", "a CPU second"],
                 numbers=columns[1:])  # fmt: skip
    spsim.sweep([{"hardware": "dgx-h100", "model": "gpt-22b", "plan": "tp=8", "workload": {"seq_len": 2048}}] * 2)
    spaces = [*((asked, dense(asked)) for asked in DENSE), (EXPERTS, of_experts(EXPERTS))]
    for asked, points in spaces:
        own = [*points][::every]
        start = process_time()
        found = spsim.sweep(own)
        seconds = process_time() - start
        if (found["error"] != "").any():
            print(found["error"][found["error"] != ""].iloc[0])
        made.add_row(asked.model, str(asked.gpus), f"{len(own):,}", f"{len(own) / seconds:,.0f}")
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
