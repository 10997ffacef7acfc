"""The points of a sweep in families that differ in the sizes of their workloads only: each is computed at once."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Annotated, Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from spsim.inputs.grid import Grid
from spsim.inputs.rules import is_single, keeps_sizes
from spsim.inputs.scenario import Scenario, scenario_from
from spsim.inputs.workload import Precision, Workload, tokens
from spsim.program.templates import are_whole
from spsim.results.columns import ResultColumns
from spsim.results.joined import JoinedColumns
from spsim.simulation import simulate_many
from spsim.studies.points import Labels, Point
from spsim.studies.rows import Row, failed, measures, row
from spsim.studies.tables import Table, tables_of_rows
from spsim.studies.together import OF_ALL, alike, come_again, simulate_together

MANY = 256
"""Workloads of a plan that are computed at once: their numbers stay in a cache."""
MOST = 16384
"""Workloads of many plans: what is made for stages is made for all of them."""
SIZES = ("seq_len", "micro_batch", "global_batch")


def tables_of_points(points: Sequence[Point]) -> list[Table]:
    """The rows of all points: the only place where sweeps compute, here or in a worker. Those that break a rule have
    their reason in `error` and no numbers.
    """
    if len(points) == 1:
        return tables_of_rows([row(points[0])], [0])
    with _without_collections():
        tables, alone = _of_families(points)
    return tables + tables_of_rows([row(points[place]) for place in alone], alone)


def _of_families(points: Sequence[Point]) -> tuple[list[Table], list[int]]:
    """The rows that are computed with others, and the places of all others."""
    sorting = _Sorting(points)
    tables: list[Table] = []
    alone = sorting.alone.places
    together: dict[Hashable, dict[Hashable, list[_Placed]]] = defaultdict(lambda: defaultdict(list))
    for family in sorting.families.values():
        placed = _checked(points, family, alone, tables)
        if placed is None:
            continue
        key = alike(placed.grid)
        if key is None:
            tables += _apart(points, placed, alone)
        else:
            together[key[:OF_ALL], tuple(points[family.places[0]].labels)][key].append(placed)
    for of_model in together.values():
        several = []
        for passes, own in of_model.items():
            if come_again(passes) or len(own) > 1 or len(own[0].places) > 1:
                several.append(own)
            else:
                alone += own[0].places.tolist()
        for some in _parts(several):
            tables += _together(points, some, alone)
    return tables, alone


def by_family(points: Iterable[Point]) -> list[int]:
    """The places of all points, those that are computed at once together."""
    sorting = _Sorting(points)
    return [place for family in (*sorting.families.values(), sorting.alone) for place in family.places]


@dataclass(slots=True)
class _Family:
    """Points with one hardware, model and plan, whose workloads differ in their sizes."""

    places: list[int] = field(default_factory=list)
    sizes: list[tuple[Any, ...]] = field(default_factory=list)
    """Of each its `SIZES` as given."""


class _Sorting:
    """Points by family; what looks unusual stands alone, so that the usual way says what is wrong with it."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.families: dict[Hashable, _Family] = defaultdict(_Family)
        self.alone = _Family()
        self._families: dict[Hashable, tuple[Any, _Family]] = {}
        """By the identity of what points share, which is kept so that nothing else takes its place."""
        self._values: dict[int, tuple[Any, Hashable]] = {}
        """The same of each value."""
        self._sort(points)

    def _sort(self, points: Iterable[Point]) -> None:
        """Many points, most of which share all but their sizes with the one before."""
        hardware = model = plan = nodes = scope = phase = precision = labels = _NOT_GIVEN
        family = self.alone
        for place, point in enumerate(points):
            settings = point.settings
            given = settings.get("workload")
            if not isinstance(given, dict):
                given = given.__dict__ if isinstance(given, Workload) else None
            if given is None or not (settings.keys() <= _SETTINGS and given.keys() <= _WORKLOAD):
                self.alone.places.append(place)
                continue
            setting, size = settings.get, given.get
            if (
                hardware is not setting("hardware")
                or model is not setting("model")
                or plan is not setting("plan", _NOT_GIVEN)
                or nodes is not setting("nodes")
                or scope is not setting("scope")
                or phase is not size("phase", "training")
                or precision is not size("precision", "bf16")
                or labels != point.labels.keys()
            ):
                hardware, model, nodes = setting("hardware"), setting("model"), setting("nodes")
                plan, scope, labels = setting("plan", _NOT_GIVEN), setting("scope"), point.labels.keys()
                phase, precision = size("phase", "training"), size("precision", "bf16")
                family = self._family((hardware, model, plan, nodes, scope), phase, precision, point.labels)
            family.places.append(place)
            family.sizes.append((tokens(size("seq_len")), size("micro_batch", 1), size("global_batch")))

    def _family(self, shared: tuple[Any, ...], phase: Any, precision: Any, labels: Labels) -> _Family:
        key = (*map(id, (*shared, phase, precision)), *labels)
        if key not in self._families:
            usual = phase == "training" and precision in _PRECISIONS
            by_value = (*map(self._by_value, shared), precision, *labels) if usual else None
            self._families[key] = (shared, phase, precision), self.families[by_value] if usual else self.alone
        return self._families[key][1]

    def _by_value(self, value: Any) -> Hashable:
        """Equal of what is equal, as far as that can be seen."""
        if id(value) not in self._values:
            self._values[id(value)] = value, _hashable(value)
        return self._values[id(value)][1]


_SETTINGS = frozenset(Scenario.model_fields) - {"network", "perturbations"}
_WORKLOAD = frozenset(Workload.model_fields)
_PRECISIONS = get_args(Precision)
_NOT_GIVEN = object()


