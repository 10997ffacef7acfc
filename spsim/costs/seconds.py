"""The type of what costs answer with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Seconds = float | npt.NDArray[np.float64]
"""Of one kernel, or of many at once."""
