"""Tells a run that hangs from one that works: it neither computes nor reports anything for a long time."""

from __future__ import annotations

import time
from collections.abc import Callable

from compress import processes

STALL_S = 900.0
"""A download that waits for a slow server computes a little all the time; a stopped or deadlocked process does not."""
LOOKS = 30
"""How often a run is looked at within the time after which it counts as hanging."""
NOTHING_TICKS = 2
"""Processor time that counts as none between two looks: a thread that only wakes up to look at a clock."""


class Watch:
    """What runs had done when they were last looked at. The clock is one that nobody can set."""

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._seen: dict[processes.Child, tuple[float, float, int, int]] = {}
        """Attempt -> when it last did something, when it was looked at, its events in bytes, its ticks of processor time."""
        minutes = stall_s / 60
        self.sentence = (
            f"The run neither computed nor reported anything for {minutes:g} minutes and was ended. Resume it: finished "
            "stages are not repeated."
        )

    def idle(self, child: processes.Child, events_bytes: int) -> bool:
        """Whether the run has done nothing for so long that it hangs."""
        now = self._clock()
        if child not in self._seen:
            self._seen[child] = (now, now, events_bytes, processes.cpu_ticks(child))
            return False
        active, looked, events_before, ticks_before = self._seen[child]
        if now - looked < self._stall_s / LOOKS:
            return False
        ticks = processes.cpu_ticks(child)
        if events_bytes != events_before or ticks - ticks_before > NOTHING_TICKS or ticks < ticks_before:
            active = now
        self._seen[child] = (active, now, events_bytes, ticks)
        return now - active >= self._stall_s

    def forget(self, child: processes.Child) -> None:
        self._seen.pop(child, None)
