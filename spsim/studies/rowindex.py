"""Where the rows of a file stand, by the digest of their key: 17 bytes a row, however long the rows are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

MISSING = -1
"""The offset of a row that is not there."""
_Digests = npt.NDArray[np.uint64]
_Offsets = npt.NDArray[np.int64]


def digests(keys: Iterable[str]) -> _Digests:
    """The 64 bits of each key behind the digits of its program."""
    return np.array([int(key[-16:], 16) for key in keys], dtype=np.uint64)


class RowIndex:
    """Digests of keys in ascending order, and the offset of the row of each; of equal ones the last counts."""

    def __init__(self, digests: Sequence[int], offsets: Sequence[int]) -> None:
        own, places = np.array(digests, dtype=np.uint64), np.array(offsets, dtype=np.int64)
        order = np.argsort(own, kind="stable")
        own, places = own[order], places[order]
        last = np.append(own[1:] != own[:-1], np.True_) if len(own) else np.ones(0, dtype=np.bool_)
        self._digests, self._offsets = own[last], places[last]
        self._wanted = np.zeros(len(self._digests), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def unwanted(self) -> int:
        """Rows that nobody has asked for."""
        return len(self) - int(np.count_nonzero(self._wanted))

    @property
    def in_file(self) -> _Offsets:
        """The offsets of all rows, ascending."""
        return np.sort(self._offsets)

    def wanted(self, digests: _Digests) -> _Offsets:
        """The offsets of some rows, `MISSING` of those that are not there."""
        if not len(self):
            return np.full(len(digests), MISSING)
        places, known = self._places(digests)
        self._wanted[places[known]] = True
        return np.where(known, self._offsets[places], MISSING)

    def add(self, digests: _Digests, offsets: _Offsets) -> None:
        """Rows that stand in the file now; each is one that is wanted."""
        order = np.argsort(digests)
        digests, offsets = digests[order], offsets[order]
        if len(self):
            places, known = self._places(digests)
            self._offsets[places[known]] = offsets[known]
            digests, offsets = digests[~known], offsets[~known]
        before = np.searchsorted(self._digests, digests)
        self._digests = np.insert(self._digests, before, digests)
        self._offsets = np.insert(self._offsets, before, offsets)
        self._wanted = np.insert(self._wanted, before, np.True_)

    def _places(self, digests: _Digests) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Where digests are, and whether."""
        places = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        return places, self._digests[places] == digests
