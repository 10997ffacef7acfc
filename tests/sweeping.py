"""Sweeps of the experiment `mine` in other processes."""

import time


def wait_for_rows(running, directory, count):
    """Until so many rows are on disk, or the process has ended; how many there are then."""
    rows = directory / "mine" / "rows.jsonl"
    while running.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)
    return rows.read_bytes().count(b"\n") if rows.exists() else 0
