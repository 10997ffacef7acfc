"""The workload: how many tokens, in which phase and precision."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from spsim.inputs.configuration import Configuration

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""With fp8 the inputs of products are converted; tensors stay in 16 bits."""


class Workload(Configuration):
    """Tokens of a step; `global_batch` defaults to one micro-batch per data-parallel replica."""

    seq_len: Annotated[int, Field(ge=1, le=2**30)]
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Sequences of one micro-batch on one replica."""
    global_batch: Annotated[int, Field(ge=1, le=2**30)] | None = None
    """Sequences of a step over all replicas."""
    phase: Literal["training", "prefill", "decode"] = "training"
    precision: Precision = "bf16"

    @property
    def element_bytes(self) -> int:
        """Of one element of an activation or weight."""
        return ELEMENT_BYTES[self.precision]


@dataclass(frozen=True, slots=True)
class Workloads:
    """Many workloads that differ in their sizes only, as arrays."""

    seq_len: Any
    micro_batch: Any
    precision: Precision
