"""FLOPs and tokens of a step of a scenario, or of many workloads at once."""

from __future__ import annotations

from dataclasses import replace

from spsim.costs.flops import head_flops, layer_flops
from spsim.inputs.grid import Grid
from spsim.inputs.scenario import Scenario
from spsim.inputs.stages import all_chunks, dense_in
from spsim.inputs.workload import Workload, Workloads
from spsim.program.blocks.embedding import padded_vocab
from spsim.program.recompute import layer_kinds
from spsim.results.derived import Amounts


def amounts_of(scenario: Scenario | Grid, workload: Workload | Workloads, scope: str) -> Amounts:
    """FLOPs of a workload, or of many as arrays of integers that hold them; tokens."""
    model = scenario.model
    kinds = [(model, model.layers - model.dense_layers)]
    kinds += [(model.as_dense, model.dense_layers)] if model.dense_layers else []
    rows = padded_vocab(model.head_rows, scenario.plan.tp) if scope == "step" and model.head_rows else 0
    head = head_flops(model, workload, rows).training()
    replicas = scenario.plan.dp
    return Amounts(
        model=replicas * (sum(n * layer_flops(own, workload).training() for own, n in kinds) + head),
        causal=replicas * (sum(n * layer_flops(own, workload, causal=True).training() for own, n in kinds) + head),
        executed=replicas * (_executed(scenario, workload) + head),
        tokens=scenario.global_batch * scenario.workload.seq_len,
    )


def _executed(scenario: Scenario | Grid, workload: Workload | Workloads) -> int:
    """FLOPs of all layers, with what is recomputed."""
    model, plan = scenario.model, scenario.plan
    flops = {False: layer_flops(model, workload), True: layer_flops(model.as_dense, workload)}
    chunks = [chunk.layers for chunk in all_chunks(model, plan)] if plan.recompute_layers else [range(model.layers)]
    return sum(
        count * kind.layers * flops[kind.dense].executed(kind.recomputed)
        for layers in chunks
        for kind, count in layer_kinds(plan, len(layers), dense_in(model, layers))
    )


def counted(grid: Grid) -> Workloads:
    """The workloads of a grid, in Python's integers where 64 bits do not hold the FLOPs of a step."""
    found = grid.workload
    largest = Workloads(int(found.seq_len.max()), int(found.micro_batch.max()), found.precision)
    flops = layer_flops(grid.model, largest).training() * grid.model.layers * int(grid.num_micro_batches.max())
    return found if flops < 2**62 else replace(found, seq_len=found.seq_len.astype(object))
