"""From a case file, options and changes to the settings of a scenario; what is said later takes the place of what was
said before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spsim.errors import InputError
from spsim.inputs.configuration import read_value
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan, parse_options
from spsim.inputs.presets import PRESET
from spsim.inputs.resources import read_toml
from spsim.inputs.scenario import Scenario, scenario_from
from spsim.inputs.words import unknown_key
from spsim.inputs.workload import Workload

if TYPE_CHECKING:
    from spsim.inputs.launch.reading import Launch

SECTIONS: Mapping[str, type[Model | Plan | Workload]] = {"model": Model, "plan": Plan, "workload": Workload}
REQUIRED = {"hardware": "--hardware", "model": "--model", "workload": "--seq-len"}
"""What no scenario is without -> the option that gives it."""


@dataclass(frozen=True)
class Given:
    """What a command line says of a scenario."""

    command: str
    case: Path | None
    options: Mapping[str, Any]
    """Setting, such as `workload.seq_len` -> its value, or None if the option is not there."""
    plans: Sequence[str]
    changes: Sequence[str]
    """Such as `model.attention=flash`."""
    launch_file: Path | None = None
    """What a training library is launched with, instead of a case file."""

    @classmethod
    def of(
        cls, command: str, case: Path | None, plans: Sequence[str] | None, changes: Sequence[str] | None,
        launch_file: Path | None = None, **options: Any,
    ) -> Given:  # fmt: skip
        """From options by their names, those of a workload among them."""
        paths = {f"workload.{name}" if name in Workload.model_fields else name: options[name] for name in options}
        return cls(command, case, paths, plans or (), changes or (), launch_file)

    @property
    def where(self) -> str:
        """The origin of the settings, for messages."""
        file = self.launch_file if self.case is None else self.case
        return self.command if file is None else str(file)

    @cached_property
    def launch(self) -> Launch | None:
        """What the launch file says."""
        if self.launch_file is None:
            return None
        if self.case is not None:
            raise InputError(
                f"{self.command}: {self.case} and --from {self.launch_file} both say the scenario; give one"
            )
        from spsim.inputs.launch.reading import read_launch

        return read_launch(self.launch_file)

    def settings(self, required: Sequence[str] = tuple(REQUIRED)) -> dict[str, Any]:
        """All but the plan; `InputError` names the first that is missing."""
        settings = {key: value for key, value in self._file.items() if key != "plan"}
        for path, value in self.options.items():
            if value is not None:
                _assign(settings, path, value)
        for path, value in self._changes(of_plan=False):
            _assign(settings, path, value)
        if self.launch is not None:
            plans = self.all_plans()
            self.launch.check({**settings, "plan": plans[-1] if plans else None})
        for name in required:
            if name not in settings:
                raise self._missing(name, required)
        return settings

    def all_plans(self) -> list[Any]:
        """That of the case file, then those of the command line, with the changes to a plan."""
        own = [self._file["plan"]] if "plan" in self._file else []
        return [self._changed(plan) for plan in (*own, *self.plans)]

    def plan(self) -> Any:
        """The one of the command line, else that of the case file, else one GPU."""
        if len(self.plans) > 1:
            raise InputError(
                f"{self.command}: --plan is given {len(self.plans)} times; give one, or use compare for several"
            )
        plans = self.all_plans()
        return plans[-1] if plans else self._changed("")

    def scenario(self) -> Scenario:
        """With the one plan."""
        settings = {**self.settings(), "plan": self.plan()}
        return scenario_from(settings, self.where) if self.launch is None else self.launch.together(settings)

    @cached_property
    def _file(self) -> dict[str, Any]:
        if self.launch is not None:
            return {**self.launch.settings}
        if self.case == Path():
            raise InputError(f"{self.command}: the name of the case file is empty; give its path")
        file = {} if self.case is None else read_toml(self.case)
        for name in file:
            if name not in Scenario.model_fields:
                raise unknown_key(self.where, name, Scenario.model_fields)
        for section in ("hardware", "model"):
            if isinstance(file.get(section), str):
                file[section] = _found(file[section], self.case)
        return file

    def _missing(self, name: str, required: Sequence[str]) -> InputError:
        if self.launch is not None:
            return InputError(f"{self.where}: says no {name}; give {REQUIRED[name]}")
        if self.case is not None:
            return InputError(f"{self.where}: {name} is missing; give it there, or {REQUIRED[name]}")
        options = " and ".join(REQUIRED[name] for name in required)
        return InputError(f"{self.command}: {REQUIRED[name]} is missing; give a case file, or at least {options}")

    def _changed(self, plan: Any) -> Any:
        settings = {"plan": plan}
        for path, value in self._changes(of_plan=True):
            _assign(settings, path, value)
        return settings["plan"]

    def _changes(self, *, of_plan: bool) -> list[tuple[str, Any]]:
        """(setting, value) of those that change a plan, or of the others."""
        parsed = [_change(text) for text in self.changes]
        return [(path, value) for path, value in parsed if (path.partition(".")[0] == "plan") == of_plan]


def _found(name: str, case: Path | None) -> str:
    """A name, or a path from the working directory; else one from the directory of the case file."""
    is_path = "/" in name or name.endswith((".toml", ".json"))
    with suppress(OSError, ValueError):
        if case is not None and is_path and not Path(name).exists() and (case.parent / name).exists():
            return str(case.parent / name)
    return name


def _change(text: str) -> tuple[str, Any]:
    path, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not path or not value:
        raise InputError(f"--set {text!r} is not setting=value; write for instance --set model.attention=flash")
    section, _, key = path.partition(".")
    if section not in Scenario.model_fields:
        homes = [f"{name}.{path}={value}" for name, kind in SECTIONS.items() if path in kind.model_fields]
        example = homes[0] if homes else "model.attention=flash"
        raise InputError(f"--set {text!r}: {path} is no setting; write for instance {example}")
    if key and section not in SECTIONS:
        raise InputError(
            f"--set {text!r}: each number of a profile has its source; change a copy of the file, and give its path"
        )
    return path, value if section == "plan" and not key else read_value(value)


def _assign(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set one value; a model or plan that is a name becomes a table."""
    section, _, key = path.partition(".")
    if not key:
        settings[section] = value
        return
    own_words = SECTIONS[section].own_words
    table = _table(section, settings.get(section))
    preset = {PRESET: table[PRESET]} if section == "model" and PRESET in table else {}
    own = own_words({name: known for name, known in table.items() if name not in preset})
    settings[section] = {**preset, **own, **({key: value} if key == PRESET else own_words({key: value}))}


def _table(section: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {PRESET: value} if section == "model" else parse_options(value)
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise InputError(f"{section}: {value!r} is no table; write [{section}]")
