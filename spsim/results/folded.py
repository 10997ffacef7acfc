"""Why ranks and layers of a step were folded, or not."""

from __future__ import annotations

SWITCHED_OFF = "layers are not folded: it was switched off"
SHARED = "layers are not folded: what is under way on links outlasts them"


def of_step(simulated: int, ranks: int, fold: bool, *, unlike: bool, shared: bool) -> tuple[str, ...]:
    """Of one stage: ranks of which some are `unlike` others, on a network whose links are `shared`."""
    layers = SWITCHED_OFF if not fold else SHARED if shared else ""
    return tuple(filter(None, (_ranks(simulated, ranks, fold, unlike=unlike), layers)))


def of_stages(
    stages: int, simulated: int, ranks: int, fold: bool, *, unlike: bool, shared: bool
) -> tuple[str, ...]:  # fmt: skip
    """The same of several."""
    if not fold:
        return _ranks(simulated, ranks, fold), SWITCHED_OFF
    if unlike:
        return _ranks(simulated, ranks, fold, unlike=True), "layers are not folded: ranks end their passes apart"
    if shared:
        return f"{simulated} of {ranks} ranks simulated: all others share links as they do", SHARED
    if simulated == stages:
        return (f"{simulated} of {ranks} ranks simulated: one of each pipeline stage",)
    return (
        f"{simulated} of {ranks} ranks simulated: those of a pipeline stage differ by their position on the ring",
        "layers are not folded: ranks of a stage end their passes apart",
    )


def _ranks(simulated: int, ranks: int, fold: bool, *, unlike: bool = False) -> str:
    if not fold:
        return "ranks are not folded: it was switched off"
    if simulated == ranks:
        return "" if ranks == 1 else "ranks are not folded: each does different work"
    position = "by where they stand towards what is perturbed" if unlike else "by their position on the ring"
    differ = "all are identical" if simulated == 1 else f"they differ {position}"
    return f"{simulated} of {ranks} ranks simulated: {differ}"
