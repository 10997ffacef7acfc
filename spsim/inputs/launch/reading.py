"""Reads what a training library is launched with into the settings of a scenario: `read_launch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spsim.errors import InputError
from spsim.inputs.launch import deepspeed, megatron, torchtitan
from spsim.inputs.libraries import LibraryName
from spsim.inputs.presets import PRESET
from spsim.inputs.resources import read_text
from spsim.inputs.scenario import Scenario, scenario_from

_KINDS = {".toml": torchtitan, ".json": deepspeed}
"""Ending of a file -> library; all else is a script that launches Megatron-LM."""
_NO_LAUNCH = (".yaml", ".yml", ".py", ".ini", ".cfg")


@dataclass(frozen=True)
class Launch:
    """What a launch file says of a scenario, and what of it is not simulated."""

    path: str
    library: LibraryName
    settings: Mapping[str, Any]
    """`model`, `plan` and `workload` as `Scenario` takes them, as far as the file says them; no hardware."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Setting that the file leaves open, such as `plan.dp` -> the line that asks for it."""
    notes: tuple[str, ...] = ()
    """What is read otherwise than it is given, by file and line."""
    not_read: tuple[str, ...] = ()
    """Options that have no counterpart here, with their values."""
    no_matter: tuple[str, ...] = ()
    """Options that change neither time nor memory: paths, logs, seeds, rates."""
    nodes: int | None = None
    """Machines of the launcher; `scenario` spreads the plan over them if all their GPUs are its own."""

    @property
    def lines(self) -> tuple[str, ...]:
        """All that a reader should know, a line each."""
        idle = [f"{self.path}: of no matter to time or memory: {', '.join(self.no_matter)}"] if self.no_matter else []
        return (*self.notes, *(f"{option}: not read, has no counterpart here" for option in self.not_read), *idle)

    def check(self, settings: Mapping[str, Any]) -> None:
        """That settings have what the file leaves open; `InputError` asks for the first that they do not."""
        for path, question in self.missing.items():
            section, _, key = path.partition(".")
            value = settings.get(section)
            if value is None or (isinstance(value, Mapping) and key and key not in value and PRESET not in value):
                raise InputError(question)

    def together(self, settings: Mapping[str, Any]) -> Scenario:
        """The scenario of all settings, on the launcher's machines where the plan is still that of the file."""
        self.check(settings)
        scenario = scenario_from(settings, self.path)
        own = settings.get("nodes") is None and self.nodes is not None and self._has_size(scenario)
        if own and self.nodes != scenario.plan.gpus // scenario.gpus_per_node:
            return scenario_from({**settings, "nodes": self.nodes}, self.path)
        return scenario

    def _has_size(self, scenario: Scenario) -> bool:
        """Whether a plan is as large as that of the file, so that its machines are still known."""
        given = self.settings["plan"]
        return all(getattr(scenario.plan, name) == given.get(name, 1) for name in ("tp", "ulysses", "ring", "pp", "dp"))

    def scenario(self, **changes: Any) -> Scenario:
        """The scenario with the `hardware`, and with other settings: a table changes keys of a section, all else takes
        its place. `InputError` where something is missing or does not fit.
        """
        settings: dict[str, Any] = {**self.settings}
        for name, value in changes.items():
            own = settings.get(name)
            if isinstance(value, Mapping) and own is not None:
                table = {PRESET: own} if isinstance(own, str) else own
                settings[name] = {**table, **value}
            elif value is not None:
                settings[name] = value
        return self.together(settings)


def read_launch(path: str | Path) -> Launch:
    """The scenario of a Megatron-LM launch script, a torchtitan TOML or a DeepSpeed JSON, as far as the file says it.

    Nothing of a script is run. `InputError` names the file, and the line of a script, where a value is wrong or the
    model is not simulated.
    """
    path = Path(path)
    if path.suffix.lower() in _NO_LAUNCH:
        raise InputError(
            f"{path}: is neither a shell script nor the TOML of torchtitan nor the JSON of DeepSpeed; give one"
        )
    library = _KINDS.get(path.suffix.lower(), megatron)
    draft, options = library.drafted(read_text(path), path)
    draft.plan["library"] = library.LIBRARY
    if draft.preset is None and draft.model:
        draft.model.setdefault("name", path.stem)
    left = [(bool(library.NO_MATTER.match(name)), name, item) for name, item in options.left()]
    return Launch(
        path=str(path),
        library=library.LIBRARY,
        settings=draft.settings(),
        missing=draft.missing,
        notes=tuple(options.aside),
        not_read=tuple(f"{item.where}: {item.shown}" for idle, _, item in left if not idle),
        no_matter=tuple(item.shown.partition(" ")[0] for idle, _, item in left if idle),
        nodes=draft.nodes,
    )
