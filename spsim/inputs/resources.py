"""Where shipped data lives: hardware profiles and measured cases.

An installed wheel carries both inside the package; an editable install reads them from the checkout.
"""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

from spsim.errors import InputError
from spsim.units import MIB

_PACKAGE = Path(__file__).parent.parent
_CHECKOUT = _PACKAGE.parent


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    wheel = _PACKAGE / in_wheel
    return wheel if wheel.is_dir() else _CHECKOUT / in_checkout


def profiles_directory() -> Path:
    """The directory of the shipped hardware profiles."""
    return _shipped("hardware_profiles", "hardware_profiles")


def data_directory() -> Path:
    """The directory of the shipped measurements."""
    return _shipped("data", "experiments/data")


def measured_cases() -> tuple[Path, ...]:
    """The shipped CSV files of published measured cases."""
    return tuple(data_directory() / f"{name}_training.csv" for name in ("measured", "bridge"))


def error_bands() -> Path:
    """The shipped CSV file of how far published measurements are from predictions."""
    return data_directory() / "bands.csv"


MAX_TEXT = 64 * MIB
"""Bytes of a text file: a thousand times what a long profile has, and few enough to be held."""


def read_text(path: Path) -> str:
    """The text of a user's file; `InputError` when it is missing, no regular file, too large or not text."""
    try:
        return _text(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file (UTF-8), expected one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is no path ({error}); check it") from None


def _text(path: Path) -> str:
    """A device or pipe may have no end, or none yet, and is not opened; a file may grow while it is read."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file, expected one; write what it gives to a file first")
    with path.open("rb") as file:
        content = b"" if status.st_size > MAX_TEXT else file.read(MAX_TEXT + 1)
    if max(status.st_size, len(content)) > MAX_TEXT:
        raise InputError(f"{path}: has over {MAX_TEXT // MIB} MiB, more than any input of spsim; give another file")
    return content.decode("utf-8-sig")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; `InputError` naming line and column when it is malformed."""
    return parse_toml(read_text(path), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of TOML text; `where` names its file in messages."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid TOML: nested too deeply") from None


def parse_json(text: str, where: str, what: str = "a configuration") -> dict[str, Any]:
    """The object of JSON text; `where` names its file in messages, and `what` what it should be."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: not {what}; expected a JSON object")
    return found
