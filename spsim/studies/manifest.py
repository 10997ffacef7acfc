"""The manifest: what a directory of results was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from spsim.files import Scratch, whole_file
from spsim.studies.experiment import Experiment
from spsim.studies.points import Point, Register, program_fingerprint

TOGETHER = 1024
"""Lines that are handed to the system at a time."""


class Manifest:
    """Names the points of an experiment and the program that computes them, a point a line.

    Lines are written to disk as the points are gone through, since they are as many.
    """

    def __init__(self, experiment: Experiment, directory: Path) -> None:
        self._register = Register()
        self._scratch = Scratch(directory)
        head = {
            "experiment": experiment.name,
            "title": experiment.title,
            "spsim": package_version(),
            "program": program_fingerprint(),
            "packages": {package: version(package) for package in ("numpy", "pandas", "simpy", "pydantic")},
        }
        self._head = f'{{\n {json.dumps(head)[1:-1]},\n "points": [\n'

    def keyed(self, points: Iterable[Point]) -> Iterator[tuple[str, Point]]:
        """(key, point) of each, with what stood in files when the key was made."""
        lines: list[str] = []
        self._scratch.append(self._head.encode())
        for point in self.resolved(points):
            if len(lines) == TOGETHER:
                self._scratch.append("".join(f"{line},\n" for line in lines).encode())
                lines.clear()
            key, text = self._register.entry(point)
            lines.append(f'  {{"key": "{key}", {text[1:]}')
            yield key, point
        inputs = [f'  "{digest}": {text}' for digest, text in self._register.inputs.items()]
        rest = [",\n".join(lines), ' ],\n "inputs": {', ",\n".join(inputs), " }\n}\n"]
        self._scratch.append("\n".join(rest).encode())

    def resolved(self, points: Iterable[Point]) -> Iterator[Point]:
        """Points with what stands in files, as it was when the keys were made."""
        return map(self._register.resolved, points)

    def describes(self, path: Path) -> bool:
        """Whether it is what stands in a file."""
        if not path.is_file() or path.stat().st_size != self._scratch.size:
            return False
        with path.open("rb") as file:
            return all(ours == file.read(len(ours)) for ours in self._scratch.blocks())

    def write(self, path: Path) -> None:
        """Write the JSON document."""
        with whole_file(path) as temporary, temporary.open("wb") as file:
            file.writelines(self._scratch.blocks())


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("spsim")
    except PackageNotFoundError:
        return "unknown"
