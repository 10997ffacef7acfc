"""From the files of torch.profiler, one a rank, to a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from spsim.engine.pieces import Pass
from spsim.engine.trace import Trace
from spsim.errors import InputError
from spsim.pytorch.kineto.device import device_spans
from spsim.pytorch.kineto.events import HINT, ProfiledRank, read_profile
from spsim.pytorch.kineto.host import host_spans
from spsim.results.measured import MeasuredSpan, measured_trace

NS_PER_US = 1e3


def load_kineto_trace(paths: str | Path | Sequence[str | Path], *, unnamed_lane: str = "communication") -> Trace:
    """The trace of a run that torch.profiler recorded, one file (.json or .json.gz) a rank.

    Where a file has device kernels, they are the spans: those of the busiest stream on the lane `compute`, others
    on `compute, stream N`, NCCL's on a lane named as their process group. Otherwise the run was on a CPU: the
    spans are the outermost operators that move data, and the collectives of c10d and gloo, whose trace does not
    name the process group: their lane is `unnamed_lane`. What autograd's engine runs is `backward`, what runs
    in an optimizer's step `optimizer`, all else `forward`; each change between them begins a further
    micro-batch. Files of one run share the time of day; clocks of different hosts are not corrected.
    Message sizes need NCCL's metadata (torch 2.3 or later) or `record_shapes=True`; without them they are 0.

    Raises `InputError` on a file that cannot be read, is not torch.profiler's, is given twice, or is of a
    rank that another file is of. Files that do not say their rank are taken as ranks in the order given.
    """
    files = _files(paths)
    profiles = [read_profile(path, index) for index, path in enumerate(files)]
    by_rank: dict[int, ProfiledRank] = {}
    for profile in profiles:
        if profile.rank in by_rank:
            raise InputError(
                f"{profile.path}: is of rank {profile.rank}, as is {by_rank[profile.rank].path}; give one file a rank"
            )
        by_rank[profile.rank] = profile
    return measured_trace(align([(profile.base_ns, _spans(profile, unnamed_lane)) for profile in profiles]))


def _files(paths: Any) -> list[Path]:
    given = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
    for path in given:
        if not isinstance(path, str | PathLike):
            raise InputError(f"measured trace: {path!r} is no path; give the path of one file of torch.profiler a rank")
    files = [Path(path) for path in given]
    if not files:
        raise InputError("measured trace: no files; give one file of torch.profiler for each rank")
    for path, count in Counter(path.resolve() for path in files).items():
        if count > 1:
            raise InputError(f"{path}: is given {count} times; give one file a rank")
    return files


def read_spans(path: Path, rank: int, *, unnamed_lane: str = "communication") -> tuple[int, list[MeasuredSpan]]:
    """The time of day, in nanoseconds, from which the times of one file count, and its spans; `rank` serves where
    the file does not say its own.
    """
    profile = read_profile(path, rank)
    return profile.base_ns, _spans(profile, unnamed_lane)


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


def _spans(profile: ProfiledRank, unnamed_lane: str) -> list[MeasuredSpan]:
    found = device_spans(profile) or host_spans(profile, unnamed_lane)
    if not found:
        raise InputError(f"{profile.path}: neither kernels nor operators are recorded in it; {HINT}")
    return [replace(span, micro_batch=number) for span, number in zip(found, _passes(found), strict=True)]


def _passes(spans: Sequence[MeasuredSpan]) -> list[int]:
    """The number of the pass that each span belongs to, spans in the order in which they were issued."""
    begun: Counter[Pass] = Counter([spans[0].phase])
    numbers = [0]
    for before, span in pairwise(spans):
        begun[span.phase] += span.phase != before.phase
        numbers.append(begun[span.phase] - 1)
    return numbers
