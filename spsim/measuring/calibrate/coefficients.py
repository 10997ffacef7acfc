"""Coefficients of a profile by their dotted path, and the profile as the document that is read back.

Replaced values are not validated one by one, since a fit tries many; `document` is parsed whole at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spsim.inputs.hardware import HardwareProfile, Leaf, leaves
from spsim.inputs.quantities import Provenance, Table


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


def without_sends(profile: HardwareProfile, level: str) -> HardwareProfile:
    """The profile without the law of send-receive at a level, in whose place comes a measured curve."""
    sends = {name: table for name, table in profile.coefficients.sends.items() if name != level}
    return profile.model_copy(update={"coefficients": profile.coefficients.model_copy(update={"sends": sends})})


def with_values(profile: HardwareProfile, values: Mapping[str, float]) -> HardwareProfile:
    """The profile with other numbers at paths that exist, unchecked."""
    found = ((path, leaf_at(profile, path), value) for path, value in values.items())
    return with_leaves(profile, {path: leaf.model_copy(update={"value": value}) for path, leaf, value in found})


def document(profile: HardwareProfile) -> dict[str, Any]:
    """The tables of a profile's file: `profiles.parse_profile` makes the same profile of them."""
    tables = profile.model_dump(mode="json", exclude_defaults=True, exclude={"coefficients", "assumed", "fitted_on"})
    for path, leaf in leaves(profile.coefficients):
        here = tables.setdefault("assumed" if path in profile.assumed else "calibrated", {})
        *outer, last = path.split(".")
        for name in outer:
            here = here.setdefault(name, {})
        here[last] = [_plain(curve) for curve in leaf] if isinstance(leaf, tuple) else _plain(leaf)
    return tables


def _plain(leaf: Provenance) -> dict[str, Any]:
    plain = leaf.model_dump(mode="json", exclude_defaults=True)
    return {name: plain.pop(name) for name in ("algorithm", "source") if name in plain} | plain
