"""An experiment: points, and how their rows become figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spsim.errors import InputError, printable
from spsim.studies.points import Point, Settings, points_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Experiment:
    """One question: its configurations, and the figures and tables that answer it."""

    name: str
    title: str
    points: Sequence[Point | Settings]
    quick: Sequence[Point | Settings] = ()
    """A small selection for `--quick`; every fourth point unless given."""
    figures: Callable[[pd.DataFrame], Mapping[str, Figure]] = lambda frame: {}
    """File name -> figure, from the rows."""
    tables: Callable[[pd.DataFrame], Iterable[Any]] = lambda frame: ()
    """What to print, from the rows: text or rich tables."""

    def __post_init__(self) -> None:
        """Take settings for points too; `InputError` names a field of another kind."""
        for name in ("name", "title"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"Experiment: {name} = {getattr(self, name)!r}: must be text")
        for name in ("figures", "tables"):
            if not callable(getattr(self, name)):
                raise InputError(f"Experiment: {name}: must be a function of the rows, not {getattr(self, name)!r}")
        object.__setattr__(self, "title", printable(self.title))
        for name in ("points", "quick"):
            object.__setattr__(self, name, points_of(getattr(self, name)))

    def selection(self, *, quick: bool) -> Sequence[Point]:
        """The points to compute."""
        return cast("Sequence[Point]", (self.quick or self.points[::4]) if quick else self.points)
