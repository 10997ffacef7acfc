"""Standard output as it is: closed, or of an encoding that has fewer characters than reports use."""

from __future__ import annotations

import codecs
import io
import sys

from spsim.errors import InputError

_SPELLED = {"→": "->", "×": "x", "·": "-", "–": "-", "−": "-", "…": "...", "±": "+-", "µ": "u", "≥": ">=", "≤": "<="}
"""Characters of reports as ASCII."""
_HANDLER = "spsim-spelled"


def prepare_output() -> None:
    """Make every character one that standard output can write; `InputError` where there is no standard output."""
    if sys.stdout is None:
        raise InputError("standard output is closed; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(_HANDLER, _spelled)
        sys.stdout.reconfigure(errors=_HANDLER)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_SPELLED.get(character, "?") for character in missing), error.end
