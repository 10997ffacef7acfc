"""The shipped profile that supplies what a calibration does not measure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spsim.calibrate.records import Measurement
from spsim.errors import InputError
from spsim.hardware import HardwareProfile
from spsim.profiles import load_profile, profile_names

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
        if is_same_device(device, candidate.datasheet.device):
            return candidate
    raise InputError(
        f"calibrate: no shipped profile describes the device {device!r}; give the nearest as --base "
        f"({', '.join(profile_names())}), or the path of a profile with its datasheet"
    )


def base_of_rows(name: str | None, rows: Sequence[Measurement]) -> HardwareProfile:
    """The same for a raw file."""
    environment = {row.name: row.text for row in rows if row.kind == "environment"}
    return base_profile(name, environment.get("device", ""), gpu="cuda" in environment or "hip" in environment)


def is_same_device(device: str, datasheet: str) -> bool:
    """Whether the driver's name of a device and that of a datasheet mean the same: chip, form, memory if both say."""
    ours, theirs = _traits(device), _traits(datasheet)
    same_memory = not ours[2] or not theirs[2] or ours[2] == theirs[2]
    return bool(ours[0]) and ours[:2] == theirs[:2] and same_memory


def _traits(name: str) -> tuple[str, str, str]:
    """(chip, other form than a module, memory): of `NVIDIA A100 80GB PCIe` ("a100", "pcie", "80gb")."""
    words = re.findall(r"[a-z0-9]+", name.lower())

    def first(pattern: str) -> str:
        return next((word for word in words if re.fullmatch(pattern, word)), "")

    return first(r"[a-z]{1,2}\d{2,3}[a-z]?"), first("pcie|nvl"), first(r"\d+gb")
