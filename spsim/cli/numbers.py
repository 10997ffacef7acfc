"""Numbers that an option names: ranks, layers."""

from __future__ import annotations

import re

from spsim.errors import InputError

_PART = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", re.ASCII)


def numbers(option: str, text: str, count: int) -> list[int]:
    """Those from 0 to `count` - 1 that a text names: `all`, or numbers and ranges such as `0,8-15`."""
    if text.strip() == "all":
        return list(range(count))
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < count:
            raise InputError(
                f"{option}: {part.strip()!r} is none of 0 to {count - 1}; give numbers and ranges such as 0,2-3, or all"
            )
        found.update(range(first, last + 1))
    return sorted(found)
