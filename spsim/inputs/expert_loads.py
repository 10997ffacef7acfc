"""How unevenly tokens are dealt out to experts: the load of the rank with the most, which all others wait for."""

from __future__ import annotations

from functools import lru_cache

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan


def load_of(model: Model, plan: Plan) -> float:
    """Tokens of the rank whose experts have the most, over the mean; of padded experts all have as many."""
    if plan.moe_capacity_factor is not None:
        return plan.moe_capacity_factor
    if plan.ep == 1 or model.experts is None:
        return 1.0
    if plan.expert_concentration is None:
        return plan.expert_imbalance
    drawn = drawn_load(model.experts, plan.ep, model.layers, plan.expert_concentration, plan.routing_seed)
    return min(drawn, largest_load(model, plan))


def largest_load(model: Model, plan: Plan) -> float:
    """Of a rank to whose experts each token is sent, one copy to each: to all k, or to all that it has."""
    experts, picked = model.experts or 1, model.experts_per_token or 1
    return plan.ep * min(picked, experts // plan.ep) / picked


@lru_cache
def drawn_load(experts: int, ranks: int, layers: int, concentration: float, seed: int) -> float:
    """The mean over layers of the largest rank's load, since each layer waits for its own: in each the shares of
    experts are drawn from a symmetric Dirichlet distribution, and neighbours are on one rank.
    """
    import numpy as np

    shares = np.random.default_rng(seed).dirichlet([concentration] * experts, layers)
    of_ranks = shares.reshape(layers, ranks, experts // ranks).sum(axis=2)
    return float(of_ranks.max(axis=1).mean() * ranks)
