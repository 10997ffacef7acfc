"""Numbers of a hardware profile: bounded, each with the source it comes from.

Units are in the names of the fields that hold them; bounds catch values in another unit.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Table(BaseModel):
    """A table of a profile: frozen, and an unknown key is an error. A validator is built when it is first used: that
    of a profile contains those of its tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


Number = Annotated[float, Field(strict=True)]
LARGEST = 1e7
"""Of any number of a profile: MiB of 10 TB."""


class Provenance(Table):
    """Where a number comes from."""

    source: Annotated[str, Field(min_length=3)]
    """A key of the profile's `sources`."""
    fitted_on: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Ids of the measured cases that the value was fitted on; empty for a value measured by itself."""
    held_out_error_percent: Annotated[Number, Field(ge=0, le=LARGEST)] | None = None
    flagged: bool = False
    """True where a calibration missed its error limit for this class."""


class Quantity(Provenance):
    """A positive number and its source; the unit is in the name of the field that holds it."""

    value: Annotated[Number, Field(ge=1e-3, le=LARGEST)]


class Bandwidth(Quantity):
    """GB/s: a value beyond the bounds is in another unit."""

    value: Annotated[Number, Field(ge=0.1, le=1e5)]


class Microseconds(Provenance):
    """Time of a start or a latency: a value beyond the bound is in another unit."""

    value: Annotated[Number, Field(ge=0, le=1e3)]


class Fraction(Provenance):
    """A number in (0, 1] and its source."""

    value: Annotated[Number, Field(ge=1e-4, le=1)]


class NonNegative(Provenance):
    """A number of at least 0 and its source: tokens, elements, MiB or shares."""

    value: Annotated[Number, Field(ge=0, le=1e5)]


class Sides(Provenance):
    """Sides of tiles in elements, and their source."""

    value: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, strict=False)]
