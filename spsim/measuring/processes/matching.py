"""Whether a profile is of the device at hand: the one rule by which names of devices are compared."""

from __future__ import annotations

import re

from spsim.inputs.hardware import HardwareProfile


def device_of(profile: HardwareProfile) -> str:
    """The device that a profile was measured on, as its driver calls it; that of the datasheet where none is noted."""
    return profile.provenance.get("device") or profile.datasheet.device


def describes_cpu(profile: HardwareProfile) -> bool:
    """Whether the ranks of a profile are processes on a CPU."""
    return profile.datasheet.topology[0].kind == "shared_memory"


def describes(profile: HardwareProfile, device: str, *, gpu: bool) -> bool:
    """Whether a profile is of the device that a driver or the operating system calls so.

    A CPU has no datasheet: a profile is of the model that it was calibrated on, and of no other.
    """
    if describes_cpu(profile) == gpu:
        return False
    return is_same_device(device, device_of(profile)) if gpu else device == device_of(profile)


def is_same_device(device: str, datasheet: str) -> bool:
    """Whether two names of a GPU mean the same: equal, or of the same chip, form and, if both say, memory.

    A slice of a GPU (MIG) has a part of its units and memory, and is another device.
    """
    if (" MIG " in device) != (" MIG " in datasheet):
        return False
    ours, theirs = _traits(device), _traits(datasheet)
    same_memory = not ours[2] or not theirs[2] or ours[2] == theirs[2]
    return device == datasheet or (bool(ours[0]) and ours[:2] == theirs[:2] and same_memory)


def _traits(name: str) -> tuple[str, str, str]:
    """(chip, other form than a module, memory): of `NVIDIA A100 80GB PCIe` ("a100", "pcie", "80gb")."""
    words = re.findall(r"[a-z0-9]+", name.lower())

    def first(pattern: str) -> str:
        return next((word for word in words if re.fullmatch(pattern, word)), "")

    return first(r"[a-z]{1,2}\d{2,3}[a-z]?"), first("pcie|nvl"), first(r"\d+gb")
