"""Ways to run a collective, and which of them counts: NCCL's choice for the message, or the fastest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, cast

import numpy as np

from spsim.costs.curves import Number
from spsim.costs.levels import least


@dataclass(frozen=True, slots=True)
class Form:
    """One algorithm among the ranks of a group."""

    algorithm: str
    steps: int
    """In a row, of which each waits for the one before."""
    seconds: Callable[[Any], Any]
    """For a message in bytes; for an array of them an array."""
    protocol: str | None = None
    """Of NCCL, where its time depends on it."""


class Forms(Protocol):
    """The time of a group's collective, and the form that it is of."""

    def __call__(self, message: Number) -> Number:
        """Seconds for a message."""
        ...

    def at(self, message: float) -> Form:
        """That runs it."""
        ...


class Fastest:
    """The fastest of some forms."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self._forms = forms

    def __call__(self, message: Number) -> Number:
        """Seconds for a message."""
        times: list[Any] = [form.seconds(message) for form in self._forms]
        return cast("Number", least(times))

    def at(self, message: float) -> Form:
        """That runs it; the first of those that are alike."""
        return min(self._forms, key=lambda form: float(form.seconds(message)))


class Picked:
    """Forms by rising message, as NCCL picks them. What it picks may take longer than what it would pick for a larger
    message; here a message takes no longer than that one, so that times never fall as messages grow.
    """

    def __init__(self, bounds: Sequence[float], forms: Sequence[Form]) -> None:
        """`bounds` in bytes: where each form but the first begins."""
        self._bounds = list(bounds)
        self._forms = forms
        self._limits = [inf] * len(forms)
        for place in reversed(range(len(bounds))):
            later = float(forms[place + 1].seconds(bounds[place]))
            self._limits[place] = min(later, self._limits[place + 1])

    def __call__(self, message: Number) -> Number:
        """Seconds for a message."""
        if not isinstance(message, np.ndarray):
            return cast("Number", min(self.at(message).seconds(message), self._limits[self._place(message)]))
        places = np.searchsorted(self._bounds, message, side="right")
        if places.size and (places == places.flat[0]).all():
            return self._many(int(places.flat[0]), message)
        found = np.empty(message.shape)
        for place in np.unique(places):
            own = places == place
            found[own] = self._many(int(place), message[own])
        return cast("Number", found)

    def _many(self, place: int, messages: Number) -> Number:
        return cast("Number", np.minimum(self._forms[place].seconds(messages), self._limits[place]))

    def at(self, message: float) -> Form:
        """That runs it."""
        return self._forms[self._place(message)]

    def _place(self, message: float) -> int:
        return bisect_right(self._bounds, message)
