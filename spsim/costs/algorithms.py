"""The algorithms of collectives as NCCL has them: what each serves, and why another cannot."""

from __future__ import annotations

from dataclasses import dataclass

from spsim.errors import InputError
from spsim.program.placement import Collective

CHUNKED: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter")
"""Collectives that pass data on from rank to rank, chunk by chunk."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What an algorithm needs."""

    does: str
    serves: tuple[Collective, ...]
    nodes: tuple[int, float] = (1, float("inf"))
    """Fewest and most that it runs over."""
    per_node: tuple[int, float] = (1, float("inf"))
    """Fewest and most GPUs of each node."""
    otherwise: str = "ring"
    """What serves in its place."""


ALGORITHMS = {
    "ring": Algorithm("passes blocks on from rank to rank", CHUNKED),
    "tree": Algorithm(
        "sums up and down a double binary tree of nodes", ("all_reduce",), nodes=(2, float("inf")), otherwise="ring"
    ),
    "nvls": Algorithm("sums in the switch of one node", ("all_reduce",), nodes=(1, 1), otherwise="nvls_tree"),
    "nvls_tree": Algorithm(
        "sums in the switches of nodes and in a tree over them", ("all_reduce",), nodes=(2, float("inf")),
        per_node=(2, float("inf")),
    ),
    "hierarchical": Algorithm(
        "runs a collective in each node and one over the nodes", CHUNKED, nodes=(2, float("inf")),
        per_node=(2, float("inf")),
    ),
    "pat": Algorithm(
        "gathers in a logarithmic number of steps", ("all_gather", "reduce_scatter"), nodes=(2, float("inf")),
        per_node=(1, 1),
    ),
    "pairwise": Algorithm("sends each part to its rank", ("all_to_all",)),
    "send_receive": Algorithm("sends to the next rank", ("send_receive",)),
}  # fmt: skip


def check_algorithm(name: str, collective: Collective, ranks: int, nodes: int) -> None:
    """Raise `InputError` where an algorithm cannot run a collective among `ranks` GPUs on `nodes` nodes."""
    if name not in ALGORITHMS:
        raise InputError(f"algorithm {name!r} is none of {', '.join(ALGORITHMS)}; give one of them, or auto")
    found = ALGORITHMS[name]
    if collective not in found.serves:
        fits = next(other for other, own in ALGORITHMS.items() if collective in own.serves)
        raise InputError(
            f"algorithm {name} {found.does}, which serves {', '.join(found.serves)}, not {collective}; use {fits}"
        )
    if not found.nodes[0] <= nodes <= found.nodes[1]:
        needs = "one node" if nodes > 1 else "several nodes"
        raise InputError(
            f"algorithm {name} {found.does}: it runs on {needs}, and {ranks} GPUs are on {nodes}; "
            f"use {found.otherwise if nodes > 1 else 'ring or nvls'}"
        )
    if not found.per_node[0] <= ranks // nodes <= found.per_node[1]:
        needs = "one GPU" if found.per_node[1] == 1 else "two GPUs or more"
        raise InputError(f"algorithm {name} needs {needs} of each node, not {ranks // nodes}; use ring")
