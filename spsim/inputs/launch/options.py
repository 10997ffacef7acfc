"""The options that a launch file gives, by the library's names: what is taken is read, and what is left is listed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from spsim.errors import InputError
from spsim.inputs.plan_words import PLAN
from spsim.inputs.words import MODEL, WORKLOAD

T = TypeVar("T")
MOST = 2**40
"""The largest number that any option takes."""
MAX_SHOWN = 80
"""Characters of a value in a message."""
SECTIONS = {"plan": PLAN, "workload": WORKLOAD, "model": MODEL}


def settings_named(names: Iterable[str]) -> dict[str, str]:
    """Names of a library that mean one setting here with the same values -> that setting, such as `plan.tp`."""
    own = {
        other: f"{section}.{name}"
        for section, table in SECTIONS.items()
        for name, others in table.items()
        for other in (name, *others)
    }
    return {name: own[name.rpartition(".")[2]] for name in names}


class Item(NamedTuple):
    """One option as a file gives it."""

    value: Any
    """True where the name stands alone."""
    shown: str
    """As the file writes it, such as `--tensor-model-parallel-size 8`."""
    where: str
    """Its file, and line where that has lines."""
    unknown: str = ""
    """What of it the file does not say, such as `$TP`."""


@dataclass
class Options:
    """The options of one file."""

    where: str
    items: dict[str, Item]
    aside: list[str] = field(default_factory=list)
    """Lines on what is read otherwise than it is given, or not at all."""
    taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.items

    def take(self, name: str, otherwise: Any = None) -> Any:
        """The value of an option, which is read by that; `InputError` where the file does not say it."""
        item = self.items.get(name)
        if item is None:
            return otherwise
        self.taken.add(name)
        if item.unknown:
            raise InputError(
                f"{item.where}: {item.shown}: {item.unknown} is not known without running the script; "
                "write the value in its place"
            )
        return item.value

    def number(self, name: str, otherwise: T, least: int = 1) -> int | T:
        """The value of an option that is a whole number."""
        value = self.take(name)
        if name not in self.items:
            return otherwise
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole or isinstance(value, bool) or not least <= value <= MOST:
            raise self.wrong(name, f"a whole number from {least} to 2^40" if whole else "a whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        """Whether an option is on."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false, or nothing behind its name")
        return value

    def choice(self, name: str, choices: Mapping[Any, T], otherwise: T) -> T:
        """What one of some values means."""
        value = self.take(name)
        if name not in self.items:
            return otherwise
        if isinstance(value, list | dict) or value not in choices:
            raise self.wrong(name, f"one of {', '.join(map(str, choices))}")
        return choices[value]

    def wrong(self, name: str, expected: str) -> InputError:
        """The error of a value that is none."""
        item = self.items[name]
        return InputError(f"{item.where}: {item.shown}: expected {expected}")

    def refuse(self, name: str, reason: str) -> InputError:
        """The error of an option that makes the file something that is not simulated."""
        item = self.items[name]
        return InputError(f"{item.where}: {item.shown}: {reason}")

    def say(self, name: str, text: str) -> None:
        """An option is read otherwise than it is given."""
        item = self.items[name]
        self.aside.append(f"{item.where}: {item.shown}: {text}")

    def leave(self, name: str, harmless: Iterable[Any]) -> None:
        """An option that is not simulated is not listed where it asks for nothing."""
        item = self.items.get(name)
        if item is not None and any(
            item.value == value and isinstance(item.value, bool) is isinstance(value, bool) for value in harmless
        ):
            self.taken.add(name)

    def ignore(self, name: str) -> None:
        """An option that the library itself does not look at here."""
        self.taken.add(name)

    def left(self) -> Iterator[tuple[str, Item]]:
        """What has not been taken."""
        return ((name, item) for name, item in self.items.items() if name not in self.taken)


def flat_items(table: Mapping[str, Any], where: str) -> dict[str, Item]:
    """The keys of nested tables, joined by dots."""
    found: dict[str, Item] = {}
    for name, value in _leaves(table, ""):
        text = json.dumps(value, default=str)
        found[name] = Item(value, f"{name} = {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}", where)
    return found


def _leaves(table: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def beginning_with(*words: str) -> re.Pattern[str]:
    """Names that begin with one of some words, or are one."""
    return re.compile(rf"(?:{'|'.join(words)})(?![a-z0-9])")
