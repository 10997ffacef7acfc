"""The shipped profile that supplies what a calibration does not measure."""

from __future__ import annotations

from collections.abc import Sequence

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.profiles import load_profile, profile_names
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.processes.at_hand import CPU_RANKS, count_gpus, torchrun_position
from spsim.measuring.processes.matching import describes

CPU_BASE = "cpu-2"


def base_profile(name: str | None, device: str, *, gpu: bool) -> HardwareProfile:
    """The profile of a name or path; without one, that of the device, and of any CPU `cpu-2`.

    Raises `InputError` for an unknown name, and for a GPU that no shipped profile describes.
    """
    if name is not None:
        return load_profile(name)
    if not gpu:
        return load_profile(CPU_BASE)
    for candidate in map(load_profile, profile_names()):
        if describes(candidate, device, gpu=True):
            return candidate
    raise InputError(
        f"calibrate: no shipped profile describes the device {device!r}; give the nearest as --base "
        f"({', '.join(profile_names())}), or the path of a profile of it, which may have the nearest as its base"
    )


def base_of_rows(name: str | None, rows: Sequence[Measurement]) -> HardwareProfile:
    """The same for a raw file."""
    environment = {row.name: row.text for row in rows if row.kind == "environment"}
    return base_profile(name, environment.get("device", ""), gpu="cuda" in environment or "hip" in environment)


def check_ranks_at_hand(base: str | None) -> None:
    """Before anything is written: `InputError` where the base cannot hold the ranks that would measure.

    Without a base, that of a GPU is known only once its driver is asked, which the first rank does.
    """
    gpus, position = count_gpus(), torchrun_position()
    if base is None and gpus:
        return
    ranks, per_node = (position.world, position.per_node) if position else (gpus or CPU_RANKS,) * 2
    check_ranks(base_profile(base, "", gpu=False), per_node, max(1, ranks // per_node))


def check_ranks(profile: HardwareProfile, per_node: int, nodes: int) -> None:
    """`InputError` where a node of the base has fewer GPUs than ranks, or no level joins its nodes."""
    levels = profile.datasheet.topology
    if per_node > profile.gpus_per_node:
        raise InputError(
            f"calibrate: {per_node} ranks on a node, but one of {profile.name} has {profile.gpus_per_node} GPUs; "
            f"start at most {profile.gpus_per_node} on each, or give a --base with more"
        )
    if nodes > 1 and len(levels) < 2:
        raise InputError(
            f"calibrate: the ranks are on {nodes} nodes, but {profile.name} has no level beyond {levels[0].name!r}; "
            "give a --base with one"
        )
    if nodes > 1 and nodes * per_node > (levels[1].gpus or nodes * per_node):
        raise InputError(
            f"calibrate: {nodes * per_node} ranks on {nodes} nodes, but {levels[1].name!r} of {profile.name} joins "
            f"{levels[1].gpus} GPUs; start fewer, or give a --base with more"
        )
