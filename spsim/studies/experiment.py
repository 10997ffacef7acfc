"""An experiment: points, and how their rows become figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spsim.studies.points import Point

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Experiment:
    """One question: its configurations, and the figures and tables that answer it."""

    name: str
    title: str
    points: Sequence[Point]
    quick: Sequence[Point] = ()
    """A small selection for `--quick`; every fourth point unless given."""
    figures: Callable[[pd.DataFrame], Mapping[str, Figure]] = lambda frame: {}
    """File name -> figure, from the rows."""
    tables: Callable[[pd.DataFrame], Iterable[Any]] = lambda frame: ()
    """What to print, from the rows: text or rich tables."""

    def selection(self, *, quick: bool) -> Sequence[Point]:
        """The points to compute."""
        return (self.quick or self.points[::4]) if quick else self.points
