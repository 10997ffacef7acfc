"""Reads hardware profiles: shipped ones by name, any by path.

A profile's `calibrated` and `assumed` blocks have one schema; a coefficient stands in exactly one of them.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spsim.errors import InputError, first_problem
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.resources import parse_toml, profiles_directory, read_text
from spsim.inputs.words import named, nearest


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in profiles_directory().glob("*.toml"))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """The profile of a shipped name (or of a part of it that no other has, as `l40s`), or of a TOML file; `InputError`
    lists what there is.
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(f"hardware {name_or_path!r} is neither a name nor a path; give for instance 'dgx-h100'")
    text = str(name_or_path)
    return _load(Path(text)) if text.endswith(".toml") else _named(text)


@cache
def _named(text: str) -> HardwareProfile:
    names = profile_names()
    name = named(text, names, "hardware")
    if name is None:
        raise InputError(f"unknown hardware {text!r}; {nearest(text, names)}, or the path of a .toml profile")
    return _load(profiles_directory() / f"{name}.toml")


KEPT = 64
"""Profiles by what stands in their files: a file is read each time, for it may have been written anew."""


def _load(path: Path) -> HardwareProfile:
    return _parsed(str(path), read_text(path))


@lru_cache(KEPT)
def _parsed(path: str, text: str) -> HardwareProfile:
    return parse_profile(parse_toml(text, path), path)


def parse_profile(data: dict[str, Any], where: str) -> HardwareProfile:
    """A profile from its TOML tables; `where` names the file in messages."""
    tables = dict(data)
    for derived in ("coefficients", "fitted_on"):
        if derived in tables:
            raise InputError(f"{where}: {derived}: unknown key; put coefficients under calibrated or assumed")
    blocks = {kind: tables.pop(kind, {}) for kind in ("calibrated", "assumed")}
    for kind, block in blocks.items():
        if not isinstance(block, dict):
            raise InputError(f"{where}: {kind}: must be a table of coefficients")
    tables["coefficients"] = _merge(blocks["calibrated"], blocks["assumed"], where)
    tables["assumed"] = frozenset(_leaf_paths(blocks["assumed"]))
    tables["fitted_on"] = frozenset(_fitted(blocks))
    try:
        return HardwareProfile.model_validate(tables)
    except ValidationError as error:
        raise first_problem(error, where) from None


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, dict) or "source" in value or "value" in value


def _merge(calibrated: dict[str, Any], assumed: dict[str, Any], where: str, path: str = "") -> dict[str, Any]:
    merged = dict(calibrated)
    for key, value in assumed.items():
        here = f"{path}{key}"
        if key not in merged:
            merged[key] = value
        elif _is_leaf(value) or _is_leaf(merged[key]):
            raise InputError(f"{where}: {here}: stands in both calibrated and assumed; keep one")
        else:
            merged[key] = _merge(merged[key], value, where, f"{here}.")
    return merged


def _leaf_paths(block: dict[str, Any], path: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in block.items():
        paths += [f"{path}{key}"] if _is_leaf(value) else _leaf_paths(value, f"{path}{key}.")
    return paths


def _fitted(value: Any) -> list[str]:
    if isinstance(value, dict):
        return list(value.get("fitted_on", ())) + [case for item in value.values() for case in _fitted(item)]
    if isinstance(value, list):
        return [case for item in value for case in _fitted(item)]
    return []
