"""FLOPs and tokens of a workload, or of many as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.costs.flops import LayerFlops, head_flops, layer_flops, prediction_flops, serving_flops
from spsim.inputs.grid import Grid
from spsim.inputs.model import LayerType, Model
from spsim.inputs.scenario import Scenario
from spsim.inputs.stages import all_chunks
from spsim.inputs.workload import Workload, Workloads
from spsim.program.blocks.embedding import padded_vocab
from spsim.program.recompute import kinds_of, usual_kind
from spsim.results.derived import Amounts


def amounts_of(scenario: Scenario | Grid, workload: Workload | Workloads, scope: str, replicas: Any = None) -> Amounts:
    """FLOPs of a workload, or of many as arrays of integers that hold them; tokens. Of `replicas`, or of the plan's."""
    model = scenario.model
    own = {kind: model if len(model.types) == 1 else model.of_type(kind) for kind in model.types}
    kinds = [(layer_flops(own[kind], workload), layer_flops(own[kind], workload, causal=True), n)
             for kind, n in model.types.items()]  # fmt: skip
    rows = padded_vocab(model.head_rows, scenario.plan.tp) if scope == "step" and model.head_rows else 0
    head = head_flops(model, workload, rows).training() * (1 + model.mtp_layers)
    again = head + _executed(scenario, dict(zip(own, [flops for flops, *_ in kinds], strict=True)))
    if model.mtp_layers and scope == "step":
        kinds.append((prediction_flops(model, workload), prediction_flops(model, workload, causal=True), 1))
        again += kinds[-1][0].executed(usual_kind(scenario.plan).recomputed)
    replicas = scenario.plan.dp if replicas is None else replicas
    return Amounts(
        model=replicas * (sum(n * flops.training() for flops, _, n in kinds) + head),
        causal=replicas * (sum(n * flops.training() for _, flops, n in kinds) + head),
        executed=replicas * again,
        tokens=scenario.global_batch * scenario.workload.seq_len,
    )


def serving_amounts(scenario: Scenario) -> Amounts:
    """FLOPs of a step of inference, whose logits are those of the last token of each sequence; tokens that pass."""
    model, workload, replicas = scenario.model, scenario.workload, scenario.plan.dp
    one = workload.model_copy(update={"seq_len": 1})
    head = head_flops(model, one, padded_vocab(model.head_rows, scenario.plan.tp)).forward if model.head_rows else 0
    whole, causal = (replicas * (serving_flops(model, workload, causal=own) + head) for own in (False, True))
    passed = sum(passage.tokens for passage in workload.passages)
    return Amounts(model=whole, causal=causal, executed=whole, tokens=scenario.global_batch * passed)


def _executed(scenario: Scenario | Grid, flops: Mapping[LayerType, LayerFlops]) -> int:
    """FLOPs of all layers, with what is recomputed; `flops` of a layer of each type."""
    model, plan = scenario.model, scenario.plan
    chunks = [chunk.layers for chunk in all_chunks(model, plan)] if plan.recompute_layers else [range(model.layers)]
    return sum(
        count * kind.layers * flops[kind.type].executed(kind.recomputed)
        for layers in chunks
        for kind, count in kinds_of(model, plan, layers)
    )


def counted(model: Model, found: Workloads, passes: npt.NDArray[np.int64]) -> Workloads:
    """Workloads that run so many micro-batches in all replicas, in Python's integers where 64 bits do not hold the
    FLOPs of a step.
    """
    largest = Workloads(int(found.seq_len.max()), int(found.micro_batch.max()), found.precision)
    flops = layer_flops(model, largest).training() * model.layers * int(passes.max())
    return found if flops < 2**60 else replace(found, seq_len=found.seq_len.astype(object))
