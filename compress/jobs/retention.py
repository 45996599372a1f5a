"""Which runs make room: those that are over and old, and the oldest ones where all together take too much of the disk.

A run that waits or works, or that somebody keeps because its link was shared, is never among them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import RunError
from compress.jobs.database import FINAL, Row

DAY_S = 86_400.0
LOOK_S = 600.0
"""Between two looks at the disk."""
AFTER_START_S = 3600.0
"""Nothing expires before: the clock of a machine that was just switched on may be wrong."""
AFTER_JUMP_S = DAY_S
KEPT_SHARE = 0.5
"""Of the room for all runs: what visitors may keep of it, so that new runs always find some."""
JUMP_S = 300.0
"""A clock that differs by so much from the time that really passed was put to another time."""


@dataclass(frozen=True)
class Limits:
    """None is no limit."""

    keep_days: float | None = None
    """After a run is over."""
    max_bytes: int | None = None
    """Of all runs together."""


@dataclass(frozen=True)
class Found:
    expired: tuple[str, ...]
    """Runs to remove."""
    over: bool
    """Too much would be there even without them."""


class Sweeper:
    """Decides; it removes nothing itself."""

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._clock, self._steady = limits, clock, steady
        self._offset = clock() - steady()
        self._trusted_from = steady() + AFTER_START_S
        self._next_look = steady()

    def is_due(self) -> bool:
        """Whether it is time for a look; then not again for a while."""
        if self._limits == Limits() or self._steady() < self._next_look:
            return False
        self._next_look = self._steady() + LOOK_S
        return True

    def look(self, rows: Sequence[Row], size: Callable[[str], int], is_kept: Callable[[str], bool]) -> Found:
        """
        Args:
            rows: all runs.
            size: bytes of a run's folder.
            is_kept: whether somebody keeps it.
        """
        now = self._trusted_now()
        removable = sorted(
            (row for row in rows if row.state in FINAL and not is_kept(row.job_id)), key=lambda row: row.finished or 0.0
        )
        expired = []
        if self._limits.keep_days is not None and now is not None:
            oldest = now - self._limits.keep_days * DAY_S
            expired = [row.job_id for row in removable if row.finished is not None and row.finished < oldest]
        if self._limits.max_bytes is None:
            return Found(tuple(expired), False)
        sizes = {row.job_id: size(row.job_id) for row in rows}
        total = sum(bytes_ for job_id, bytes_ in sizes.items() if job_id not in expired)
        for row in removable:
            if total > self._limits.max_bytes and row.job_id not in expired:
                expired.append(row.job_id)
                total -= sizes[row.job_id]
        return Found(tuple(expired), total > self._limits.max_bytes)

    def _trusted_now(self) -> float | None:
        """The time of day; None while it cannot be relied on."""
        offset = self._clock() - self._steady()
        if abs(offset - self._offset) > JUMP_S:
            self._trusted_from = self._steady() + AFTER_JUMP_S
        self._offset = offset
        return self._clock() if self._steady() >= self._trusted_from else None


def refuse_to_keep(wanted: int, room: float) -> None:
    """Raises `RunError` when the runs that are kept would take more than their room; both in bytes."""
    if wanted > room:
        raise RunError(
            f"This run cannot be kept: with it the runs that are kept would take {wanted / 1e9:.1f} GB, and this server "
            f"gives them {room / 1e9:.1f} GB. Let go of another one, or download this one."
        )


def folder_bytes(folder: Path) -> int:
    """Of all files in it; what goes away meanwhile counts nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
