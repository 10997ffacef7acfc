"""What of a step is written out: some ranks, and the passes of some layers and micro-batches. Only these are looked at.

Ranks that behave alike need one file, table or lane; layers and micro-batches are alike too, so that the first of
them say all where there are too many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spsim.engine.pieces import Piece
from spsim.engine.recording import COMPUTE_LANE
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.lazy import lazy

LARGE = 25_000
"""Spans from which on some layers and micro-batches are left out, unless they are named."""
OF_CLASSES = 4
"""Times as many from which on classes of ranks are left out too."""
LARGEST = 1_000_000
"""Spans that are written out at most: some hundred megabytes of tables."""
LANES = (COMPUTE_LANE, "tp", "ulysses", "ring", "shard", "dp")
"""Order of the lanes in pictures and traces."""


@dataclass(frozen=True)
class Selection:
    """Some ranks, layers and micro-batches of a trace."""

    trace: Trace
    ranks: Mapping[int, int]
    """Rank -> the rank that was simulated for it; in order."""
    layers: Sequence[int]
    micro_batches: Sequence[int]
    of: tuple[int, int]
    """How many layers and micro-batches the step has."""

    @property
    def whole_step(self) -> bool:
        """Whether it has all layers and micro-batches."""
        return (len(self.layers), len(self.micro_batches)) == self.of

    @property
    def words(self) -> str:
        """Which they are, and of how many."""
        total = sum(map(len, self.trace.copies.values()))
        chosen = (("rank", [*self.ranks], total), ("layer", self.layers, self.of[0]))
        return ", ".join(_words(*some) for some in (*chosen, ("micro-batch", self.micro_batches, self.of[1])))

    @lazy
    def pieces(self) -> Sequence[Piece]:
        """Of the layers and micro-batches, and those that belong to none, in order of tasks."""
        if self.whole_step:
            return self.trace.pieces
        return self.trace.pieces_in(self.layers, self.micro_batches)

    @lazy
    def windows(self) -> list[tuple[int, int]]:
        """When its pieces are under way; apart, and in order."""
        if self.whole_step:
            return [(0, self.trace.end_ps)]
        found: list[tuple[int, int]] = []
        for begin, end in sorted(piece.window for piece in self.pieces):
            if found and begin <= found[-1][1]:
                found[-1] = found[-1][0], max(found[-1][1], end)
            else:
                found.append((begin, end))
        return found

    @property
    def num_spans(self) -> int:
        """Spans of all its ranks."""
        return _spans(self.pieces, self.ranks)


def select(
    trace: Trace,
    layers: int,
    micro_batches: int,
    *,
    ranks: Sequence[int] | None = None,
    of_layers: Sequence[int] | None = None,
    large: int | None = None,
) -> Selection:
    """The ranks and layers that are named, of a step of so many layers and micro-batches. Else one rank of each class,
    and all layers; of a step of more than `large` spans (`LARGE` unless given) the first micro-batches, then the
    first layers, then fewer classes.

    `InputError` for a rank or layer that there is not, and where more is named than can be written.
    """
    large = LARGE if large is None else large
    chosen = simulated_for(trace, distinct_ranks(trace) if ranks is None else sorted(set(ranks)))
    for layer in of_layers or ():
        if not 0 <= layer < layers:
            raise InputError(f"layers: {layer} is not a layer of the model; use 0 to {layers - 1}")
    wanted = range(layers) if of_layers is None else sorted(set(of_layers))
    one = max(1, _spans(trace.pieces_in(wanted[:1], [0]), chosen))
    most = large if of_layers is None else LARGEST
    batches = range(min(micro_batches, max(1, most // (one * len(wanted)))))
    if of_layers is None:
        wanted = wanted[: max(1, large // one)]
    if ranks is None:
        chosen = simulated_for(trace, spread([*chosen], max(1, OF_CLASSES * large * len(chosen) // one)))
    found = Selection(trace, chosen, wanted, batches, (layers, micro_batches))
    if one * len(wanted) * len(batches) > LARGEST and found.num_spans > LARGEST:
        raise InputError(
            f"{len(chosen)} ranks and {len(wanted)} layers have {found.num_spans:,} spans, more than {LARGEST:,}; "
            "name fewer ranks or layers"
        )
    return found


def _words(name: str, numbers: Sequence[int], of: int) -> str:
    """Some of so many of a kind, in short: `layers 0-3, 7 of 48`."""
    plural = f"{name}es" if name.endswith("ch") else f"{name}s"
    if len(numbers) == of:
        return f"all {of} {plural}" if of > 1 else f"1 {name}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    listed = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{plural if len(numbers) > 1 else name} {listed} of {of}"


def _spans(pieces: Iterable[Piece], ranks: Mapping[int, int]) -> int:
    """Spans of some ranks in some pieces."""
    return sum(
        len(piece.recording.outline.labels)
        for piece in pieces
        for source in ranks.values()
        if source in piece.recording.times
    )


def distinct_ranks(trace: Trace) -> list[int]:
    """The first of each class of ranks, those with the same spans."""
    first: dict[tuple[object, ...], int] = {}
    for rank in trace.copies:
        times = (recording.times.get(rank) for recording in trace.recordings)
        first.setdefault(tuple(None if own is None else tuple(own.ravel().tolist()) for own in times), rank)
    return sorted(first.values())


def spread(ranks: Sequence[int], most: int) -> list[int]:
    """So many ranks at most, the first and the others evenly."""
    if len(ranks) <= most:
        return [*ranks]
    return [ranks[place * len(ranks) // most] for place in range(most)]


def simulated_for(trace: Trace, ranks: Iterable[int]) -> dict[int, int]:
    """Rank -> the rank that was simulated for it; `InputError` for what is no rank."""
    source = {copy: rank for rank, copies in trace.copies.items() for copy in copies}
    unknown = [rank for rank in ranks if rank not in source]
    if unknown:
        raise InputError(f"ranks: {unknown[0]} is not a rank of the plan; use 0 to {max(source)}")
    return {rank: source[rank] for rank in ranks}


def lane_order(trace: Trace) -> list[str]:
    """The lanes of a trace, compute first and lanes without a fixed place last."""
    found = {lane for recording in trace.recordings for lane in recording.outline.lanes}
    return [lane for lane in LANES if lane in found] + sorted(found - set(LANES))
