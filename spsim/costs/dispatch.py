"""Times of messages that carry tokens to experts by kernels of a library, DeepEP or HybridEP.

A call takes its start and the bytes that a rank gets over a measured rate, linear between the numbers of ranks that
were measured and constant beyond. Among the ranks of one node those are of copies for each rank; over nodes a token
goes to a node once, whatever ranks of it have its experts, and the adapter is what counts.
"""

from __future__ import annotations

import numpy as np

from spsim.costs.curves import Number
from spsim.errors import InputError
from spsim.inputs.dispatch_coefficients import Rates
from spsim.inputs.hardware import HardwareProfile
from spsim.program.routing import Dispatch, distinct_groups
from spsim.units import GB, US_PER_S


def dispatch_seconds(profile: HardwareProfile, dispatch: Dispatch, message: Number, ranks: int, nodes: int) -> Number:
    """Seconds of a message in bytes, all copies that a rank gets; `InputError` where the profile does not know."""
    known = profile.coefficients.dispatchers.get(dispatch.library)
    level = profile.datasheet.topology[0 if nodes == 1 else -1].name
    rates = known.levels.get(level) if known else None
    if known is None or rates is None:
        raise InputError(
            f"hardware {profile.name}: no dispatchers.{dispatch.library}.levels.{level}, which a plan with "
            f"moe_dispatcher = {dispatch.library} needs; add it, or use moe_dispatcher=alltoall"
        )
    once = 1.0
    if nodes > 1:
        of_nodes, of_ranks = (distinct_groups(dispatch.experts, dispatch.per_token, n) for n in (nodes, ranks))
        once = float(of_nodes / of_ranks)
    rate = _rate(rates.dispatch if dispatch.way == "dispatch" else rates.combine, ranks) * GB
    seconds: Number = known.start_us.value / US_PER_S + message * once / rate
    return seconds


def coefficients_of(profile: HardwareProfile, dispatch: Dispatch, nodes: int) -> tuple[str, ...]:
    """Dotted paths of the coefficients behind it."""
    level, path = profile.datasheet.topology[0 if nodes == 1 else -1].name, f"dispatchers.{dispatch.library}"
    return f"{path}.start_us", f"{path}.levels.{level}.{dispatch.way}"


def _rate(rates: Rates, ranks: int) -> float:
    """GB/s among so many ranks."""
    known = sorted((int(number), rate.value) for number, rate in rates.items())
    return float(np.interp(ranks, [number for number, _ in known], [rate for _, rate in known]))
