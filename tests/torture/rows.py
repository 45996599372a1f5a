"""One row of the table that `make torture` prints: what is tried, what it must reach, and what it reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a row reached."""

    figure: str
    """In words and numbers, for the table."""
    failures: tuple[str, ...] = ()
    """One line for each case that went wrong; a row holds when there is none."""


@dataclass(frozen=True)
class Row:
    """A test that is too long for the suite, or whose figures are to be read."""

    name: str
    """One word for the command line."""
    tried: str
    wanted: str
    run: Callable[[Path, bool], Outcome]
    """(an empty folder, whether all of it is wanted or only the part that continuous integration carries out)."""
