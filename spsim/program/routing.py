"""How tokens get to the experts that a router picked, and back: in which form, and how many copies of each.

An all-to-all sends a token once for each of its experts. DeepEP and HybridEP send it once to each rank that has any of
them, where it is copied for the experts of that rank.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb
from typing import Literal, NamedTuple

from spsim.inputs.dispatch_coefficients import DispatchLibrary
from spsim.inputs.expert_loads import load_of
from spsim.inputs.model import Model
from spsim.inputs.plan import Dispatcher, Plan

LIBRARIES: tuple[DispatchLibrary, ...] = ("deepep", "hybridep")
"""Dispatchers with kernels of their own; the others are collectives of NCCL."""
COPY_PARTS = 64
"""Of one: mean copies of a token, and loads, are rounded to that, for sizes of a program have a common divisor."""


class Routing(NamedTuple):
    """Of the experts of a layer."""

    dispatcher: Dispatcher = "alltoall"
    copies: Fraction = Fraction(0)
    """Of a token, to ranks with any of its experts; 0 where each expert gets its own."""
    load: Fraction = Fraction(1)
    """Tokens of the experts of the rank with the most, over the mean: it paces the others."""
    fused: bool = False
    """Products with the activation and casts between them in their epilogues."""


USUAL = Routing()


def distinct_groups(experts: int, per_token: int, groups: int) -> Fraction:
    """Mean number of groups, such as ranks or nodes, with any of the `per_token` experts of a token, which are drawn
    evenly from all without repetition: groups x (1 - C(E - E / groups, k) / C(E, k)).
    """
    own = experts // groups
    return groups * (1 - Fraction(comb(experts - own, per_token), comb(experts, per_token)))


def routing_of(model: Model, plan: Plan) -> Routing:
    """How a plan routes the tokens of a model."""
    if model.experts is None or model.experts_per_token is None:
        return USUAL
    copies, dispatcher = Fraction(0), plan.moe_dispatcher if plan.ep > 1 else "alltoall"
    load = _rounded(load_of(model, plan))
    if dispatcher in LIBRARIES:
        copies = _rounded(distinct_groups(model.experts, model.experts_per_token, plan.ep)) * load
    return Routing(dispatcher, copies, load, plan.fused_grouped_mlp)


def _rounded(number: float | Fraction) -> Fraction:
    return Fraction(round(number * COPY_PARTS), COPY_PARTS)


class Routed(NamedTuple):
    """Tokens whose copies a library sends by kernels of its own."""

    library: DispatchLibrary
    experts: int
    per_token: int


class Dispatch(NamedTuple):
    """A message of them."""

    library: DispatchLibrary
    experts: int
    per_token: int
    way: Literal["dispatch", "combine"]
    """To experts, or back; gradients of what was dispatched are combined."""


HELD: dict[DispatchLibrary, float] = {"deepep": 20 / 132, "hybridep": 32 / 148}
"""Share of a device that kernels of a library hold: 20 of the units of H100 are DeepEP's default, 32 of those of B200
what recipes for HybridEP give it (`moe_deepep_num_sms`, `moe_hybridep_num_sms`)."""


def routed_by(model: Model, plan: Plan) -> Routed | None:
    """What sends the copies of tokens, if that is a library with kernels of its own."""
    library = routing_of(model, plan).dispatcher
    if library not in LIBRARIES or model.experts is None or model.experts_per_token is None:
        return None
    return Routed(library, model.experts, model.experts_per_token)
