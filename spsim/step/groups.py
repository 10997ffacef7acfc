"""Messages of replicas as collectives on the mesh of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from spsim.inputs.plan import Plan
from spsim.program.mesh import Axis, world_of
from spsim.step.gradients import Sync
from spsim.step.messages import Group, Message


class Members(NamedTuple):
    """Who takes part: along which axes, and how many."""

    axes: tuple[Axis, ...]
    ranks: int


Groups = Mapping[Group, Members]


def replica_groups(plan: Plan) -> Groups:
    """Who takes part in messages of each group. All ranks that use a weight whole share what is sharded of it, those of
    ulysses and ring included, unless it is said how many replicas do.
    """
    world = world_of(plan)
    hybrid = "shard" in world.axes
    inner: tuple[Axis, ...] = ("ring", "ulysses")
    axes: dict[Group, tuple[Axis, ...]] = {
        "shard": ("shard", *inner) if hybrid else ("dp", "ep", *inner),
        "replicate": ("dp",) if hybrid else (),
        "world": world.axes,
        "model": ("pp", "tp"),
        "tp": ("tp",),
        "stages": ("pp",),
        "experts": ("dp",),
    }
    own = {group: tuple(axis for axis in names if axis in world.axes) for group, names in axes.items()}
    found = {group: Members(names, world.size(names)) for group, names in own.items()}
    return found | {"embedding": Members(("embedding",), 2)}


def sync_of(message: Message, groups: Groups) -> Sync:
    """A message as a collective over bytes, which no longer knows the weights."""
    members, size = groups[message.group], message.message_bytes
    ranks = members.ranks if message.ranks is None else message.ranks
    return Sync(members.axes, ranks, message.collective, 1, (), message.what, size)


def meets(message: Message, groups: Groups) -> bool:
    """Whether a message has more than one rank to meet."""
    return groups[message.group].ranks > 1
