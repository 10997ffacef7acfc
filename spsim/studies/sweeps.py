"""Sweeps: many configurations, one row each, and experiments that turn rows into figures and tables.

A row is written the moment it is known. A configuration that cannot be simulated is a row with its reason;
an interrupted sweep keeps its rows, and running it again computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spsim.errors import InputError
from spsim.files import write_text
from spsim.inputs.scenario import scenario_from
from spsim.program.operators import OPERATOR_CLASSES
from spsim.results.metrics import compute_by_class
from spsim.results.result import Result
from spsim.simulation import simulate
from spsim.units import MIB, PS_PER_MS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Labels = Mapping[str, str | int | float | bool]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One configuration: the settings of a `Scenario`, and columns to add to its row."""

    settings: Settings
    labels: Labels = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Identity of the point: its resolved inputs and the version of the program that computes it."""
        text = json.dumps([_plain(self.settings), dict(self.labels), program_fingerprint()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Experiment:
    """One question: its configurations, and the figures and tables that answer it."""

    name: str
    title: str
    points: Sequence[Point]
    quick: Sequence[Point] = ()
    """A small selection for `--quick`; every fourth point unless given."""
    figures: Callable[[pd.DataFrame], Mapping[str, Figure]] = lambda frame: {}
    """File name -> figure, from the rows."""
    tables: Callable[[pd.DataFrame], Iterable[Any]] = lambda frame: ()
    """What to print, from the rows: text or rich tables."""

    def selection(self, *, quick: bool) -> Sequence[Point]:
        """The points to compute."""
        return (self.quick or self.points[::4]) if quick else self.points


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


@cache
def program_fingerprint() -> str:
    """Hash of the package's sources and profiles: rows of another program are not resumed from."""
    from spsim.inputs.resources import profiles_directory

    files = [*Path(__file__).parent.parent.glob("**/*.py"), *profiles_directory().glob("*.toml")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("spsim")
    except PackageNotFoundError:
        return "unknown"


def row(point: Point) -> dict[str, Any]:
    """The row of one configuration; one that breaks a rule has its reason in `error` and no numbers."""
    try:
        result = simulate(scenario_from(point.settings, "point"))
    except InputError as error:
        return {**point.labels, "error": str(error)}
    return {**point.labels, **measures(result), **point.labels, "error": ""}


def measures(result: Result) -> dict[str, Any]:
    """The columns of a result; times are of one layer and micro-batch unless the name says otherwise."""
    scenario = result.scenario
    instances = scenario.model.layers * scenario.num_micro_batches
    forward_s, backward_s = result.layer_forward_s, result.layer_backward_s
    compute = compute_by_class(result.trace, next(iter(result.trace.copies)))
    return {
        "model": scenario.model.name,
        "hardware": scenario.hardware.name,
        "strategy": scenario.plan.label,
        "plan": scenario.plan.text,
        "seq_len": scenario.workload.seq_len,
        "micro_batch": scenario.workload.micro_batch,
        "gpus": scenario.plan.gpus,
        "scope": result.scope,
        "layers": scenario.model.layers,
        "layer_time_ms": (forward_s + backward_s) * 1e3,
        "layer_forward_ms": forward_s * 1e3,
        "layer_backward_ms": backward_s * 1e3,
        "exposed_comm_ms": result.exposed_comm_s * 1e3 / instances,
        **{f"{name}_ms": compute.get(name, 0) / PS_PER_MS / instances for name in OPERATOR_CLASSES},
        "step_time_ms": result.step_time_s * 1e3,
        "weight_sync_ms": result.weight_sync_s * 1e3,
        "mfu": result.mfu,
        "tokens_per_s_per_gpu": result.tokens_per_s_per_gpu,
        "activation_mib_per_layer": result.activation_bytes_per_layer / MIB,
        "peak_memory_gib": result.peak_memory_gib,
        "device_memory_gib": result.device_memory_gib,
        "capacity_gib": result.capacity_gib,
        "fits": result.fits,
        "peak_operator": result.peak_operator,
        "out_of_memory_at": result.out_of_memory_at or "",
        **_calibration(result),
    }


def _calibration(result: Result) -> dict[str, Any]:
    """The error band and flags, where a calibration wrote the profile."""
    band = {} if result.error_band is None else {"step_time_error_percent": result.error_band.step_time_percent}
    return {**band, "flagged": ", ".join(result.flagged)} if band or result.flagged else {}


def sweep(grid: Iterable[Point | Settings], executor: Executor | None = None) -> pd.DataFrame:
    """One row per configuration, in the order of the grid; failures with their reason in `error`.

    Any `concurrent.futures.Executor` can compute them; without one they are computed here.
    """
    points = [point if isinstance(point, Point) else Point(point) for point in grid]
    rows = dict(rows_of(points, executor))
    return pd.DataFrame([rows[index] for index in range(len(points))])


def rows_of(points: Sequence[Point], executor: Executor | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) as rows are finished, in any order when an executor computes them."""
    if executor is None:
        yield from ((index, row(point)) for index, point in enumerate(points))
        return
    futures = {executor.submit(_rows, points[start : start + CHUNK]): start for start in range(0, len(points), CHUNK)}
    try:
        for future in as_completed(futures):
            yield from enumerate(future.result(), futures[future])
    finally:
        for future in futures:
            future.cancel()


CHUNK = 32
"""Configurations that travel to a worker together."""


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [row(point) for point in points]


class RowFile:
    """Rows on disk, one JSON document a line: a row that was cut short is computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Finished rows by key."""
        if self.path.is_dir():
            raise InputError(
                f"{self.path}: is a directory, expected the rows of a sweep; remove it or give another --out"
            )
        rows = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                finished = json.loads(line)
                if "error" in finished:
                    rows[finished["key"]] = finished
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                continue
        return rows

    def start(self, kept: Iterable[Mapping[str, Any]]) -> None:
        """Rewrite the file with the rows that are kept, which also drops a line that was cut short."""
        text = "".join(f"{json.dumps(finished)}\n" for finished in kept)
        write_text(self.path, text)

    @contextmanager
    def appending(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Add rows; each is handed to the system at once, so that it outlives the process."""
        with self.path.open("a", encoding="utf-8") as file:

            def append(finished: Mapping[str, Any]) -> None:
                file.write(f"{json.dumps(finished)}\n")
                file.flush()

            yield append


def run_points(
    points: Sequence[Point], file: RowFile, executor: Executor | None, progress: Callable[[int], None]
) -> pd.DataFrame:
    """Compute what the file does not have; `progress` is told how many rows are finished."""
    keys = {point.key for point in points}
    finished = {key: kept for key, kept in file.read().items() if key in keys}
    file.start(finished.values())
    progress(len(finished))
    missing = [point for point in points if point.key not in finished]
    with file.appending() as append:
        for index, new in rows_of(missing, executor):
            key = missing[index].key
            finished[key] = {"key": key, **new}
            append(finished[key])
            progress(len(finished))
    return pd.DataFrame([finished[point.key] for point in points if point.key in finished])


def manifest(experiment: Experiment, points: Sequence[Point]) -> dict[str, Any]:
    """What a directory of results was made from."""
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "spsim": package_version(),
        "program": program_fingerprint(),
        "packages": {name: version(name) for name in ("numpy", "pandas", "simpy", "pydantic")},
        "points": [{"key": p.key, "labels": dict(p.labels), "settings": _plain(p.settings)} for p in points],
    }
