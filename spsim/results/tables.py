"""Tables from a trace, as pandas frames: spans, the memory curve, time by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spsim.engine.trace import Trace
from spsim.results.held import CATEGORIES
from spsim.results.metrics import memory_changes
from spsim.units import GIB, MIB, PS_PER_MS, PS_PER_US

if TYPE_CHECKING:
    import pandas as pd


def spans_frame(trace: Trace) -> pd.DataFrame:
    """One row per span and rank, times in microseconds; every rank has its rows, simulated or identical."""
    import pandas as pd

    rows = [
        {
            "rank": rank, "lane": span.lane, "name": info.name, "operator_class": info.operator_class,
            "part": info.part, "purpose": info.purpose, "layer": info.layer, "micro_batch": info.micro_batch,
            "collective": info.collective, "axis": info.axis, "message_bytes": info.message_bytes,
            "posted_us": span.posted_ps / PS_PER_US, "start_us": span.start_ps / PS_PER_US,
            "end_us": span.end_ps / PS_PER_US, "duration_us": (span.end_ps - span.start_ps) / PS_PER_US,
        }
        for span in trace.spans
        for info in (trace.tasks[span.task],)
        for rank in trace.copies.get(span.rank, (span.rank,))
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame[["layer", "micro_batch"]] = frame[["layer", "micro_batch"]].astype("Int64")
    return frame.sort_values(["rank", "posted_us", "lane", "end_us"], kind="stable", ignore_index=True)


def memory_frame(trace: Trace, static: dict[str, int]) -> pd.DataFrame:
    """The memory curve: one row per change and rank, a column of GiB per category, their total, and the
    operator whose task changed it.
    """
    import pandas as pd

    frames = [_rank_memory(trace, rank, static) for rank in trace.copies]
    parts = [
        frame.assign(rank=copy) for rank, frame in zip(trace.copies, frames, strict=True) for copy in trace.copies[rank]
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _rank_memory(trace: Trace, rank: int, static: dict[str, int]) -> pd.DataFrame:
    import pandas as pd

    changes = memory_changes(trace, rank)
    frame = pd.DataFrame(
        {
            "rank": rank,
            "time_us": [0.0, *(c.time_ps / PS_PER_US for c in changes)],
            "operator": ["", *(trace.tasks[c.task].name for c in changes)],
        }
    )
    for category, size in static.items():
        frame[f"{category}_gib"] = size / GIB
    for category in CATEGORIES:
        sizes = [static.get(category, 0), *(c.bytes if c.category == category else 0 for c in changes)]
        frame[f"{category.replace(' ', '_')}_gib"] = np.cumsum(sizes) / GIB
    frame["total_gib"] = frame.filter(like="_gib").sum(axis=1)
    return frame


def operators_frame(trace: Trace, rank: int = 0) -> pd.DataFrame:
    """The rows of `operator_rows`."""
    import pandas as pd

    return pd.DataFrame(operator_rows(trace, rank))


def operator_rows(trace: Trace, rank: int = 0) -> list[dict[str, Any]]:
    """Time, calls and FLOPs of one simulated rank by operator and part over the step, longest first."""
    totals: dict[tuple[str, str, str, str], list[int]] = {}
    for recording, infos, count in trace.described():
        for span in recording.spans:
            if span.rank != rank:
                continue
            info = infos[span.task]
            label = f"{info.collective} for {info.name}" if info.collective not in ("", info.name) else info.name
            entry = totals.setdefault((label, info.part, info.operator_class, span.lane), [0, 0, 0, 0])
            for index, value in enumerate((span.end_ps - span.start_ps, 1, info.flops, info.sent_bytes)):
                entry[index] += count * value
    rows = [
        {
            "operator": name, "part": part, "operator_class": kind, "lane": lane, "time_ms": time / PS_PER_MS,
            "calls": calls, "gflop": flops / 1e9, "sent_mib": sent / MIB,
        }
        for (name, part, kind, lane), (time, calls, flops, sent) in totals.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["time_ms"], reverse=True)