def _hashable(value: Any) -> Hashable:
    parts = tuple((name, type(part), part) for name, part in value.items()) if isinstance(value, Mapping) else value
    try:
        hash(parts)
    except TypeError:
        return id(value)
    return type(value), parts


class _Placed(NamedTuple):
    """Workloads of a plan that keep all rules, and the places of their points."""

    places: Any
    grid: Grid

    def part(self, which: slice) -> _Placed:
        """Some of them."""
        return _Placed(self.places[which], self.grid.part(which))


def _checked(points: Sequence[Point], family: _Family, alone: list[int], tables: list[Table]) -> _Placed | None:
    """The workloads of a family; `alone` gets the points that have to be computed one by one, and `tables` those that
    cannot be.
    """
    broken: list[Row] = []
    scenario: Scenario | None = None
    for place in family.places:
        try:
            scenario = scenario_from(points[place].settings, "point")
            break
        except Exception as error:
            broken.append(failed(points[place], error))
    tables += tables_of_rows(broken, family.places[: len(broken)])
    if scenario is None:
        return None
    places, sizes = np.array(family.places[len(broken) :]), family.sizes[len(broken) :]
    valid = _valid(sizes)
    alone += places[~valid].tolist()
    places, grid = places[valid], Grid.of(scenario, [*compress(sizes, valid)])
    plan, micro_batch = scenario.plan, scenario.workload.micro_batch
    keeps = keeps_sizes(scenario.model, plan, grid.workload, grid.global_batch)
    keeps &= is_single(plan, grid.workload.micro_batch) == is_single(plan, micro_batch)
    keeps &= are_whole(scenario.model, plan, grid.workload.seq_len)
    alone += places[~keeps].tolist()
    return _Placed(places[keeps], grid.part(keeps)) if keeps.any() else None


def _apart(points: Sequence[Point], placed: _Placed, alone: list[int]) -> Iterator[Table]:
    """The rows of one plan whose passes no other has."""
    if len(placed.places) == 1:  # no slower, and nothing has to be prepared
        alone += placed.places.tolist()
        return
    for first in range(0, len(placed.places), MANY):
        part = placed.part(slice(first, first + MANY))
        yield from _at_once(points, part.places, partial(simulate_many, part.grid), alone)


def _parts(every: Sequence[Sequence[_Placed]]) -> Iterator[list[list[_Placed]]]:
    """Plans, those in a row that are alike, in groups of not too many workloads."""
    found: list[list[_Placed]] = []
    count = 0
    for own in every:
        for new, placed in enumerate(own):
            for first in range(0, len(placed.places), MOST):
                part = placed.part(slice(first, first + MOST))
                if found and count + len(part.places) > MOST:
                    yield found
                    found, count = [], 0
                if not found or not new:
                    found.append([])
                    new = True
                found[-1].append(part)
                count += len(part.places)
    if found:
        yield found


def _together(points: Sequence[Point], every: Sequence[Sequence[_Placed]], alone: list[int]) -> Iterator[Table]:
    """The rows of plans of one model, of which those in a row have the same passes; row by row where some of them
    cannot be computed so.
    """
    places = np.concatenate([placed.places for own in every for placed in own])
    simulated = partial(simulate_together, [[placed.grid for placed in own] for own in every])
    left: list[int] = []
    found = [*_at_once(points, places, simulated, left)]
    if len(every) > 1 and len(left) == len(places):
        for own in every:
            yield from _together(points, [own], alone)
        return
    alone += left
    yield from found


@contextmanager
def _without_collections() -> Iterator[None]:
    """Without Python's search for cycles, which a fifth of the time would go into: what is made for some thousand rows
    stays or goes by itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _valid(sizes: Sequence[tuple[Any, ...]]) -> npt.NDArray[np.bool_]:
    """Which sizes a workload takes."""
    if all(map(_is_valid, SIZES, zip(*sizes, strict=True))):
        return np.ones(len(sizes), dtype=np.bool_)
    return np.array([all(_is_valid(name, [size]) for name, size in zip(SIZES, own, strict=True)) for own in sizes])


def _is_valid(name: str, values: Sequence[Any]) -> bool:
    try:
        _ALLOWED[name].validate_python([*values])
    except ValidationError:
        return False
    return True


def _allowed(name: str) -> TypeAdapter[Any]:
    """Values of a field of workloads."""
    own = Workload.model_fields[name]
    kind: Any = Annotated[own.annotation, *own.metadata] if own.metadata else own.annotation
    return TypeAdapter(list[kind], config=ConfigDict(strict=True))


_ALLOWED = {name: _allowed(name) for name in SIZES}


def _at_once(
    points: Sequence[Point],
    places: Any,
    simulated: Callable[[], ResultColumns | JoinedColumns | None],
    alone: list[int],
) -> Iterator[Table]:
    """The rows of workloads that keep all rules."""
    result: ResultColumns | JoinedColumns | None = None
    with suppress(Exception):  # the usual way says what is wrong with each
        result = simulated()
    exact = np.zeros(len(places), dtype=np.bool_) if result is None else result.exact
    alone += places[~exact].tolist()
    if result is None or not exact.any():
        return
    own = places[exact].tolist()
    labels = {name: [points[place].labels[name] for place in own] for name in points[own[0]].labels}
    numbers = measures(result)
    if not exact.all():
        numbers = {name: of[exact] if isinstance(of, np.ndarray) else of for name, of in numbers.items()}
    yield Table(own, {**labels, **numbers, **labels, "error": ""})
