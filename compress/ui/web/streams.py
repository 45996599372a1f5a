"""How many answers that last (event streams) one visitor and all together may listen to, so that others are still answered."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from compress.errors import CompressError

MOST_OF_ONE = 24
"""A page listens to two, and a browser opens six connections at most by plain HTTP."""
MOST_IN_ALL = 2000
SENTENCE = "You listen to as many event streams as this server allows: close a page of it, and try again."
FULL = "As many visitors as this server can serve watch it now: try again in a few minutes."


class StreamsError(CompressError):
    """The stream is one too many."""


class Streams:
    """The open streams."""

    def __init__(self, most_of_one: int = MOST_OF_ONE, most_in_all: int | None = None) -> None:
        self._most_of_one = most_of_one
        self._most_in_all = most_in_all if most_in_all is not None else min(MOST_IN_ALL, _descriptors() // 2)
        self._open: Counter[str] = Counter()

    @contextmanager
    def listening(self, visitor: str) -> Iterator[None]:
        """While a visitor listens to one more stream. Raises `StreamsError`."""
        if self._open[visitor] >= self._most_of_one:
            raise StreamsError(SENTENCE)
        if self._open.total() >= self._most_in_all:
            raise StreamsError(FULL)
        self._open[visitor] += 1
        try:
            yield
        finally:
            self._open[visitor] -= 1
            if not self._open[visitor]:
                del self._open[visitor]


def allow_many_descriptors() -> None:
    """Raises this process's limit of open files and connections as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4 * MOST_IN_ALL if soft == resource.RLIM_INFINITY else soft
