"""Retention: which ended runs expire, by age and by the disk space of all runs together, oldest first.

A queued or active run, and one that is kept because its link was shared, never expires.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import RunError
from compress.jobs.database import FINAL, JobRow

DAY_S = 86_400.0
SWEEP_INTERVAL_S = 600.0
"""Between two sweeps."""
AFTER_START_S = 3600.0
"""No run expires before: the clock of a machine that was just switched on may be wrong."""
AFTER_JUMP_S = DAY_S
"""No run expires by age for so long after the clock jumped."""
KEPT_SHARE = 0.5
"""Fraction of the disk quota that kept runs may use, so that new runs always find space."""
JUMP_S = 300.0
"""A wall clock that drifts from the monotonic clock by more has jumped."""


@dataclass(frozen=True)
class Limits:
    """Retention limits; None is unlimited."""

    keep_days: float | None = None
    """Days that a run is kept after it has ended."""
    max_bytes: int | None = None
    """Disk quota of all runs together."""


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep."""

    expired: tuple[str, ...]
    """Ids of the runs to delete."""
    over_quota: bool
    """The other runs alone exceed the disk quota."""


class Sweeper:
    """Decides which runs expire; deletes nothing itself."""

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._clock, self._steady = limits, clock, steady
        self._offset = clock() - steady()
        self._trusted_from = steady() + AFTER_START_S
        self._next_sweep = steady()

    def is_due(self) -> bool:
        """Whether a sweep is due, at most once per interval."""
        if self._limits == Limits() or self._steady() < self._next_sweep:
            return False
        self._next_sweep = self._steady() + SWEEP_INTERVAL_S
        return True

    def sweep(self, rows: Sequence[JobRow], size: Callable[[str], int], is_kept: Callable[[str], bool]) -> Sweep:
        """Decides which of all runs expire now.

        Args:
            rows: all runs.
            size: run id -> bytes of its folder.
            is_kept: run id -> whether it is exempt.
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
            return Sweep(tuple(expired), False)
        sizes = {row.job_id: size(row.job_id) for row in rows}
        total = sum(bytes_ for job_id, bytes_ in sizes.items() if job_id not in expired)
        for row in removable:
            if total > self._limits.max_bytes and row.job_id not in expired:
                expired.append(row.job_id)
                total -= sizes[row.job_id]
        return Sweep(tuple(expired), total > self._limits.max_bytes)

    def _trusted_now(self) -> float | None:
        """The wall clock; None while it is not trusted."""
        offset = self._clock() - self._steady()
        if abs(offset - self._offset) > JUMP_S:
            self._trusted_from = self._steady() + AFTER_JUMP_S
        self._offset = offset
        return self._clock() if self._steady() >= self._trusted_from else None


def refuse_to_keep(kept_bytes: int, max_bytes: float) -> None:
    """Raises `RunError` when kept runs would exceed their share of the disk quota."""
    if kept_bytes > max_bytes:
        raise RunError(
            f"This run cannot be kept: kept runs would then use {kept_bytes / 1e9:.1f} GB, and this server allows "
            f"{max_bytes / 1e9:.1f} GB. Stop keeping another run, or download this one."
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
