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

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model, load_model
from spsim.inputs.profiles import load_profile
from spsim.inputs.resources import profiles_directory

Labels = Mapping[str, str | int | float | bool]
Settings = Mapping[str, Any]

_LOADERS: dict[str, Callable[[str | Path], BaseModel]] = {"hardware": load_profile, "model": load_model}


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration: the settings of a `Scenario`, and columns to add to its row."""

    settings: Settings
    labels: Labels = field(default_factory=dict)


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

        The key stands for its resolved inputs and for the version of the program that computes it.
        """
        for point in points:
            try:
                text = self._encode({"labels": dict(point.labels), "settings": self._resolved(point.settings)})
            except (TypeError, ValueError) as error:
                raise InputError(f"point {dict(point.labels)}: {error}; use text, numbers, true and false") from None
            digest = self._program.copy()
            digest.update(text.encode())
            yield digest.hexdigest()[:16], text

    def _resolved(self, settings: Settings) -> dict[str, Any]:
        """The settings, with what stands in a file instead of its name."""
        resolved = dict(settings)
        for name, contents in self._contents.items():
            value = settings.get(name)
            if isinstance(value, str | Path):
                resolved[name] = contents[str(value)]
        return resolved

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


@cache
def program_fingerprint() -> str:
    """Hash of the package's sources and profiles: rows of another program are not resumed from."""
    digest = hashlib.sha256()
    for path in _program_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _program_files() -> list[Path]:
    return sorted([*Path(__file__).parent.parent.glob("**/*.py"), *profiles_directory().glob("*.toml")])
