"""The type of what costs answer with, and operations on it: of a number plain Python's, which on a few numbers is
faster by far than an array's, and the same to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.inputs.hardware import HardwareProfile
from spsim.units import US_PER_S

Seconds = float | npt.NDArray[np.float64]
"""Of one kernel, or of many at once."""


Flags = bool | npt.NDArray[np.bool_]


def larger(one: Any, other: Any) -> Any:
    """The larger of two, place by place."""
    return np.maximum(one, other) if _are_many(one, other) else max(one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of two."""
    return np.minimum(one, other) if _are_many(one, other) else min(one, other)


def pick(flags: Any, one: Any, other: Any) -> Any:
    """The one where a flag holds, else the other."""
    return np.where(flags, one, other) if isinstance(flags, np.ndarray) else one if flags else other


def up(number: Any) -> Any:
    """The next whole number."""
    return np.ceil(number) if isinstance(number, np.ndarray) else float(math.ceil(number))


def down(number: Any) -> Any:
    """The last whole number."""
    return np.floor(number) if isinstance(number, np.ndarray) else float(math.floor(number))


def exponential(number: Any) -> Any:
    """Of both kinds by NumPy, whose last bit is not that of `math`."""
    return np.exp(number) if isinstance(number, np.ndarray) else float(np.exp(number))


def together(one: Seconds, other: Seconds) -> Seconds:
    """Of two that hide each other, the longer, unless they are alike: (a^4 + b^4)^(1/4), by square roots, which round
    alike for one number and for many; a power does not.
    """
    total: Seconds = np.sqrt(np.sqrt(np.square(np.square(one)) + np.square(np.square(other))))
    return total


def launch_seconds(profile: HardwareProfile) -> float:
    """From one kernel of a group to the next, where they are launched one by one."""
    known = profile.coefficients.gemm.group_launch_us
    return known.value / US_PER_S if known else 0.0


def _are_many(one: Any, other: Any) -> bool:
    return isinstance(one, np.ndarray) or isinstance(other, np.ndarray)


def some(flags: Flags) -> bool:
    """Whether it holds, or holds for any of many kernels."""
    return bool(flags.any() if isinstance(flags, np.ndarray) else flags)


def given(number: float | npt.NDArray[Any]) -> bool:
    """Whether a number is not 0, or may not be for some of many kernels: what it adds is worked out then."""
    return isinstance(number, np.ndarray) or bool(number)


def root(number: Any) -> Any:
    """The square root, of both kinds to the same last bit."""
    return np.sqrt(number) if isinstance(number, np.ndarray) else math.sqrt(number)


def power(number: Any, exponent: float) -> Any:
    """Of both kinds by NumPy, as `exponential`."""
    return np.power(number, exponent) if isinstance(number, np.ndarray) else float(np.power(number, exponent))
