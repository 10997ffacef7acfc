"""What joins the switches of a level of the topology."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from spsim.inputs.quantities import Quantity, Table


class Uplinks(Table):
    """What joins the switches of a level, where each has some of its GPUs or nodes only."""

    joins: Annotated[int, Field(ge=1)]
    """GPUs of a node under one switch; between nodes, nodes under one leaf."""
    oversubscription: Quantity
    """What the links below a switch carry over what its uplinks carry: 1 never blocks."""
    rails: bool = False
    """Between nodes a leaf for each place in a node, of one adapter of each of its nodes."""
