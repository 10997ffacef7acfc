"""Factors of kernels drawn for each seed, rank and run of a kernel: the same whatever else is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

import numpy as np
import numpy.typing as npt

from spsim.inputs.perturbations import Jitter
from spsim.step.lockstep import Plan

Factors = npt.NDArray[np.float64]
WHOLE_STEP = 2**63
"""In place of the number of a visit, of what is drawn once a step."""


class Draws:
    """Of some jitters, by simulated rank, for some seeds."""

    def __init__(self, jitters: Sequence[Jitter], shape: tuple[int, ...], seeds: range) -> None:
        """`seeds` count from the seed of each jitter: of one that begins at 7, seed 2 is drawn from 9."""
        self.of_kernels = [own for own in jitters if own.each == "kernel" and own.spread]
        self.shape, self.seeds = shape, seeds
        self._of_ranks = np.ones((1, *shape, len(seeds)))
        for own in jitters:
            if own.each == "rank" and own.spread:
                self._of_ranks = self._of_ranks * self._drawn(own, WHOLE_STEP, 1)

    def __call__(self, number: int, plan: Plan) -> Factors:
        """Of the kernels of a visit, by kernel, rank and seed."""
        found = np.broadcast_to(self._of_ranks, (len(plan.kernels), *self._of_ranks.shape[1:]))
        for own in self.of_kernels:
            found = found * self._drawn(own, number, len(plan.kernels))
        return found

    def _drawn(self, jitter: Jitter, number: int, kernels: int) -> Factors:
        """By a generator for each seed and visit, whose key and counter say where in the stream it begins."""
        found = np.empty((kernels, *self.shape, len(self.seeds)))
        for place, seed in enumerate(self.seeds):
            bits = np.random.Philox(key=[(jitter.seed + seed) % 2**64, 0], counter=[0, 0, 0, number])
            found[..., place] = drawn(jitter, np.random.Generator(bits), (kernels, *self.shape))
        return found


def drawn(jitter: Jitter, generator: np.random.Generator, shape: tuple[int, ...]) -> Factors:
    """Factors of mean 1 and standard deviation `spread`; a normal one below 0 is 0."""
    spread = jitter.spread
    if jitter.distribution == "gamma":
        return generator.gamma(spread**-2, spread**2, shape)
    normal = generator.standard_normal(shape)
    if jitter.distribution == "normal":
        return np.maximum(1 + spread * normal, 0)
    sigma = sqrt(log(1 + spread**2))
    factors: Factors = np.exp(sigma * normal - sigma**2 / 2)
    return factors
