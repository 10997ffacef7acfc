"""The type of what costs answer with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Seconds = float | npt.NDArray[np.float64]
"""Of one kernel, or of many at once."""


def some(number: float | npt.NDArray[Any]) -> bool:
    """Whether a number, or any of many, is not 0."""
    return bool(number.any() if isinstance(number, np.ndarray) else number)
