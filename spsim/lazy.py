"""What is computed when it is first asked for, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801  # a decorator
    """`functools.cached_property` without the lock that it takes before Python 3.12, which costs more than most of
    what a row of a sweep computes once.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type) -> T:
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


class Deferred(Sequence[T]):
    """A sequence that is made when somebody reads it."""

    def __init__(self, make: Callable[[], Sequence[T]]) -> None:
        self._make = make

    @lazy
    def made(self) -> Sequence[T]:
        """All of it."""
        return self._make()

    def __getitem__(self, place: Any) -> Any:
        return self.made[place]

    def __len__(self) -> int:
        return len(self.made)


class Cache(Generic[T]):
    """Values by key, of which the ones used last are kept, up to a number of bytes."""

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        """`size` says how many bytes a value takes, about; a value beyond the limit is not kept at all."""
        self.limit = limit
        self.size = size
        self.bytes = 0
        """Of the values that are kept."""
        self._kept: dict[Hashable, tuple[T, int]] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made unless it is kept."""
        with self._lock:
            found = self._kept.pop(key, None)
            if found is not None:
                self._kept[key] = found
                return found[0]
        value = make()
        self._keep(key, value, self.size(value))
        return value

    def _keep(self, key: Hashable, value: T, size: int) -> None:
        with self._lock:
            self.bytes += size - self._kept.pop(key, (value, 0))[1]
            self._kept[key] = value, size
            while self.bytes > self.limit:
                self.bytes -= self._kept.pop(next(iter(self._kept)))[1]
