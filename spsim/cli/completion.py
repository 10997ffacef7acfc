"""What a shell completes the values of options to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from spsim.inputs.configuration import Configuration
from spsim.inputs.libraries import LIBRARIES
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.presets import PRESETS
from spsim.inputs.profiles import profile_names
from spsim.inputs.workload import Workload


def model_names(incomplete: str) -> list[str]:
    """Presets."""
    return _beginning(PRESETS, incomplete)


def hardware_names(incomplete: str) -> list[str]:
    """Shipped profiles."""
    return _beginning(profile_names(), incomplete)


def library_names(incomplete: str) -> list[str]:
    """Libraries whose implementation a plan may be."""
    return _beginning(LIBRARIES, incomplete)


def plan_options(incomplete: str) -> list[str]:
    """Options of a plan, each behind those that are there already."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + option for option in _beginning(_options(), last)]


def settings(incomplete: str) -> list[str]:
    """Settings that may be changed."""
    kinds: dict[str, type[Configuration]] = {"model": Model, "plan": Plan, "workload": Workload}
    return _beginning([f"{name}.{field}=" for name, kind in kinds.items() for field in kind.model_fields], incomplete)


def _options() -> Iterable[str]:
    for name, field in Plan.model_fields.items():
        if field.annotation is bool:
            yield name if field.default is False else f"{name}=false"
        elif choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
            yield from (f"{name}={choice}" for choice in choices)
        else:
            yield f"{name}="


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
