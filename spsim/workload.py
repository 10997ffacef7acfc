"""The workload: how many tokens, in which phase and precision."""

from typing import Annotated, Literal

from pydantic import Field

from spsim.configuration import Configuration


class Workload(Configuration):
    """Tokens of a step; `global_batch` defaults to one micro-batch per data-parallel replica."""

    seq_len: Annotated[int, Field(ge=1, le=2**30)]
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Sequences of one micro-batch on one replica."""
    global_batch: Annotated[int, Field(ge=1, le=2**30)] | None = None
    """Sequences of a step over all replicas."""
    phase: Literal["training", "prefill", "decode"] = "training"
    precision: Literal["bf16", "fp16", "fp8"] = "bf16"
