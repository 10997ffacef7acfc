"""Runs the cases of one library with one number of ranks, in gloo processes; the environment has the library.

    python ranks.py LIBRARY RANKS FILE

writes JSON to FILE: rows of each case, as rank 0 saw them. All ranks must have seen the same.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from cases import Case, read_cases
from kinds import kind_of
from recorder import Recorder
from subject import Subject

PASSES = {"forward": "forward", "backward": "backward", "recompute": "backward", "step": "step"}
"""Phase -> the pass in which its collectives are numbered."""

FLASH_ATTENTION = {"yunchang", "ring-flash-attn"}
"""Libraries that call flash-attn, for which a stand-in is found here."""


def main(library: str, ranks: int, file: str) -> None:
    """Start the ranks and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (ranks, library, f"{folder}/store", file), nprocs=ranks)


def _rank(rank: int, ranks: int, library: str, store: str, file: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    if library in FLASH_ATTENTION:
        sys.path.append(str(Path(__file__).parent / "stand_ins"))
    build = importlib.import_module(f"layers.{library.replace('-', '_')}").build
    rows: list[dict[str, Any]] = []
    for case in read_cases():
        if (case.library, case.ranks) == (library, ranks):
            torch.manual_seed(0)
            found = _rows(case, build(case))
            _check_equal(found, uneven=case.uneven)
            rows += found
    if rank == 0:
        Path(file).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _rows(case: Case, subject: Subject) -> list[dict[str, Any]]:
    recorder = Recorder(subject.root, subject.shared)
    with subject.within, recorder.recording():
        with recorder.keeping():
            loss = subject.loss()
        recorder.phase = "backward"
        loss.backward(torch.ones_like(loss))
        recorder.phase = "step"
        if subject.step is not None:
            subject.step()
    place = {"library": case.library, "version": version(case.library), "case": case.name, "ranks": case.ranks}
    kept: Counter[tuple[str, str]] = Counter()
    for tensor in recorder.kept:
        kept[kind_of(tensor, case), tensor.dtype] += tensor.bytes
    return [
        *({**place, **row} for row in _collectives(recorder)),
        *({**place, "pass": "kept", "collective": kind, "dtype": dtype, "kept_bytes": size}
          for (kind, dtype), size in kept.items()),
    ]  # fmt: skip


def _collectives(recorder: Recorder) -> list[dict[str, Any]]:
    """Rows of equal calls that follow each other."""
    rows, order = [], Counter[str]()
    for call, equal in groupby(recorder.calls):
        count = len(list(equal))
        rows.append({
            "pass": call.phase, "order": order[PASSES[call.phase]], "collective": call.collective, "count": count,
            "message_bytes": call.message_bytes, "dtype": call.dtype,
        })  # fmt: skip
        order[PASSES[call.phase]] += count
    return rows


def _check_equal(rows: list[dict[str, Any]], *, uneven: bool) -> None:
    """All ranks have seen the same: of uneven shares the same calls."""
    sizes = ("message_bytes", "kept_bytes") if uneven else ()
    mine = [{key: value for key, value in row.items() if key not in sizes} for row in rows]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            different = next((pair for pair in zip(everywhere[0], other, strict=False) if pair[0] != pair[1]), "length")
            raise RuntimeError(f"rank {rank} has seen something else than rank 0: {different}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
