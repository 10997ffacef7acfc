"""Figures with their units, and what is said of a calibrated profile, as all reports write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from spsim.program.placement import COLLECTIVE_SHORT
from spsim.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from spsim.results.bands import Band
    from spsim.results.derived import Derived
    from spsim.results.uncertainty import ErrorBand

FULL = 100
"""From here on a figure has three digits before the point."""
COLLECTIVES = ", ".join(f"{short} {kind.replace('_', '-')}" for kind, short in COLLECTIVE_SHORT.items())
"""What the abbreviations mean, for captions."""

STEP_NAME = {"prefill": "time to first token", "decode": "time per output token"}
"""Of inference, by scope."""


def figure(value: float) -> str:
    """Three significant digits, and no digit after the point from 100 on."""
    return f"{value:,.0f}" if abs(value) >= FULL else f"{value:.3g}"


def time(seconds: float) -> str:
    """With the unit that makes it short."""
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def memory_unit(count: float) -> tuple[int, str]:
    """The largest unit that a number of bytes reaches: its bytes and its name."""
    return next(((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB")) if count >= unit), (KIB, "KiB"))


def size(count: float) -> str:
    """Bytes in the largest unit that they reach."""
    unit, name = memory_unit(count)
    return f"{count / unit:.2f} {name}"


def listed(names: Sequence[str]) -> str:
    """Such as `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def collective_counts(collectives: Mapping[str, int]) -> str:
    """Such as `2 all-gather, 2 reduce-scatter`."""
    return ", ".join(f"{n} {name.replace('_', '-')}" for name, n in collectives.items()) or "no communication"


def signed(amount: float, digits: int) -> str:
    """With its sign, unless it is rounded to nothing."""
    text = f"{amount:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def gpus(result: Derived) -> str:
    """How many, and of how many nodes where they are several."""
    count = result.scenario.plan.gpus
    return f"{count} GPU{'s' if count > 1 else ''}" + (f" on {result.nodes} nodes" if result.nodes > 1 else "")


def measured(band: Band) -> str:
    """A band and where it comes from."""
    return f"±{band.percent:.1f} %, from {f'{band.rows} ' if band.rows else ''}{band.of}"


def far_off(part: Band) -> str:
    """A part that is known to be far off."""
    return f"known to be far off: {part.of}: published tables differ by {part.percent:.0f} % or more ({part.rows} rows)"


def missed(flagged: Iterable[str]) -> str:
    """What a calibration does not describe within its limit."""
    return f"the calibration missed its error limit for: {', '.join(flagged)}"


def band_parts(band: ErrorBand) -> str:
    """Half-widths, such as `step ±12.1 %, layer forward ±11.0 %`."""
    parts = {
        "step": band.step_time_percent, "layer forward": band.layer_forward_percent,
        "layer backward": band.layer_backward_percent,
    }  # fmt: skip
    return ", ".join(f"{name} ±{percent:.1f} %" for name, percent in parts.items() if percent is not None)


def band(found: ErrorBand) -> str:
    """The error band in one line."""
    return (
        f"held-out errors of the calibration make {band_parts(found)}; they cover {100 * found.known_share:.0f} % "
        "of the step"
    )
