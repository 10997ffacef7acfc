"""The points of a sweep, and what tells them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

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
        text = json.dumps([plain(self.settings), dict(self.labels), program_fingerprint()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
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
