"""Where the ranks of a plan lie: the groups of each axis on the nodes, and which of them share ports and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from spsim.costs.links import Wiring
from spsim.inputs.hardware import Level
from spsim.inputs.scenario import Scenario
from spsim.lazy import lazy
from spsim.plots.colours import MUTED, OTHER, SERIES, ink_on
from spsim.plots.figure import (
    LABEL_SIZE,
    POINTS,
    SMALL_SIZE,
    TEXT_SIZE,
    WIDTH,
    Picture,
    add_legend,
    add_title,
    text_size,
)
from spsim.program.mesh import Axis, Mesh, nodes_of, world_of
from spsim.step.groups import replica_groups

# "Muted" of Paul Tol's schemes, so that axes do not look like groups.
AXIS_COLOURS = ("#332288", "#DDCC77", "#117733", "#88CCEE", "#CC6677", "#999933", "#AA4499")
MOST_CELLS = 64
"""Ranks in a row, as far as whole nodes have no more."""
LEFT, LABELS, TOP, BOTTOM = 0.3, 2.5, 0.95, 0.5
"""Inches around the rows: margin, labels, title, legend."""
ROW, GAP, NODE_GAP = 0.34, 0.16, 0.14

Axes_ = tuple[Axis, ...]


@dataclass(frozen=True)
class Mapping:
    """The ranks of a scenario on its nodes."""

    scenario: Scenario

    @lazy
    def world(self) -> Mesh:
        """All ranks."""
        return world_of(self.scenario.plan)

    @lazy
    def wiring(self) -> Wiring:
        """Their links."""
        return Wiring(self.scenario.hardware, self.scenario.gpus_per_node)

    @property
    def nodes(self) -> int:
        """That the plan uses."""
        return self.scenario.plan.gpus // self.scenario.gpus_per_node

    @property
    def shown(self) -> int:
        """Nodes that a picture has room for."""
        return min(self.nodes, max(1, MOST_CELLS // self.scenario.gpus_per_node))

    @lazy
    def axes(self) -> list[Axes_]:
        """Axes of groups, neighbours first; those that hold the same weights together last, if they are several."""
        single = sorted(self.world.axes, key=lambda axis: self.world.strides[axis])
        together = replica_groups(self.scenario.plan)["shard"].axes
        return [*((axis,) for axis in single), *([together] if len(together) > 1 else [])]

    @property
    def sharing(self) -> int:
        """GPUs of an adapter."""
        ranks = range(self.scenario.gpus_per_node)
        return len(ranks) // len({self.wiring.adapter(rank) for rank in ranks})

    def group(self, rank: int, axes: Axes_) -> int:
        """The number of the group that a rank is in: its first rank."""
        return self.world.first(rank, axes)

    def place(self, rank: int, axes: Axes_) -> int:
        """Where in its group a rank is."""
        place = 0
        for axis in sorted(axes, key=lambda axis: -self.world.strides[axis]):
            place = place * self.world.degree(axis) + self.world.coordinate(rank, axis)
        return place

    def spans(self, axes: Axes_) -> int:
        """Nodes of a group, each of which has as many of its ranks."""
        return nodes_of(self.world, axes, self.scenario.gpus_per_node)

    def sends(self, rank: int, axes: Axes_, *, inside: bool) -> bool:
        """Whether a rank sends to others of its node, or of other nodes: of a ring and a pipeline to its neighbours."""
        if axes in (("ring",), ("pp",)):
            node, others = self.wiring.node, {*self.world.neighbours(rank, axes[0])} - {rank}
            return any((node(other) == node(rank)) == inside for other in others)
        return self.world.size(axes) > self.spans(axes) if inside else self.spans(axes) > 1

    def on_port(self, rank: int) -> list[Axes_]:
        """Axes whose groups use the port of a rank in its node."""
        return [axes for axes in self.axes if self.sends(rank, axes, inside=True)]

    def on_adapter(self, rank: int) -> list[Axes_]:
        """Axes whose groups use the adapter of a rank, the first of those that do."""
        last = self.wiring.node(rank) * self.scenario.gpus_per_node + self.scenario.gpus_per_node
        sharing = range(rank, min(rank + self.sharing, last))
        return [axes for axes in self.axes if any(self.sends(own, axes, inside=False) for own in sharing)]

    def on_uplinks(self, rank: int, level: Level) -> list[Axes_]:
        """Axes whose groups leave the switch of a level that a rank is joined to, from it."""
        wiring, inside = self.wiring, level is self.wiring.inner
        leaf, node = wiring.leaf(level, rank), wiring.node(rank)

        def reached(axes: Axes_) -> Iterable[int]:
            if axes in (("ring",), ("pp",)):
                return self.world.neighbours(rank, axes[0])
            first, per_node = self.group(rank, axes), self.scenario.gpus_per_node
            if inside:
                return (r for r in range(node * per_node, (node + 1) * per_node) if self.group(r, axes) == first)
            return first, first + sum((count - 1) * stride for stride, count in self.world.steps(axes))

        def leaves(axes: Axes_) -> bool:
            others = (r for r in reached(axes) if (wiring.node(r) == node) == inside)
            return any(wiring.leaf(level, other) != leaf for other in others)

        return [axes for axes in self.axes if leaves(axes)]

    def name(self, axes: Axes_) -> str:
        """Of a row; replicas over all of which experts are spread are the axis `ep` of the mesh."""
        plan = self.scenario.plan
        replicas = "dp, ep" if plan.ep == plan.expert_replicas else "dp"
        whole = "dp" not in self.world.axes
        return " × ".join(replicas if axis == "ep" and whole else axis for axis in axes)

    def words(self, axes: Axes_) -> str:
        """How many ranks, on what links."""
        degree, spans = self.world.size(axes), self.spans(axes)
        levels = [level.name for level in (self.wiring.inner, self.wiring.outer) if level is not None]
        names = [*(levels[:1] if degree > spans else []), *(levels[1:] if spans > 1 else [])]
        return f"{degree} ranks on {spans} node{'s' if spans > 1 else ''}: {' and '.join(names)}"


def plot_mapping(scenario: Scenario) -> Figure:
    """For each axis the groups of the ranks of the first node, by colour, and the place of each rank in its group; then
    for each port, adapter and uplink the axes whose groups share it.
    """
    mapping = Mapping(scenario)
    links = [*_links(mapping)]
    rows = len(mapping.axes) + len(links) + (1 if links else 0)
    height = TOP + rows * (ROW + GAP) + BOTTOM
    figure = Picture(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    canvas = _Canvas(axes, mapping)
    down = TOP
    canvas.nodes(down - 0.1)
    for number, own in enumerate(mapping.axes):
        canvas.groups(down, own, AXIS_COLOURS[number % len(AXIS_COLOURS)])
        down += ROW + GAP
    down += (ROW + GAP) / 2
    for own_links in links:
        canvas.links(down, own_links)
        down += ROW + GAP
    names = [mapping.name(own) for own in mapping.axes]
    colours = (AXIS_COLOURS[n % len(AXIS_COLOURS)] for n in range(len(names)))
    add_legend(figure, [Patch(facecolor=colour, label=name) for name, colour in zip(names, colours, strict=True)])
    plan, more = scenario.plan, mapping.nodes - mapping.shown
    add_title(
        figure,
        f"{plan.label} on {scenario.hardware.name}: which ranks share which links",
        f"{plan.gpus} GPUs, order {plan.mesh_order} · above, the groups of the ranks on node 0, numbers are places in "
        f"a group; below, the axes that share a link{f' · {more} more nodes are alike' if more else ''}",
    )
    return figure


class _Links(NamedTuple):
    """Links of a kind."""

    name: str
    words: str
    ranks: int
    """Consecutive ones on each, within a node or of whole nodes."""
    users: Callable[[int], list[Axes_]]
    """Axes that use that of a rank, the first on it."""


def _links(mapping: Mapping) -> Iterator[_Links]:
    """All kinds there are."""
    inner, outer, per_node = mapping.wiring.inner, mapping.wiring.outer, mapping.scenario.gpus_per_node
    if per_node > 1:
        yield _Links(inner.name, "port of each GPU", 1, mapping.on_port)
        yield from _uplinks(mapping, inner)
    if mapping.nodes > 1 and outer is not None:
        words = "adapter of each GPU" if mapping.sharing == 1 else f"adapter of {mapping.sharing} GPUs"
        yield _Links(outer.name, words, mapping.sharing, mapping.on_adapter)
        yield from _uplinks(mapping, outer)


def _uplinks(mapping: Mapping, level: Level) -> Iterator[_Links]:
    """Of a level whose switches do not join all."""
    if level.uplinks is None:
        return
    joins, rails = level.uplinks.joins, level.uplinks.rails
    inside = level is mapping.wiring.inner
    ranks = joins if inside else 1 if rails else joins * mapping.scenario.gpus_per_node
    what = f"{joins} GPUs" if inside else f"a rail of {joins} nodes" if rails else f"{joins} nodes"

    def users(rank: int) -> list[Axes_]:
        below = range(rank, min(rank + ranks, mapping.world.ranks))
        used = {axes for own in below for axes in mapping.on_uplinks(own, level)}
        return [axes for axes in mapping.axes if axes in used]

    yield _Links(f"{level.name} uplinks", f"of {what}", ranks, users)


class _Canvas:
    """Rows of cells, one for each rank of the nodes that are shown."""

    def __init__(self, axes: Axes, mapping: Mapping) -> None:
        self.axes, self.mapping = axes, mapping
        self.per_node = mapping.scenario.gpus_per_node
        room = WIDTH - 2 * LEFT - LABELS - (mapping.shown - 1) * NODE_GAP
        self.cell = min(0.6, room / (mapping.shown * self.per_node))
        self.ranks = range(mapping.shown * self.per_node)

    def left(self, rank: int) -> float:
        """Of its cell."""
        return LEFT + LABELS + rank * self.cell + rank // self.per_node * NODE_GAP

    def nodes(self, down: float) -> None:
        """Their names above them, as far as there is room."""
        for node in range(self.mapping.shown):
            middle = (self.left(node * self.per_node) + self.left((node + 1) * self.per_node - 1) + self.cell) / 2
            text = f"node {node}"
            if text_size(text, SMALL_SIZE)[0] > self.per_node * self.cell * POINTS:
                text = str(node)
            self.axes.text(middle, down, text, size=SMALL_SIZE, ha="center", color=MUTED)

    def groups(self, down: float, own: Axes_, colour: str) -> None:
        """A row of the groups of some axes."""
        mapping = self.mapping
        self._label(down, mapping.name(own), mapping.words(own), colour)
        first = dict.fromkeys(mapping.group(rank, own) for rank in range(self.per_node))
        colours = {group: SERIES[n % len(SERIES)] for n, group in enumerate(first)}
        for rank in self.ranks:
            colour = colours.get(mapping.group(rank, own), OTHER)
            self._cell(rank, down, 1, colour)
            text = str(mapping.place(rank, own))
            if text_size(text, LABEL_SIZE)[0] + 2 < self.cell * POINTS:
                middle, ink = self.left(rank) + self.cell / 2, MUTED if colour == OTHER else ink_on(colour)
                self.axes.text(middle, down + ROW / 2, text, size=LABEL_SIZE, ha="center", va="center", color=ink)

    def links(self, down: float, links: _Links) -> None:
        """A row of links, each divided among the axes that use it."""
        self._label(down, links.name, links.words, None)
        every, per_node = self.mapping.axes, self.per_node
        whole = links.ranks >= per_node
        for rank in [rank for rank in self.ranks if (rank if whole else rank % per_node) % links.ranks == 0]:
            own = links.users(rank)
            wide = min(links.ranks, (len(self.ranks) - rank) if whole else (per_node - rank % per_node))
            self._cell(rank, down, wide, "white")
            for n, axes in enumerate(own):
                top = down + n * ROW / len(own)
                colour = AXIS_COLOURS[every.index(axes) % len(AXIS_COLOURS)]
                self._cell(rank, top, wide, colour, ROW / len(own))

    def _label(self, down: float, name: str, words: str, colour: str | None) -> None:
        if colour is not None:
            self.axes.add_patch(Rectangle((LEFT, down + 0.03), 0.1, 0.12, facecolor=colour))
        self.axes.text(LEFT + 0.16, down + 0.09, name, size=TEXT_SIZE, weight="bold", va="center")
        self.axes.text(LEFT + 0.16, down + 0.27, words, size=LABEL_SIZE, color=MUTED, va="center")

    def _cell(self, rank: int, top: float, wide: int, colour: str, height: float = ROW) -> None:
        pad = min(0.02, self.cell / 10)
        width = self.left(rank + wide - 1) + self.cell - self.left(rank) - 2 * pad
        self.axes.add_patch(
            Rectangle(
                (self.left(rank) + pad, top), width, height, facecolor=colour, edgecolor=MUTED,
                linewidth=0.4,
            )
        )  # fmt: skip
