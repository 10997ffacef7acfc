"""The type of what costs answer with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Seconds = float | npt.NDArray[np.float64]
"""Of one kernel, or of many at once."""


def some(flags: bool | npt.NDArray[np.bool_]) -> bool:
    """Whether it holds, or holds for any of many kernels."""
    return bool(flags.any() if isinstance(flags, np.ndarray) else flags)


def given(number: float | npt.NDArray[Any]) -> bool:
    """Whether a number is not 0, or may not be for some of many kernels: what it adds is worked out then."""
    return isinstance(number, np.ndarray) or bool(number)
