"""The base of everything a user configures: models, plans, workloads, scenarios.

Frozen, keyword-only, strictly typed; an unknown key or a value out of range is an `InputError` of one
line, wherever the object is made.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from spsim.errors import InputError, first_problem, printable
from spsim.inputs.words import renamed, unknown_key

Name = Annotated[str, AfterValidator(printable)]
"""What tables, pictures and messages show."""


class Configuration(BaseModel):
    """A frozen table of settings whose problems are reported as `InputError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    words: ClassVar[Mapping[str, Iterable[str]]] = {}
    """Field -> its names elsewhere, which are taken too."""

    def __init__(self, *positional: Any, **settings: Any) -> None:
        kind = type(self)
        if positional:
            raise InputError(
                f"{kind.__name__}: takes its settings by name, got {positional[0]!r}; write {kind.example()}"
            )
        try:
            super().__init__(**kind.own_words(settings))
        except ValidationError as error:
            raise first_problem(error, kind.called()) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, perhaps with other settings; what was worked out of the settings does not come with it."""
        found = super().model_copy(update=update, deep=deep)
        for name in found.__dict__.keys() - type(self).model_fields.keys():
            del found.__dict__[name]
        return found

    @classmethod
    def called(cls) -> str:
        """What messages call it."""
        return cls.__name__.lower()

    @classmethod
    def of_table(cls, table: Mapping[Any, Any]) -> Self:
        """From a table; `InputError` where a key is no name."""
        strange = [key for key in table if not isinstance(key, str)]
        if strange:
            raise InputError(f"{cls.called()}: {strange[0]!r}: is no key; write a name")
        return cls(**table)

    @classmethod
    def example(cls) -> str:
        """How one is made, for messages."""
        required = [f"{name}=..." for name, field in cls.model_fields.items() if field.is_required()]
        return f"{cls.__name__}({', '.join(required)})"

    @property
    def differing(self) -> dict[str, Any]:
        """Settings that are not their defaults, in the order of the fields."""
        return self.unlike({})

    def unlike(self, usual: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that are not as `usual`, else not the defaults of their fields, in the order of these."""
        given, fields = self.model_fields_set, type(self).model_fields
        values = ((name, getattr(self, name)) for name in fields if name in given)
        return {name: value for name, value in values if value != usual.get(name, fields[name].default)}

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """What `repr` shows: what is not a default."""
        return self.differing.items()

    @classmethod
    def own_words(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings under the names of spsim; `InputError` where one is not known."""
        if settings.keys() <= cls.model_fields.keys():
            return settings
        where = cls.called()
        found = renamed(settings, cls.words, cls.model_fields.keys(), where)
        for name in found:
            if name not in cls.model_fields:
                raise unknown_key(where, name, cls.model_fields.keys())
        return found


def read_value(text: str) -> Any:
    """A value as the command line writes it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
