"""Detects stalled runs: neither processor time nor events for a long time."""

from __future__ import annotations

import time
from collections.abc import Callable

from compress import processes

STALL_S = 900.0
"""A download from a slow server uses some processor time all along; a stopped or deadlocked process does not."""
SAMPLES = 30
"""Samples taken of a run within the time after which it counts as stalled."""
IDLE_TICKS = 2
"""Clock ticks between two samples that count as idle: a thread that only wakes up to read a clock."""


class StallDetector:
    """Samples the activity of attempts. `clock` must be monotonic."""

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._samples: dict[processes.Child, tuple[float, float, int, int]] = {}
        """Attempt -> time of its last activity, time of the sample, bytes of events, clock ticks of processor time."""
        self.message = (
            f"The run was stopped because it neither computed nor reported progress for {stall_s / 60:g} minutes. Resume it: "
            "finished stages are not repeated."
        )

    def is_stalled(self, child: processes.Child, events_bytes: int) -> bool:
        """Takes a sample when one is due; True when the attempt was inactive for the whole stall time."""
        now = self._clock()
        if child not in self._samples:
            self._samples[child] = (now, now, events_bytes, processes.cpu_ticks(child))
            return False
        active, sampled, events_before, ticks_before = self._samples[child]
        if now - sampled < self._stall_s / SAMPLES:
            return False
        ticks = processes.cpu_ticks(child)
        if events_bytes != events_before or ticks - ticks_before > IDLE_TICKS or ticks < ticks_before:
            active = now
        self._samples[child] = (active, now, events_bytes, ticks)
        return now - active >= self._stall_s

    def forget(self, child: processes.Child) -> None:
        self._samples.pop(child, None)
