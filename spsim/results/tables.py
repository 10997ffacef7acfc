"""Tables from a trace, as pandas frames: spans, the memory curve, time by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spsim.costs.static_memory import StaticMemory
from spsim.engine.trace import Trace
from spsim.results.calls import Call
from spsim.results.filling import changes_during
from spsim.results.held import CATEGORIES, Holding
from spsim.results.selection import Selection
from spsim.units import GIB, MIB, PS_PER_MS, PS_PER_US

if TYPE_CHECKING:
    import pandas as pd


def spans_frame(trace: Trace, selection: Selection | None = None) -> pd.DataFrame:
    """One row per span and rank, times in microseconds: of a selection, else of all ranks, simulated or identical."""
    import pandas as pd

    pieces = trace.pieces if selection is None else selection.pieces
    ranks = _all_ranks(trace) if selection is None else selection.ranks
    rows = [
        {
            "rank": rank, "lane": span.lane, "name": info.name, "operator_class": info.operator_class,
            "part": info.part, "purpose": info.purpose, "layer": info.layer, "micro_batch": info.micro_batch,
            "collective": info.collective, "axis": info.axis, "message_bytes": info.message_bytes,
            "posted_us": span.posted_ps / PS_PER_US, "start_us": span.start_ps / PS_PER_US,
            "end_us": span.end_ps / PS_PER_US, "duration_us": (span.end_ps - span.start_ps) / PS_PER_US,
        }
        for piece, infos in ((piece, trace.describe(piece)) for piece in pieces)
        for rank, source in ranks.items()
        for span, info in zip(piece.spans_of(source), infos, strict=False)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame[["layer", "micro_batch"]] = frame[["layer", "micro_batch"]].astype("Int64")
    return frame.sort_values(["rank", "posted_us", "lane", "end_us"], kind="stable", ignore_index=True)


def memory_frame(trace: Trace, statics: Mapping[int, StaticMemory], selection: Selection | None = None) -> pd.DataFrame:
    """The memory curve: one row per change and rank, a column of GiB per category, their total, and the
    operator whose task changed it. Of a selection its ranks, while its layers are under way.
    """
    import pandas as pd

    ranks = _all_ranks(trace) if selection is None else selection.ranks
    windows = [(0, trace.end_ps)] if selection is None else selection.windows
    frames = {
        source: _rank_memory(trace, source, statics[source].by_category(), windows)
        for source in dict.fromkeys(ranks.values())
    }
    parts = [frames[source].assign(rank=rank) for rank, source in ranks.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _all_ranks(trace: Trace) -> dict[int, int]:
    """Rank -> the rank that was simulated for it; those of one class together."""
    return {copy: rank for rank, copies in trace.copies.items() for copy in copies}


def _rank_memory(
    trace: Trace, rank: int, static: Mapping[str, int], windows: Sequence[tuple[int, int]]
) -> pd.DataFrame:
    """Of one rank: what is there before each window, then a row for each change."""
    import pandas as pd

    rows: list[tuple[int, str, list[int]]] = []
    holding = Holding(trace, rank)
    for window in windows:
        held = holding.before(window[0])
        rows.append((window[0], "", [held[category] for category in CATEGORIES]))
        for change, operator in changes_during(holding, window):
            held[change.category] += change.bytes
            rows.append((change.time_ps, operator, [held[category] for category in CATEGORIES]))
    times, operators, sizes = zip(*rows, strict=True)
    frame = pd.DataFrame({"rank": rank, "time_us": [time / PS_PER_US for time in times], "operator": operators})
    for category, size in static.items():
        frame[f"{category.lower().replace(' ', '_')}_gib"] = size / GIB
    for category, column in zip(CATEGORIES, np.array(sizes).T, strict=True):
        frame[f"{category.replace(' ', '_')}_gib"] = (static.get(category, 0) + column) / GIB
    frame["total_gib"] = frame.filter(like="_gib").sum(axis=1)
    return frame


Calls = Mapping[tuple[str, str, int], Call]
"""By collective, axis and bytes of the message."""


def operators_frame(trace: Trace, calls: Calls | None = None) -> pd.DataFrame:
    """The rows of `operator_rows`."""
    import pandas as pd

    return pd.DataFrame(operator_rows(trace, calls))


def operator_rows(trace: Trace, calls: Calls | None = None) -> list[dict[str, Any]]:
    """Time, calls and FLOPs of the first rank by operator and part over the step, longest first; of `calls` the
    algorithm and the channels.
    """
    totals: dict[tuple[str, str, str, str], list[int]] = {}
    known: dict[tuple[str, str, str, str], Call] = {}
    for recording, infos, count in trace.described():
        for span in recording.spans:
            if span.rank != 0:
                continue
            info = infos[span.task]
            label = f"{info.collective} for {info.name}" if info.collective not in ("", info.name) else info.name
            key = (label, info.part, info.operator_class, span.lane)
            entry = totals.setdefault(key, [0, 0, 0, 0])
            for index, value in enumerate((span.end_ps - span.start_ps, 1, info.flops, info.sent_bytes)):
                entry[index] += count * value
            call = (calls or {}).get((info.collective, info.axis, info.message_bytes))
            if call is not None:
                known[key] = call
    rows = [
        {
            "operator": key[0], "part": key[1], "operator_class": key[2], "lane": key[3], "time_ms": time / PS_PER_MS,
            "calls": count, "gflop": flops / 1e9, "sent_mib": sent / MIB,
            "algorithm": known[key].algorithm if key in known else "",
            "channels": known[key].channels or 0 if key in known else 0,
        }
        for key, (time, count, flops, sent) in totals.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["time_ms"], reverse=True)
