"""The cases of `cases.toml`: a small model, how it is cut, and what the library is asked for."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "cases.toml"


@dataclass(frozen=True)
class Case:
    """One library, one model, one number of ranks."""

    library: str
    name: str
    ranks: int
    part: str
    """What runs: a `layer`, its `attention` alone, or the whole `model` with embedding, head and loss."""
    plan: str
    """As spsim writes it."""
    model: dict[str, Any]
    workload: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """What the library is asked for beyond the plan, in its own words."""

    uneven: bool = False
    """Ranks have different shares, and the first of them the largest."""

    @property
    def degrees(self) -> dict[str, Any]:
        """The plan as options: numbers, words, and True for a flag."""
        found = (item.partition("=") for item in self.plan.split(","))
        return {key: (int(value) if value.isdigit() else value) if equals else True for key, equals, value in found}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequence, batch and width of the whole input."""
        return self.workload["seq_len"], self.workload["micro_batch"], self.model["hidden"]


def read_cases(path: Path = FILE) -> Iterator[Case]:
    """All of them, once for each number of ranks."""
    given = tomllib.loads(path.read_text())
    for entry in given["case"]:
        for ranks in entry["ranks"]:
            yield Case(
                library=entry["library"],
                name=entry["name"],
                ranks=ranks,
                part=entry.get("part", "layer"),
                plan=entry["plan"].format(ranks=ranks),
                model={**given["models"][entry["model"]], **entry.get("with", {})},
                workload=given["workload"],
                options=entry.get("options", {}),
                uneven=entry.get("uneven", False),
            )
