"""The file of a fitted profile: as the shipped ones look, a number with its source in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import tomli_w

from spsim.files import whole_file
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.inheritance import tables_of

HEADER = """\
# Written by spsim calibrate. What it measured names a source that begins with `calibrate-`; all else comes from
# the base profile, with its source, and stands in the block where it stood. `held_out_error_percent` is the
# 90th percentile of the error on shapes that the number was not fitted on; above 20 % the class is flagged.
"""
WIDTH = 116


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile whole or not at all; `InputError` where the file cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_text(profile_text(profile), encoding="utf-8")


def profile_text(profile: HardwareProfile) -> str:
    """The TOML document of a profile; the same profile gives the same text."""
    return HEADER + "\n".join(_table(tables_of(profile), "")) + "\n"


def _table(table: dict[str, Any], path: str) -> Iterator[str]:
    """The lines of a table: its values, then the tables inside it."""
    values = {name: value for name, value in table.items() if not _is_table(value)}
    if values and path:
        yield f"\n[{path}]"
    for name, value in values.items():
        yield _line(name, value)
    for name, value in table.items():
        inner = f"{path}.{_key(name)}" if path else _key(name)
        if isinstance(value, list) and name not in values:
            for item in value:
                yield f"\n[[{inner}]]"
                yield from (_line(*pair) for pair in item.items())
        elif name not in values:
            yield from _table(value, inner)


def _is_table(value: Any) -> bool:
    """Whether a value has a header of its own; a number with its source has not."""
    if isinstance(value, dict):
        return "source" not in value
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _line(name: str, value: Any) -> str:
    if name == "points":
        return f"points = [\n{_points(value)}\n]"
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: pair[0] != "value")
        return f"{_key(name)} = {{ {', '.join(_line(*pair) for pair in pairs)} }}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return tomli_w.dumps({name: value}).rstrip("\n")


def _points(points: Sequence[tuple[float, float]]) -> str:
    """Pairs of message size and bus bandwidth, as many to a line as fit."""
    pairs = " ".join(f"[{size:.0f},{bandwidth!r}]," for size, bandwidth in points)
    return "\n".join(line.replace(",", ", ").replace("], ", "],") for line in _indented(pairs))


def _indented(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")
