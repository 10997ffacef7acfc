"""What of a scenario a launch file says, while it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spsim.errors import InputError
from spsim.inputs.launch.options import Options
from spsim.inputs.model import Model
from spsim.inputs.presets import PRESET, PRESETS
from spsim.inputs.stages import layout_text, spread

KEPT_APART = frozenset({"vocab", "kernels", "attention", "dropout", "sliding_window"})
"""Of a model: what a run may set otherwise than the preset that it trains."""

WAYS = ("kernels", "composite_norm", "glu_offset", "repeat_kv")
"""Fields of a model that say how its modules run."""


@dataclass
class Draft:
    """Settings by section, and what is asked for because the file leaves it open."""

    plan: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    nodes: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Setting that a scenario needs -> the line that asks for it."""

    def read(self, options: Options, names: Mapping[str, str], kind: type[int] | type[bool]) -> None:
        """Options that mean one setting with the same value; one that the file does not say is asked for."""
        for name, path in names.items():
            if name not in options:
                continue
            item = options.items[name]
            if item.unknown:
                options.taken.add(name)
                self.ask(path, f"{item.where}: {item.shown}: {item.unknown} is not known without running the script")
                continue
            section, _, key = path.partition(".")
            value = options.number(name, 0) if kind is int else options.flag(name)
            if value is not False:
                getattr(self, section)[key] = value

    def ask(self, path: str, text: str, how: str = "") -> None:
        """A setting that the file leaves open, and the option that gives it."""
        self.missing.setdefault(path, f"{text}; give {how or f'--set {path}=VALUE'}")

    def settings(self) -> dict[str, Any]:
        """As a scenario takes them; what the file says nothing of is not there."""
        model = self._model()
        found = {"model": model, "plan": self.plan, "workload": self.workload}
        return {name: value for name, value in found.items() if value is not None and (value or name == "plan")}

    def _model(self) -> dict[str, Any] | str:
        """A preset where its sizes are those of one, with what the run changes of it."""
        if self.preset is not None:
            return {PRESET: self.preset, **self.model} if self.model else self.preset
        try:
            model = Model(**self.model)
        except InputError:
            return self.model
        fields = model.model_dump(exclude={"name", "left_out"})
        changed = {name: _changes(fields, preset) for name, preset in PRESETS.items()}
        name = min(changed, key=lambda name: len(changed[name]))
        if not changed[name].keys() <= KEPT_APART:
            return self.model
        return {PRESET: name, **changed[name]} if changed[name] else name


def _changes(fields: Mapping[str, Any], preset: Model) -> dict[str, Any]:
    """Fields that are not those of a preset; the rows of the head follow from the vocabulary."""
    changes = {name: value for name, value in fields.items() if value != getattr(preset, name)}
    if "vocab" in changes:
        changes.pop("head_rows", None)
    return changes


def stages_as(draft: Draft, counts: Sequence[int]) -> None:
    """Chunks with so many layers each: a layout, unless they are spread like that anyhow."""
    if list(counts) != spread(sum(counts), len(counts)):
        draft.plan["pp_layout"] = layout_text(counts, draft.model.get("mtp_layers", 0))
