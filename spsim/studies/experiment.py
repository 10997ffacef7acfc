"""An experiment: points, and how their rows become figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spsim.errors import InputError, printable
from spsim.studies.points import GivenAnew, Point, Settings, points_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


QUICK = 4
"""Every so manieth point is computed where `--quick` has no selection of its own."""
Points = Sequence[Point | Settings] | Callable[[], Iterable[Point | Settings]]
"""A list, or a function that gives points anew each time, none of which is kept."""


def _none(frame: pd.DataFrame) -> Any:
    """No figures and no tables, for which no frame has to be made."""
    return {}


@dataclass(frozen=True)
class Experiment:
    """One question: its configurations, and the figures and tables that answer it."""

    name: str
    title: str
    points: Points
    """With a function such as a generator's, and neither figures nor tables, memory does not grow with their number."""
    quick: Points = ()
    """A small selection for `--quick`; every fourth point unless given."""
    figures: Callable[[pd.DataFrame], Mapping[str, Figure]] = _none
    """File name -> figure, from the rows."""
    tables: Callable[[pd.DataFrame], Iterable[Any]] = _none
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
            given = getattr(self, name)
            object.__setattr__(self, name, GivenAnew(given) if callable(given) else points_of(given))

    @property
    def asks_for_rows(self) -> bool:
        """Whether figures or tables are made of them."""
        return self.figures is not _none or self.tables is not _none

    def selection(self, *, quick: bool) -> Selection:
        """The points to compute."""
        chosen = cast("Selection", self.quick if quick and self.quick else self.points)
        return _thinned(chosen) if quick and not self.quick else chosen


Selection = Sequence[Point] | GivenAnew


def _thinned(points: Selection) -> Selection:
    return points.thinned(QUICK) if isinstance(points, GivenAnew) else points[::QUICK]
