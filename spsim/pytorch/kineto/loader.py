"""From the files of torch.profiler, one a rank, to a trace."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.pytorch.kineto.device import device_spans
from spsim.pytorch.kineto.host import host_spans
from spsim.pytorch.kineto.phases import in_passes
from spsim.pytorch.kineto.profile import HINT, read_profile
from spsim.results.measured import MAX_LENGTH_US, MeasuredSpan, measured_trace

NS_PER_US = 1e3


def load_kineto_trace(paths: str | Path | Sequence[str | Path], *, unnamed_lane: str = "communication") -> Trace:
    """The trace of a run that torch.profiler recorded, one file (.json or .json.gz) a rank.

    Where a file has work of a device, its kernels and copies are the spans: those of the busiest stream on the lane
    `compute`, others on `compute, stream N`, copies from and to the host on `copies`, NCCL's kernels on a lane named
    as their process group, or `nccl`. Otherwise the run was on a CPU: the spans are the outermost operators that move
    data, and the collectives of c10d and gloo, whose trace does not name the process group: their lane is
    `unnamed_lane`. What threads of autograd's engine launch is `backward`, what an optimizer's step launches, and what
    comes before it after a backward pass, `optimizer`, all else `forward`; each change between them begins a further
    micro-batch, which copies alone do not. Files of one run share the time of day; clocks of different hosts are not
    corrected. Message sizes need NCCL's metadata (torch 2.3 or later) or `record_shapes=True`; without them they are 0.

    Raises `InputError` on a file that cannot be read, is no regular file, holds more than 1 GiB inflated, is not
    torch.profiler's, has a value of the wrong kind, is given twice, or is of a rank that another file is of. Files
    that do not say their rank are taken as ranks in the order given.
    """
    files = _files(paths)
    by_rank: dict[int, Path] = {}
    read = []
    for index, path in enumerate(files):
        rank, base_ns, spans = _read(path, index, unnamed_lane)
        if rank in by_rank:
            raise InputError(f"{path}: is of rank {rank}, as is {by_rank[rank]}; give one file a rank")
        by_rank[rank] = path
        read.append((base_ns, spans))
    return measured_trace(align(read))


def _files(paths: Any) -> list[Path]:
    given = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
    for path in given:
        if not isinstance(path, str | os.PathLike) or "\0" in str(path):
            raise InputError(f"measured trace: {path!r} is no path; give the path of one file of torch.profiler a rank")
    files = [Path(path) for path in given]
    if not files:
        raise InputError("measured trace: no files; give one file of torch.profiler for each rank")
    for path, count in Counter(map(os.path.realpath, files)).items():
        if count > 1:
            raise InputError(f"{path}: is given {count} times; give one file a rank")
    return files


def read_spans(path: Path, rank: int, *, unnamed_lane: str = "communication") -> tuple[int, list[MeasuredSpan]]:
    """The time of day, in nanoseconds, from which the times of one file count, and its spans; `rank` serves where
    the file does not say its own.
    """
    _, base_ns, spans = _read(path, rank, unnamed_lane)
    return base_ns, spans


def align(ranks: Sequence[tuple[int, Sequence[MeasuredSpan]]]) -> list[MeasuredSpan]:
    """Spans of several ranks on one time axis, by the time of day from which each of them counts."""
    first = min(base_ns for base_ns, _ in ranks)
    aligned = []
    for base_ns, spans in ranks:
        shift = (base_ns - first) / NS_PER_US
        aligned += [
            replace(
                span, start_us=span.start_us + shift, end_us=span.end_us + shift, posted_us=span.asked_us + shift
            )
            for span in spans
        ]  # fmt: skip
    return aligned


def _read(path: Path, rank: int, unnamed_lane: str) -> tuple[int, int, list[MeasuredSpan]]:
    """Rank, base time and spans of one file; everything wrong with it names the file."""
    try:
        profile = read_profile(path, rank)
        issued = device_spans(profile) or host_spans(profile, unnamed_lane)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}; {HINT}") from None
    if not issued:
        raise InputError(f"{path}: neither kernels nor operators are recorded in it; {HINT}")
    first = min(one.span.asked_us for one in issued)
    last = max((one.span for one in issued), key=lambda span: span.end_us)
    if last.end_us - first >= MAX_LENGTH_US:
        raise InputError(
            f"{path}: {last.name!r} ends {last.end_us - first:.3g} us after the first event, more than a hundred days; "
            f"{HINT}"
        )
    return profile.rank, profile.base_ns, in_passes(issued)
