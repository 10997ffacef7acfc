"""The one way to write a file, whole or not at all, and to read one of another program's, up to a size."""

from __future__ import annotations

import errno
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, TextIO

from spsim.errors import InputError
from spsim.units import GIB

GZIP = b"\x1f\x8b"
"""How a gzip file begins."""
_CHUNK = 1 << 20


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A sibling to write to, which becomes `path` once it is complete; `InputError` if that cannot be."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with _written(path):
            temporary.touch(exist_ok=False)  # anew: a link that stands in its place is not followed
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """`InputError` where something cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "give a file in an existing directory that you may write to"
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}; {remedy}") from None


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """A text file to write piece by piece, whole or not at all; lines end as they are written."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Scratch:
    """A file without a name, on the disk of a directory, which ends with the process."""

    def __init__(self, directory: Path) -> None:
        """`InputError` where the directory cannot be written to."""
        self._directory = directory
        with _written(directory):
            self._file = TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self.size = 0

    def append(self, data: bytes) -> None:
        """Write all of it; `InputError` where that fails."""
        self.size += len(data)
        left = memoryview(data)
        with _written(self._directory):
            while left:
                left = left[self._file.write(left) :]

    def read(self, start: int, size: int) -> bytes:
        """So many bytes, fewer at the end."""
        return os.pread(self._file.fileno(), size, start)

    def blocks(self) -> Iterator[bytes]:
        """All of it, piece by piece."""
        for start in range(0, self.size, _CHUNK):
            yield self.read(start, _CHUNK)


def read_limited(path: Path, limit: int) -> bytearray:
    """The content of a regular file of at most `limit` bytes, inflated where it is compressed by gzip.

    Nothing beyond the limit is read or inflated. `InputError` where it is larger, no regular file, damaged or cannot be
    read.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file; give a file, no directory, device or pipe")
        with path.open("rb") as file:
            compressed = path.suffix == ".gz" or file.peek(len(GZIP))[: len(GZIP)] == GZIP
            return _read(gzip.GzipFile(fileobj=file) if compressed else file, path, limit)
    except (EOFError, zlib.error):
        raise InputError(f"{path}: the compressed file is cut short or damaged; write or copy it again") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path, its rights and its form"
        ) from None


def _read(source: BinaryIO | gzip.GzipFile, path: Path, limit: int) -> bytearray:
    content = bytearray()
    while chunk := source.read(_CHUNK):
        content += chunk
        if len(content) > limit:
            raise InputError(f"{path}: holds more than {limit / GIB:.3g} GiB; give a smaller one")
    return content
