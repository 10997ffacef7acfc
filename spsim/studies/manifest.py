"""The manifest: what a directory of results was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

from spsim.files import whole_text
from spsim.studies.experiment import Experiment
from spsim.studies.points import Point, Register, program_fingerprint


class Manifest:
    """Names the points of an experiment and the program that computes them, a point a line."""

    def __init__(self, experiment: Experiment, points: Sequence[Point]) -> None:
        register = Register()
        self.keys: list[str] = []
        """Of the points, in their order."""
        self._points: list[str] = []
        self.points = [register.resolved(point) for point in points]
        """With what stood in files when the keys were made."""
        for key, text in register.entries(self.points):
            self.keys.append(key)
            self._points.append(f'{{"key": "{key}", {text[1:]}')
        self._inputs = [f'"{digest}": {text}' for digest, text in register.inputs.items()]
        self._head = {
            "experiment": experiment.name,
            "title": experiment.title,
            "spsim": package_version(),
            "program": program_fingerprint(),
            "packages": {package: version(package) for package in ("numpy", "pandas", "simpy", "pydantic")},
        }

    def describes(self, path: Path) -> bool:
        """Whether it is what stands in a file."""
        if not path.is_file():
            return False
        with path.open(encoding="utf-8", errors="replace") as file:
            return all(ours == theirs for ours, theirs in zip_longest(self._lines(), file))

    def write(self, path: Path) -> None:
        """Write the JSON document."""
        with whole_text(path) as file:
            file.writelines(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "{\n"
        yield f" {json.dumps(self._head)[1:-1]},\n"
        yield ' "points": [\n'
        yield from _listed(self._points)
        yield " ],\n"
        yield ' "inputs": {\n'
        yield from _listed(self._inputs)
        yield " }\n"
        yield "}\n"


def _listed(items: Sequence[str]) -> Iterator[str]:
    """An item a line, with commas between them."""
    yield from (f"  {item},\n" for item in items[:-1])
    yield from (f"  {item}\n" for item in items[-1:])


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("spsim")
    except PackageNotFoundError:
        return "unknown"
