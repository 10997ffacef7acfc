"""The curves of one level of the topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from spsim.costs.curves import CurveTime, Number
from spsim.costs.nccl import Tuner
from spsim.costs.sends import SendTime
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile, Level
from spsim.program.placement import Collective


def least(times: Sequence[Number]) -> Number:
    """The smallest, place by place of arrays."""
    found: Number = np.minimum.reduce(times) if isinstance(times[0], np.ndarray) else min(times)
    return found


class LevelCost:
    """Times of collectives among ranks that one level joins: of GPUs in a node, or of one GPU in each of several."""

    def __init__(self, profile: HardwareProfile, level: Level, tuner: Tuner | None = None) -> None:
        self.profile = profile
        self.level = level
        self.name = level.name
        self._allowed: dict[tuple[Collective, int, str | None], list[CurveTime]] = {}
        table = profile.coefficients.collectives.get(level.name, {})
        mesh = level.kind == "full_mesh"
        sends = profile.coefficients.sends.get(level.name)
        self.sends = SendTime(sends, level.adapter_bandwidth, share=level.share) if sends else None
        self.curves = {
            name: [
                CurveTime(
                    curve, name, full_mesh=mesh, share=level.share,
                    chunk_steps=tuner.chunk_steps(curve.ranks) if tuner and curve.algorithm == "nvls" else (),
                )
                for curve in curves
            ]
            for name, curves in table.items()
        }  # fmt: skip

    def time(self, collective: Collective, message: Number, ranks: int, sends: int = 1) -> Number:
        """Seconds by the fastest algorithm that the number of ranks allows, of so many sends in one group call: a curve
        knows their bytes only.
        """
        if collective == "send_receive" and self.sends:
            return cast("Number", self.sends(message, ranks, sends=sends))
        return least([curve(sends * message, ranks) for curve in self.allowed(collective, ranks)])

    def path(self, collective: Collective) -> str:
        """Dotted path of the coefficients of one collective."""
        if collective == "send_receive" and self.sends:
            return f"sends.{self.name}"
        return f"collectives.{self.name}.{collective}"

    def fastest(self, collective: Collective, message: float, ranks: int) -> CurveTime:
        """The curve that `time` is of."""
        return min(self.allowed(collective, ranks), key=lambda curve: curve(message, ranks))

    def allowed(self, collective: Collective, ranks: int, algorithm: str | None = None) -> list[CurveTime]:
        """Curves, of one algorithm or all, that so many ranks may use; `InputError` where there is none."""
        curves = self.known(collective, ranks, algorithm)
        if not curves:
            raise InputError(
                f"hardware {self.profile.name}: level {self.name!r} has no {collective} curve for {ranks} ranks; "
                "add one to the profile"
            )
        return curves

    @property
    def switch(self) -> CurveTime | None:
        """The curve of all-reduce in the network, if there is one; a tree over nodes takes it from fewer ranks on."""
        return next((c for c in self.curves.get("all_reduce", ()) if c.curve.algorithm == "nvls"), None)

    def known(self, collective: Collective, ranks: int, algorithm: str | None = None) -> list[CurveTime]:
        """The same, or none."""
        key = (collective, ranks, algorithm)
        if key not in self._allowed:
            self._allowed[key] = [
                curve
                for curve in self.curves.get(collective, ())
                if curve.allows(ranks) and algorithm in (None, curve.curve.algorithm)
            ]
        return self._allowed[key]
