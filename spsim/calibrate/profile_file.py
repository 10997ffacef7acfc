"""The file of a fitted profile."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from spsim.calibrate.coefficients import document
from spsim.export import whole_file
from spsim.hardware import HardwareProfile

HEADER = """\
# Written by spsim calibrate. `calibrated` was measured, or stood there in the base profile; each number names its
# source. `held_out_error_percent` is the 90th percentile of the error on shapes that the number was not fitted
# on; a class above 20 % is flagged.

"""


def profile_text(profile: HardwareProfile) -> str:
    """The TOML document of a profile; the same profile gives the same text."""
    return HEADER + tomli_w.dumps(document(profile))


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile whole or not at all; `InputError` where the file cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_text(profile_text(profile), encoding="utf-8")
