"""The points of a sweep, and what tells them apart: their inputs, and the program that computes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from spsim.errors import InputError, printable
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.perturbations import Perturbations
from spsim.inputs.presets import PRESET, load_model
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import profiles_directory
from spsim.results.figures import FIGURES

Labels = Mapping[str, str | int | float | bool]
Settings = Mapping[str, Any]

_LOADERS: dict[str, Callable[[str | Path], BaseModel]] = {
    "hardware": load_profile,
    "model": load_model,
    "perturbations": Perturbations.of,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration: the settings of a `Scenario`, and columns to add to its row."""

    settings: Settings
    labels: Labels = field(default_factory=dict)


OWN_COLUMNS = frozenset({"key", "error", *(figure.column for figure in FIGURES if figure.column)})
"""Columns of a row that no label may take."""
SHOWN = 60
"""Characters of a value in a message."""
REMEMBERED = 1024
"""Profiles and models that are known by identity at a time: points of a generator may each bring their own."""


def points_of(grid: Iterable[Point | Settings]) -> list[Point]:
    """The points of a grid, in which settings stand for a point without labels; `InputError` names what is neither."""
    return list(checked(grid))


def checked(grid: Iterable[Point | Settings]) -> Iterator[Point]:
    """The same one by one, so that those of a generator are never all there."""
    if isinstance(grid, str | bytes | Mapping | Point) or not isinstance(grid, Iterable):
        raise InputError(f"points: {_short(grid)}: is no list of points; give a list of spsim.Point or of settings")
    return map(_checked, grid, count())


class GivenAnew:
    """Points that a function gives anew whenever they are gone through, so that none of them has to be kept."""

    def __init__(self, give: Callable[[], Iterable[Point | Settings]], every: int = 1) -> None:
        self._give, self._every = give, every

    def __iter__(self) -> Iterator[Point]:
        return islice(checked(self._give()), 0, None, self._every)

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        """How many there are, which checks them all."""
        return self._count

    def thinned(self, every: int) -> GivenAnew:
        """The first of so many, and so on."""
        return GivenAnew(self._give, every * self._every)


def _checked(item: Any, number: int) -> Point:
    point = Point(item) if isinstance(item, Mapping) else item
    if not (isinstance(point, Point) and isinstance(point.settings, Mapping) and isinstance(point.labels, Mapping)):
        what = f"points[{number}]: {_short(item)}"
        raise InputError(f"{what}: is no point; give spsim.Point(settings, labels), both by name")
    visible = True
    for name, value in point.labels.items():
        if name in OWN_COLUMNS:
            rule = "every row has this column of its own; give it another name"
            raise InputError(f"points[{number}]: label {name!r}: {rule}")
        if not isinstance(name, str) or not isinstance(value, str | int | float | None):
            what = f"points[{number}]: label {_short(name)} = {_short(value)}"
            raise InputError(f"{what}: use text, numbers, true and false")
        visible = visible and name.isprintable() and (not isinstance(value, str) or value.isprintable())
    if visible:
        return point
    labels = {printable(name): printable(v) if isinstance(v, str) else v for name, v in point.labels.items()}
    return Point(point.settings, labels)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Register:
    """Names points by what they are made of.

    A profile or a model is described once, however many points share the object or the file: it may be large.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, str] = {}
        """Digest -> JSON of a profile or model."""
        self._references: dict[int, tuple[BaseModel, dict[str, str]]] = {}
        """By identity of the object, which is kept so that no other takes its place; of so many as `REMEMBERED`."""
        self._contents = {name: _Contents(load) for name, load in _LOADERS.items()}
        self._encode = json.JSONEncoder(sort_keys=True, default=self._plain).encode
        self._begin = key_begin()
        self._program = hashlib.sha256(program_fingerprint().encode())

    def entries(self, points: Iterable[Point]) -> Iterator[tuple[str, str]]:
        """`entry` of each point."""
        return map(self.entry, map(self.resolved, points))

    def entry(self, point: Point) -> tuple[str, str]:
        """(key, JSON of labels and settings) of a resolved point.

        The key stands for its inputs and for the version of the program that computes it, with which it begins.
        """
        try:
            text = self._encode({"labels": point.labels, "settings": point.settings})
        except (TypeError, ValueError) as error:
            raise InputError(f"point {dict(point.labels)}: {error}; use text, numbers, true and false") from None
        digest = self._program.copy()
        digest.update(text.encode())
        return f"{self._begin}{digest.hexdigest()[:16]}", text

    def resolved(self, point: Point) -> Point:
        """The point with what stands in files now, so that what is computed is what its key says."""
        settings = self._resolved(point.settings)
        return point if settings is point.settings else Point(settings, point.labels)

    def _resolved(self, settings: Settings) -> Settings:
        """The settings, with what stands in a file instead of its name."""
        found = {}
        for name, contents in self._contents.items():
            value = settings.get(name)
            if type(value) is str or isinstance(value, Path):
                if not isinstance(own := contents[str(value)], str):
                    found[name] = own
            elif isinstance(value, Mapping):
                file = value.get(PRESET)
                if isinstance(file, str | Path) and not isinstance(own := contents[str(file)], str):
                    found[name] = {**value, PRESET: own}
        return {**settings, **found} if found else settings

    def _plain(self, value: Any) -> Any:
        """What stands for a value that JSON does not know."""
        if isinstance(value, HardwareProfile | Model):
            return self._reference(value)
        if isinstance(value, BaseModel):
            return value.model_dump(exclude_defaults=True)
        if isinstance(value, set | frozenset):
            return sorted(value)
        return dict(value) if isinstance(value, Mapping) else str(value)

    def _reference(self, value: BaseModel) -> dict[str, str]:
        if id(value) not in self._references:
            text = self._encode(value.model_dump(exclude_defaults=True))
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            self.inputs[digest] = text
            if len(self._references) == REMEMBERED:
                self._references.clear()
            self._references[id(value)] = (value, {"input": digest})
        return self._references[id(value)][1]


class _Contents(dict[str, Any]):
    """The object that stands in a file; the name of none stays, its meaning belongs to the program."""

    def __init__(self, load: Callable[[str | Path], BaseModel]) -> None:
        super().__init__()
        self._load = load

    def __missing__(self, name: str) -> Any:
        self[name] = name
        with suppress(OSError, ValueError):  # the row will say what is wrong with it
            if Path(name).exists():
                self[name] = self._load(name)
        return self[name]


def key_begin() -> str:
    """How the keys of all rows of this program begin."""
    return f"{program_fingerprint()[:8]}-"


@cache
def program_fingerprint() -> str:
    """Hash of the package's sources and profiles: rows of another program are not resumed from."""
    digest = hashlib.sha256()
    for path in _program_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _program_files() -> list[Path]:
    return sorted([*Path(__file__).parent.parent.glob("**/*.py"), *profiles_directory().glob("*.toml")])
