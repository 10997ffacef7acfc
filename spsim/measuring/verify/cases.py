"""What is run: strategies, shapes and attention kernels, each one layer of a model under a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spsim.errors import InputError
from spsim.inputs.effects import deals_out_groups
from spsim.inputs.model import Attention, Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.rules import check_shapes, gathers_qkv
from spsim.inputs.workload import Precision, Workload


@dataclass(frozen=True, slots=True)
class VerifyCase:
    """One layer, one micro-batch."""

    model: Model
    plan: Plan
    workload: Workload

    @property
    def name(self) -> str:
        """Strategy, attention kernel and sequence × micro-batch × hidden size: unique among the cases of one run."""
        kind = f"{'gated ' if self.model.gated_mlp else ''}{self.model.attention}"
        return f"{self.strategy}, {kind}, {self.workload.seq_len}×{self.workload.micro_batch}×{self.model.hidden}"

    @property
    def strategy(self) -> str:
        """The plan in short."""
        return self.plan.label + (GATHERED[self.plan.ring_kind] if self.plan.ring > 1 else "")

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


GATHERED = {"p2p": "", "all_gather": " AG", "gather_permute": " AG, permutes"}
"""How K and V of a ring are said to move."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer with heads of 64; a gated MLP of Llama's width goes with a quarter of the heads for K and V."""

    hidden: int
    seq_len: int
    micro_batch: int
    gated: bool = False

    def model(self, attention: Attention) -> Model:
        """One layer: GPT's, or Llama's if it is gated. Dropout needs the unfused kernels on a CPU."""
        heads, gated = self.hidden // 64, self.gated
        return Model(
            layers=1,
            hidden=self.hidden,
            heads=heads,
            kv_heads=heads // 4 if gated else heads,
            gated_mlp=gated,
            ffn_hidden=self.hidden * 11 // 4 if gated else 4 * self.hidden,
            vocab=1024,
            attention=attention,
            dropout=0.1 if attention == "unfused" else 0.0,
        )


FUSED: Mapping[str, Attention] = {"cpu": "flash", "cuda": "flash_attention_2"}
"""The fused kernel of real layers: on a GPU the one that the blocks of a ring run, whatever torch picks by itself."""
QUICK_SHAPES = {"cpu": (Shape(512, 512, 1),), "cuda": (Shape(2048, 2048, 1),)}
SHAPES = {
    "cpu": (Shape(256, 256, 1), Shape(512, 512, 2), Shape(768, 1024, 1), Shape(1024, 512, 1, gated=True)),
    "cuda": (Shape(2048, 2048, 1), Shape(4096, 4096, 1), Shape(8192, 4096, 1), Shape(4096, 8192, 1, gated=True)),
}


AS_BUILT = {"projections": "fused", "input_gradients": "summed", "batch_first": False}
"""Options of which real layers have one value. Fewer KV heads than ranks are replicated in them."""


def strategy_plans(ranks: int) -> tuple[str, ...]:
    """TP only, TP with sequence parallelism, Ulysses and ring over all ranks; the single GPU where there is one."""
    if ranks == 1:
        return ("",)
    return (f"tp={ranks}", f"tp={ranks},sequence_parallel", f"ulysses={ranks}", f"ring={ranks}")


def build_cases(
    ranks: int,
    device: str,
    precision: Precision,
    *,
    plans: Sequence[str] = (),
    model: Model | None = None,
    seq_len: int | None = None,
    micro_batch: int | None = None,
    quick: bool = False,
) -> list[VerifyCase]:
    """The cases for some ranks on `cpu` or `cuda`. Plans, model and sizes that are given replace the usual ones.

    Raises `InputError` for a plan that needs another number of ranks, or that does not fit the shapes.
    """
    parsed = [parse_plan(text) for text in plans or strategy_plans(ranks)]
    for plan in parsed:
        if plan.gpus != ranks:
            raise InputError(
                f"verify: plan {plan.text!r} needs {plan.gpus} processes, but {ranks} are at hand; "
                f"use degrees whose product is {ranks}, or start {plan.gpus} processes with torchrun"
            )
        for name, only in AS_BUILT.items():
            if getattr(plan, name) != only:
                raise InputError(
                    f"verify: plan {plan.text!r} has {name} = {getattr(plan, name)!r}, but the real layers have "
                    f"{only!r}; add {name}={only}, or leave out library"
                )
    cases = []
    for found, workload in _layers(device, precision, model, seq_len, micro_batch, quick=quick):
        for plan in parsed:
            gathered = plan.ring > 1 and found.attention == "unfused"
            own = {"ring_kind": "all_gather"} if gathered else {}
            few = {"few_kv_heads": "replicate"} if gathers_qkv(found, plan) else {}
            fitting = plan.model_copy(update=own | few) if own or few else plan
            check_shapes(found, fitting, workload)
            if deals_out_groups(found, fitting):
                raise InputError(
                    f"verify: plan {plan.text!r}: real layers have as many heads on each rank; use degrees that divide "
                    f"kv_heads = {found.kv_heads}"
                )
            cases.append(VerifyCase(found, fitting, workload))
    return cases


def _layers(
    device: str, precision: Precision, model: Model | None, seq_len: int | None, micro_batch: int | None, *, quick: bool
) -> Iterator[tuple[Model, Workload]]:
    """Models of one layer with their workloads."""
    shapes: Sequence[Shape] = (QUICK_SHAPES if quick else SHAPES)[device]
    fused = FUSED[device]
    if model is not None:
        sizes = [(seq_len or shape.seq_len, micro_batch or shape.micro_batch) for shape in shapes[:1]]
        kernel = fused if model.attention == "flash" else model.attention
        found = [(model.model_copy(update={"layers": 1, "attention": kernel}), size) for size in sizes]
    else:
        found = [
            (shape.model(attention), (seq_len or shape.seq_len, micro_batch or shape.micro_batch))
            for shape in shapes
            for attention in ((fused,) if shape.gated else (fused, "unfused"))
        ]
    for layer, (tokens, sequences) in found:
        yield layer, Workload(seq_len=tokens, micro_batch=sequences, precision=precision)
