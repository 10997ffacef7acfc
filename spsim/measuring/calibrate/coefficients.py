"""Coefficients of a profile by their dotted path.

Replaced values are not validated one by one, since a fit tries many; the profile is read back whole at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spsim.inputs.hardware import HardwareProfile, Leaf, leaves
from spsim.inputs.quantities import Table
from spsim.program.placement import Collective


def leaf_at(profile: HardwareProfile, path: str) -> Any:
    """What stands at a dotted path of the coefficients; None where nothing does."""
    here: Any = profile.coefficients
    for name in path.split("."):
        here = here.get(name) if isinstance(here, dict) else getattr(here, name)
        if here is None:
            return None
    return here


def with_leaves(profile: HardwareProfile, changes: Mapping[str, Leaf | Table]) -> HardwareProfile:
    """The profile with other coefficients at some paths, unchecked."""
    changed = _with_leaves(profile.coefficients, {tuple(path.split(".")): leaf for path, leaf in changes.items()})
    return profile.model_copy(update={"coefficients": changed})


def _with_leaves(here: Any, changes: Mapping[tuple[str, ...], Leaf | Table]) -> Any:
    """A table with changes at paths from it; each table on the way is copied once."""
    if () in changes:
        return changes[()]
    inner: dict[str, dict[tuple[str, ...], Leaf | Table]] = {}
    for (name, *rest), leaf in changes.items():
        inner.setdefault(name, {})[tuple(rest)] = leaf
    if isinstance(here, dict):
        return {**here, **{name: _with_leaves(here.get(name, {}), own) for name, own in inner.items()}}
    return here.model_copy(update={name: _with_leaves(getattr(here, name), own) for name, own in inner.items()})


UNKNOWN = "unknown"
"""Source of a coefficient that a search begins with and no row has measured yet."""


def without_unknown(profile: HardwareProfile, base: HardwareProfile) -> HardwareProfile:
    """The profile with the number of the base, or none, wherever no row measured one."""
    unknown = [path for path, leaf in leaves(profile.coefficients) if getattr(leaf, "source", "") == UNKNOWN]
    return with_leaves(profile, {path: leaf_at(base, path) for path in unknown})


def without_laws(profile: HardwareProfile, level: str, collective: Collective) -> HardwareProfile:
    """The profile without the law of a collective at a level, in whose place comes a measured curve."""
    law = "sends" if collective == "send_receive" else "between_nodes"
    kept = {name: table for name, table in getattr(profile.coefficients, law).items() if name != level}
    return profile.model_copy(update={"coefficients": profile.coefficients.model_copy(update={law: kept})})


class Trial:
    """A profile whose numbers at some paths are set again and again; no other profile shares those coefficients."""

    def __init__(self, profile: HardwareProfile, paths: Sequence[str]) -> None:
        self._leaves = {path: leaf_at(profile, path).model_copy() for path in paths}
        self.profile = with_leaves(profile, self._leaves)

    def at(self, values: Mapping[str, float]) -> HardwareProfile:
        """The profile with these numbers, unchecked, until the next ones."""
        for path, value in values.items():
            self._leaves[path].__dict__["value"] = value
        return self.profile


def with_values(profile: HardwareProfile, values: Mapping[str, float]) -> HardwareProfile:
    """The profile with other numbers at paths that exist, unchecked."""
    found = ((path, leaf_at(profile, path), value) for path, value in values.items())
    return with_leaves(profile, {path: leaf.model_copy(update={"value": value}) for path, leaf, value in found})
