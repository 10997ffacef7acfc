"""Factors of kernels drawn for each seed, rank and run of a kernel: the same whatever else is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

import numpy as np
import numpy.typing as npt

from spsim.inputs.perturbations import Jitter
from spsim.step.lockstep import VISITS, Plan

Factors = npt.NDArray[np.float64]
WHOLE_STEP = 2**63
"""In place of the number of a visit, of what is drawn once a step; the stage is added."""


class Draws:
    """Of some jitters, by simulated rank, for some seeds."""

    def __init__(self, jitters: Sequence[Jitter], shape: tuple[int, ...], seeds: range) -> None:
        """`seeds` count from the seed of each jitter: of one that begins at 7, seed 2 is drawn from 9."""
        self.of_kernels = [own for own in jitters if own.each == "kernel" and own.spread]
        self.shape, self.seeds = shape, seeds
        self.of_ranks = [own for own in jitters if own.each == "rank" and own.spread]
        self._known: dict[int, Factors] = {}
        """Of the ranks of each stage, for the whole step."""

    def __call__(self, number: int, plan: Plan) -> Factors:
        """Of the kernels of a visit, by kernel, rank and seed."""
        ranks = self.whole_step(number // VISITS)
        found = np.broadcast_to(ranks, (len(plan.kernels), *ranks.shape[1:]))
        for own in self.of_kernels:
            found = found * self._drawn(own, number, len(plan.kernels))
        return found

    def whole_step(self, stage: int) -> Factors:
        """Of all kernels of the ranks of a stage."""
        if stage not in self._known:
            own = [self._drawn(jitter, WHOLE_STEP + stage, 1) for jitter in self.of_ranks]
            self._known[stage] = np.prod([np.ones((1, *self.shape, len(self.seeds))), *own], axis=0)
        return self._known[stage]

    def _drawn(self, jitter: Jitter, number: int, kernels: int) -> Factors:
        """By a generator for each seed and visit, whose key and counter say where in the stream it begins."""
        found = np.empty((kernels, *self.shape, len(self.seeds)))
        for place, seed in enumerate(self.seeds):
            key, counter = (np.array(own, dtype=np.uint64) for own in ([jitter.seed + seed, 0], [0, 0, 0, number]))
            bits = np.random.Philox(key=key, counter=counter)
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
