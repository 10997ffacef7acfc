"""The one way to write a file: whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from spsim.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A sibling to write to, which becomes `path` once it is complete; `InputError` if that cannot be."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        temporary.touch(exist_ok=False)  # anew: a link that stands in its place is not followed
        yield temporary
        temporary.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "give a file in an existing directory that you may write to"
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}; {remedy}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """A text file to write piece by piece, whole or not at all; lines end as they are written."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
