"""Rates of libraries that send tokens to experts by kernels of their own, as a hardware profile holds them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from spsim.inputs.quantities import Bandwidth, Microseconds, Table

DispatchLibrary = Literal["deepep", "hybridep"]
Ranks = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
Rates = Annotated[dict[Ranks, Bandwidth], Field(min_length=1)]


class DispatchRates(Table):
    """Between ranks that one level of the topology joins: bytes that a rank gets over the time of the kernel, by how
    many ranks there are. A copy of a token counts once for each rank that gets it, inside a node, and for each node
    over nodes; what stays where it is counts, too.
    """

    dispatch: Rates
    combine: Rates
    """Bytes that a rank gives."""


class DispatcherCoefficients(Table):
    """Of one library: see `costs.dispatch`."""

    start_us: Microseconds
    """Of a call beyond its kernel: sizes agreed on, buffers and barriers."""
    levels: dict[str, DispatchRates] = Field(default_factory=dict)
    """By level of the topology; the last one is between nodes."""
