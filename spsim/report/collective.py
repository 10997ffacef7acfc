"""What is said of one collective by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from spsim.report.table import table
from spsim.studies.collectives import CollectiveTime
from spsim.units import GIB, KIB, MIB


def size_text(size: float) -> str:
    """Bytes in the unit that they have most of."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def sentence(found: CollectiveTime) -> str:
    """Time, bandwidth and algorithm of one collective."""
    nodes = f"{found.nodes} node{'s' if found.nodes > 1 else ''}"
    by = f"{found.algorithm} {found.protocol}" if found.protocol else found.algorithm
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    channels = f", {found.channels} channel{'s' if found.channels > 1 else ''}" if found.channels else ""
    return (
        f"{found.collective} of {size_text(found.message_bytes)} among {found.gpus} GPUs on {nodes} of "
        f"{found.hardware}: {found.time_us:.4g} us, {found.bus_bandwidth_gb_per_s:.4g} GB/s of bus bandwidth by {by} "
        f"({steps}{channels}); the smallest message takes {found.alpha_us:.4g} us"
    )


def algorithms_table(made: Mapping[str, Sequence[CollectiveTime]]) -> Table:
    """One message by every algorithm that serves."""
    columns = ["algorithm", "runs", "time", "bus bandwidth", "smallest message", "steps"]
    found = table("By algorithm", columns, numbers=columns[2:])
    for name, (row, *_) in made.items():
        runs = f"{row.algorithm} {row.protocol}" if row.protocol else row.algorithm
        found.add_row(
            name, runs, f"{row.time_us:.4g} us", f"{row.bus_bandwidth_gb_per_s:.4g} GB/s", f"{row.alpha_us:.4g} us",
            str(row.steps),
        )  # fmt: skip
    return found
