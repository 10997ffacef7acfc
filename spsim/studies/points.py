"""The points of a sweep, and what tells them apart: their inputs, and the program that computes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
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


def points_of(grid: Iterable[Point | Settings]) -> list[Point]:
    """The points of a grid, in which settings stand for a point without labels; `InputError` names what is neither."""
    if isinstance(grid, str | bytes | Mapping | Point) or not isinstance(grid, Iterable):
        raise InputError(f"points: {_short(grid)}: is no list of points; give a list of spsim.Point or of settings")
    return [_checked(item, f"points[{number}]") for number, item in enumerate(grid)]


def _checked(item: Any, where: str) -> Point:
    point = Point(item) if isinstance(item, Mapping) else item
    if not (isinstance(point, Point) and isinstance(point.settings, Mapping) and isinstance(point.labels, Mapping)):
        raise InputError(f"{where}: {_short(item)}: is no point; give spsim.Point(settings, labels), both by name")
    visible = True
    for name, value in point.labels.items():
        if name in OWN_COLUMNS:
            raise InputError(f"{where}: label {name!r}: every row has this column of its own; give it another name")
        if not isinstance(name, str) or not isinstance(value, str | int | float | None):
            raise InputError(f"{where}: label {_short(name)} = {_short(value)}: use text, numbers, true and false")
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
        """By identity of the object, which is kept so that no other takes its place."""
        self._contents = {name: _Contents(load) for name, load in _LOADERS.items()}
        self._encode = json.JSONEncoder(sort_keys=True, default=self._plain).encode
        self._program = hashlib.sha256(program_fingerprint().encode())

    def entries(self, points: Iterable[Point]) -> Iterator[tuple[str, str]]:
        """(key, JSON of labels and settings) of each point.

        The key stands for its resolved inputs and for the version of the program that computes it, with which it
        begins.
        """
        program = program_fingerprint()[:PROGRAM]
        for point in points:
            try:
                text = self._encode({"labels": dict(point.labels), "settings": dict(self._resolved(point.settings))})
            except (TypeError, ValueError) as error:
                raise InputError(f"point {dict(point.labels)}: {error}; use text, numbers, true and false") from None
            digest = self._program.copy()
            digest.update(text.encode())
            yield f"{program}-{digest.hexdigest()[:16]}", text

    def resolved(self, point: Point) -> Point:
        """The point with what stands in files now, so that what is computed is what its key says."""
        settings = self._resolved(point.settings)
        return point if settings is point.settings else Point(settings, point.labels)

    def _resolved(self, settings: Settings) -> Settings:
        """The settings, with what stands in a file instead of its name."""
        found = {}
        for name, contents in self._contents.items():
            value = settings.get(name)
            table = value if isinstance(value, Mapping) else {}
            file = table.get(PRESET, value)
            if isinstance(file, str | Path) and not isinstance(contents[str(file)], str):
                found[name] = {**table, PRESET: contents[str(file)]} if table else contents[str(file)]
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


PROGRAM = 8
"""Digits of the program in a key."""


def of_this_program(keys: Iterable[str]) -> list[str]:
    """Those keys whose rows this program has computed, whatever their inputs."""
    begin = f"{program_fingerprint()[:PROGRAM]}-"
    return [key for key in keys if key.startswith(begin)]


@cache
def program_fingerprint() -> str:
    """Hash of the package's sources and profiles: rows of another program are not resumed from."""
    digest = hashlib.sha256()
    for path in _program_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _program_files() -> list[Path]:
    return sorted([*Path(__file__).parent.parent.glob("**/*.py"), *profiles_directory().glob("*.toml")])
