"""The passes of many different chunks for many workloads at once: a row for each chunk, a column for each workload.

What a pass of a chunk takes is a sum over its blocks. How full memory is in it depends on how many blocks stand in a
row only through those that have run before, so that chunks of the same blocks, whatever their numbers, are an axis of
arrays, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from spsim.engine.pieces import Pass
from spsim.lazy import lazy
from spsim.step.columns.fill import Floats, Places, parts_of
from spsim.step.columns.step import Key, RanPasses
from spsim.step.columns.walk import NO_LAYER, Branch, Leaf, Memory, Node, Spots
from spsim.step.itinerary import Run

Blocks = tuple[Run, ...]
"""Of a chunk."""
PASSES: tuple[Pass, Pass] = ("forward", "backward")


class _Form(NamedTuple):
    """Chunks of the same blocks, which differ in how many stand in a row."""

    blocks: Blocks
    counts: Places
    """A row for each chunk, a column for each run of blocks."""

    @property
    def firsts(self) -> Places:
        """The number of the first layer of each run in its chunk."""
        layers = self.counts * np.array([run.layers * run.numbered for run in self.blocks])
        found: Places = layers.cumsum(axis=1) - layers
        return found


REPRESENTED = 2
"""Blocks in a row of the chunk from which a form is read: more than one, so that it is seen which layer follows."""


class ChunkPasses:
    """The passes of some chunks, whose blocks ran."""

    def __init__(self, ran: RanPasses, chunks: Sequence[Blocks]) -> None:
        self.ran = ran
        self.rows = {chunk: row for row, chunk in enumerate(chunks)}
        """Where each chunk stands."""
        self._chunks = chunks
        forms: dict[Blocks, list[int]] = {}
        for row, chunk in enumerate(chunks):
            forms.setdefault(tuple([replace(run, count=REPRESENTED) for run in chunk]), []).append(row)
        self._forms = [
            _Form(blocks, np.array([[run.count for run in chunks[row]] for row in rows]))
            for blocks, rows in forms.items()
        ]
        self._of_form = {row: (form, at) for form, rows in enumerate(forms.values()) for at, row in enumerate(rows)}

    @property
    def workloads(self) -> int:
        """How many there are."""
        return len(self.ran.holds)

    # Times

    def _counts(self, *, layers: bool) -> Mapping[str, Floats]:
        """How often each block is in each chunk, or each that is a layer."""
        found = {block: np.zeros(len(self._chunks)) for block, _ in self.ran.lengths}
        for row, chunk in enumerate(self._chunks):
            for run in chunk:
                if run.numbered or not layers:
                    found[run.block][row] += run.count
        return found

    def _summed(self, of: Mapping[Key, Floats], phase: Pass, *, layers: bool = False) -> Floats:
        """The sum over the blocks of each chunk of what a pass of each block has for each workload."""
        own = [(counts, of[block, phase]) for block, counts in self._counts(layers=layers).items()
               if (block, phase) in of]  # fmt: skip
        found: Floats = np.sum([np.multiply.outer(counts, values) for counts, values in own], axis=0)
        return found

    @lazy
    def lengths(self) -> Floats:
        """Picoseconds of each pass: by pass, chunk and workload."""
        return np.array([self._summed(self.ran.lengths, phase) for phase in PASSES])

    @lazy
    def kernels(self) -> Floats:
        """Picoseconds of its kernels."""
        kernels = {key: own.sum(axis=0) for key, own in self.ran.kernels.items()}
        return np.array([self._summed(kernels, phase) for phase in PASSES])

    @lazy
    def of_layers(self) -> Mapping[str, Floats]:
        """Picoseconds of the kernels in the layers of both passes, by class: by chunk and workload."""
        forward, backward = (self._summed(self.ran.kernels, phase, layers=True) for phase in PASSES)
        both = forward + backward
        return {name: both[:, place] for place, name in enumerate(self.ran.block.classes)}

    def class_of_layers(self, name: str) -> Floats:
        """Of one class."""
        return self.of_layers.get(name, np.zeros((len(self._chunks), self.workloads)))

    # Memory

    @lazy
    def _memories(self) -> list[tuple[Memory, ...]]:
        """Of each form, in both passes: rows of its chunks."""
        every = range(len(self._forms))
        return [tuple([self._memory(form, place, slice(None)) for place in range(len(PASSES))]) for form in every]

    def _memory(self, number: int, place: int, which: slice | Places, columns: Places | None = None) -> Memory:
        """Of one pass of chunks of a form, for all workloads; or of a chunk for each of some."""
        form = self._forms[number]
        nodes, sums = self.ran.block.micro_batch(form.blocks, PASSES[place])
        shape = (-1, 1) if columns is None else (-1,)
        counts, firsts = (own[which].T for own in (form.counts, form.firsts))
        own = [
            _counted(node, counts[run].reshape(shape), firsts[run].reshape(shape) - REPRESENTED * before)
            for node, run, before in zip(nodes, *_in_order(form.blocks, place), strict=True)
        ]
        if columns is None:
            return Memory(own, self.ran.fills, sums @ self.ran.basis)
        return Memory(own, parts_of(self.ran.fills, columns), sums @ self.ran.basis[:, columns])

    def _of_chunks(self, of: Sequence[tuple[Floats, ...]]) -> Floats:
        """By pass, chunk and workload, from what each form has of both passes."""
        found = np.empty((len(PASSES), len(self._chunks), self.workloads))
        for row, (form, at) in self._of_form.items():
            for place, own in enumerate(of[form]):
                found[place, row] = own[at if len(own) > 1 else 0]
        return found

    @lazy
    def highest(self) -> Floats:
        """Bytes that each pass takes over what is there before it; 0 where it takes none."""
        shaped = [tuple([np.atleast_2d(own.highest) for own in both]) for both in self._memories]
        return np.maximum(self._of_chunks(shaped), 0.0)

    @lazy
    def left(self) -> Floats:
        """Bytes that each pass leaves; those of backward passes are less than none."""
        return self._of_chunks([tuple([np.atleast_2d(own.total) for own in both]) for both in self._memories])

    def fullest(self, places: Places, rows: Places, columns: Places) -> Spots:
        """Whose allocation makes memory highest: in a pass of a chunk, for one of the workloads each."""
        found = Spots(*(np.zeros(len(places), dtype=np.intp) for _ in range(3)))
        for form, place, at, own in self._by_form(places, rows):
            spots = self._fullest(form, place)
            for into, every in zip(found, spots, strict=True):
                into[own] = np.atleast_2d(every)[at if np.ndim(every) > 1 else 0, columns[own]]
        return found

    def _fullest(self, form: int, place: int) -> Spots:
        if (form, place) not in self._spots:
            self._spots[form, place] = self._memories[form][place].fullest()
        return self._spots[form, place]

    @lazy
    def _spots(self) -> dict[tuple[int, int], Spots]:
        return {}

    def _by_form(self, places: Places, rows: Places) -> Iterator[tuple[int, int, Places, Places]]:
        """Passes of chunks by the form of these: the form, the pass, where each chunk stands, and which they are."""
        forms, at = np.array([self._of_form[row] for row in range(len(self._chunks))], dtype=np.intp)[rows].T
        for form, place in {*zip(forms.tolist(), places.tolist(), strict=True)}:
            own = np.flatnonzero((forms == form) & (places == place))
            yield form, place, at[own], own

    def first_above(self, places: Places, rows: Places, columns: Places, room: Floats) -> Spots:
        """Whose allocation first takes more than some room: in a pass of a chunk, for one of the workloads each."""
        found = Spots(*(np.zeros(len(places), dtype=np.intp) for _ in range(3)))
        for form, place, at, own in self._by_form(places, rows):
            memory = self._memory(form, place, at, columns[own])
            for into, spots in zip(found, memory.first_above(room[own], np.ones(len(own), np.bool_)), strict=True):
                into[own] = spots
        return found


def _in_order(blocks: Blocks, place: int) -> tuple[list[int], list[int]]:
    """The runs of a chunk in the order of a pass, and layers before each in the chunk that represents its form."""
    order = [*range(len(blocks))]
    layers = [run.layers * run.numbered for run in blocks]
    before = [sum(layers[:run]) for run in order]
    return (order[::-1], before[::-1]) if PASSES[place] == "backward" else (order, before)


def _counted(node: Node, counts: Places, later: Places) -> Node:
    """A row of equal blocks with other numbers of them, whose layers have higher numbers."""
    assert isinstance(node, Branch)
    last = (counts - REPRESENTED) * -min(node.layers, 0)
    moved = [_moved(own, later + last) for own in node.body] if node.layers else node.body
    return node._replace(body=moved, runs=counts)


def _moved(node: Node, layers: Places) -> Node:
    if isinstance(node, Leaf):
        return (
            node if isinstance(node.layer, int) and node.layer == NO_LAYER else node._replace(layer=node.layer + layers)
        )
    return node._replace(body=[_moved(own, layers) for own in node.body])
