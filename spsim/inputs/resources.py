"""Where shipped data lives: hardware profiles and measured cases.

An installed wheel carries both inside the package; an editable install reads them from the checkout.
"""

import tomllib
from pathlib import Path
from typing import Any

from spsim.errors import InputError

_PACKAGE = Path(__file__).parent.parent
_CHECKOUT = _PACKAGE.parent


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    wheel = _PACKAGE / in_wheel
    return wheel if wheel.is_dir() else _CHECKOUT / in_checkout


def profiles_directory() -> Path:
    """The directory of the shipped hardware profiles."""
    return _shipped("hardware_profiles", "hardware_profiles")


def measured_cases() -> Path:
    """The shipped CSV file of published measured cases."""
    return _shipped("data", "experiments/data") / "measured_training.csv"


def read_text(path: Path) -> str:
    """The text of a user's file; `InputError` when it is missing, a directory or not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, expected a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file (UTF-8), expected one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; `InputError` naming line and column when it is malformed."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deeply") from None
