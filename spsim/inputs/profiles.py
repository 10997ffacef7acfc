"""Reads hardware profiles: shipped ones by name, any by path.

A profile's `calibrated`, `assumed` and `inherited` blocks have one schema; a coefficient stands in exactly one of them.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spsim.errors import InputError, first_problem
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.inheritance import BLOCKS, is_leaf, leaf_paths, with_base
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


def _load(path: Path, within: tuple[Path, ...] = ()) -> HardwareProfile:
    """The profile of a file; `within` are those of which it is a base."""
    text = read_text(path)
    name = _toml(str(path), text).get("base")
    base = None if name is None else _base(name, path, (*within, path.resolve()))
    return _parsed(str(path), text, base)


def _base(name: Any, path: Path, within: tuple[Path, ...] = ()) -> HardwareProfile:
    """What a profile in a file calls its base: a shipped one, or a file beside it."""
    if not isinstance(name, str):
        raise InputError(f"{path}: base: {name!r} is no name of a profile; write for instance base = 'dgx-h100'")
    if not name.endswith(".toml"):
        try:
            return load_profile(name)
        except InputError as error:
            raise InputError(f"{path}: base: {error}") from None
    file = path.parent / name
    if not file.exists():
        raise InputError(f"{path}: base: {file}: no such file; name a shipped profile, or a file beside this one")
    if file.resolve() in within:
        raise InputError(f"{path}: base: {name} has this profile as its own base; give one that stands by itself")
    return _load(file, within)


@lru_cache(KEPT)
def _toml(path: str, text: str) -> dict[str, Any]:
    return parse_toml(text, path)


@lru_cache(KEPT)
def _parsed(path: str, text: str, base: HardwareProfile | None) -> HardwareProfile:
    return _completed(_toml(path, text), base, path)


def parse_profile(data: dict[str, Any], where: str) -> HardwareProfile:
    """A profile from its TOML tables; `where` names the file in messages."""
    name = data.get("base")
    return _completed(data, None if name is None else _base(name, Path(where)), where)


def _completed(data: dict[str, Any], base: HardwareProfile | None, where: str) -> HardwareProfile:
    if base is None and "scaled" in data:
        raise InputError(
            f"{where}: scaled: there is no base whose curves it could scale; add base = 'dgx-h100' or another"
        )
    tables = dict(data) if base is None else with_base(data, base, where)
    for derived in ("coefficients", "fitted_on"):
        if derived in tables:
            raise InputError(f"{where}: {derived}: unknown key; put coefficients under {', '.join(BLOCKS)}")
    blocks = {kind: tables.pop(kind, {}) for kind in BLOCKS}
    for kind, block in blocks.items():
        if not isinstance(block, dict):
            raise InputError(f"{where}: {kind}: must be a table of coefficients")
    tables["coefficients"] = {}
    for kind, block in blocks.items():
        tables["coefficients"] = _merge(tables["coefficients"], block, where, (blocks, kind))
        if kind != "calibrated":
            tables[kind] = frozenset(leaf_paths(block))
    tables["fitted_on"] = frozenset(_fitted(blocks))
    try:
        return HardwareProfile.model_validate(tables)
    except ValidationError as error:
        raise first_problem(error, where) from None


def _merge(
    merged: dict[str, Any], block: dict[str, Any], where: str, of: tuple[dict[str, Any], str], path: str = ""
) -> dict[str, Any]:
    """The coefficients of some blocks, and those of one more."""
    found = dict(merged)
    for key, value in block.items():
        here = f"{path}{key}"
        if key not in found:
            found[key] = value
        elif is_leaf(value) or is_leaf(found[key]):
            blocks, kind = of
            other = next(name for name in BLOCKS if name != kind and _stands_in(blocks[name], here))
            raise InputError(f"{where}: {here}: stands in both {other} and {kind}; keep one")
        else:
            found[key] = _merge(found[key], value, where, of, f"{here}.")
    return found


def _stands_in(block: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(block, dict) or name not in block:
            return False
        block = block[name]
    return True


def _fitted(value: Any) -> list[str]:
    if isinstance(value, dict):
        return list(value.get("fitted_on", ())) + [case for item in value.values() for case in _fitted(item)]
    if isinstance(value, list):
        return [case for item in value for case in _fitted(item)]
    return []
