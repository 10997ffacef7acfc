"""Figures of inference: times of tokens, and what the cache takes."""

from __future__ import annotations

from spsim.costs.static_memory import StaticMemory
from spsim.inputs.serving_rules import batch_unit
from spsim.results.derived import Derived
from spsim.units import GIB


class Served(Derived):
    """A result that has them, if it is of inference."""

    @property
    def static(self) -> StaticMemory:
        """Of the fullest rank."""
        raise NotImplementedError

    @property
    def ttft_s(self) -> float:
        """Time to the first token of a prefill, from when the prompts are on the device until it has the token."""
        return self.step_time_s

    @property
    def tpot_s(self) -> float:
        """Time per output token of a decode."""
        return self.step_time_s

    @property
    def kv_cache_gib(self) -> float:
        """Keys and values of all sequences, in whole blocks."""
        return self.static.cache / GIB

    @property
    def largest_micro_batch(self) -> int:
        """Sequences of a replica that fit with their cache: what a pass takes besides grows no faster than they do."""
        own, weights = self.scenario.workload.micro_batch, self.static.weights
        unit = batch_unit(self.scenario.plan, self.scenario.workload)
        fit: int = (self.limit - weights) * own // (self.peak_bytes - weights)
        return max(0, fit // unit * unit)
