"""Curves of collectives, as a hardware profile holds them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spsim.inputs.quantities import Provenance

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"]

MessageBytes = Annotated[float, Field(le=2.0**50)]
BusBandwidth = Annotated[float, Field(le=1e5)]
"""GB/s."""


class CollectiveCurve(Provenance):
    """Measured bus bandwidth of one collective and algorithm over the message size."""

    algorithm: Literal["ring", "nvls", "pairwise", "send_receive"]
    ranks: Annotated[int, Field(ge=2)]
    """Ranks in the measurement; between nodes, one of each node."""
    min_ranks: Annotated[int, Field(ge=2)] = 2
    """The library picks the algorithm from this many ranks."""
    max_ranks: Annotated[int, Field(ge=2)] | None = None
    """Largest group that the measurement describes, such as the GPUs of one PCIe switch; none for any."""
    latency_us: Annotated[float, Field(ge=1e-3, le=1e5)]
    """Time of the smallest messages at `ranks` ranks: the small-message tier."""
    step_latency_us: Annotated[float, Field(ge=0, le=1e5)]
    """Change of that time per step of the algorithm."""
    points: Annotated[
        tuple[Annotated[tuple[MessageBytes, BusBandwidth], Field(strict=False)], ...], Field(min_length=1, strict=False)
    ]
    """(message bytes, bus bandwidth in GB/s), sizes increasing."""

    @model_validator(mode="after")
    def _ranks_and_points(self) -> Self:
        if self.max_ranks is not None and self.max_ranks < self.ranks:
            raise ValueError(f"max_ranks {self.max_ranks} is below the {self.ranks} ranks of the measurement; raise it")
        sizes = [size for size, _ in self.points]
        if any(b <= a for a, b in pairwise(sizes)) or sizes[0] <= 0:
            raise ValueError("points: message sizes must be positive and increase; sort them")
        if any(bandwidth <= 0 for _, bandwidth in self.points):
            raise ValueError("points: every bus bandwidth must be above 0 GB/s; remove the others")
        return self
