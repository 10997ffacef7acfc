"""The base of everything a user configures: models, plans, workloads, scenarios.

Frozen, keyword-only, strictly typed; an unknown key or a value out of range is an `InputError` of one
line, wherever the object is made.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from spsim.errors import InputError, first_problem


class Configuration(BaseModel):
    """A frozen table of settings whose problems are reported as `InputError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise first_problem(error, type(self).__name__.lower()) from None


def parse_options(text: str, where: str) -> dict[str, Any]:
    """Settings from `key=value,flag,…` as the command line writes them; a bare key is true.

    Values are integers, numbers, `true`/`false` or words. Raises `InputError` on an empty key or a key
    given twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or (equals and not value):
            raise InputError(f"{where}: {item!r} is not key=value or a bare flag; write for instance tp=8")
        if key in options:
            raise InputError(f"{where}: {key} is given twice; keep one")
        options[key] = _value(value) if equals else True
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
