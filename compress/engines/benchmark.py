"""Latency through the real runtime: contenders take turns in bursts, every sample is kept.

How a number is taken decides the number. Calls of many models alternated one by one find the caches cold each time;
one model after the other measures the machine's drift. Here every contender runs a short burst, so that its weights
are warm as they are in use, and the bursts of all contenders alternate, so that drift hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

NOISY_ABOVE = 0.10
"""A measurement whose interquartile range exceeds this share of its median is flagged."""


@dataclass(frozen=True)
class Timing:
    """Seconds-free: all in milliseconds per batch."""

    samples_ms: tuple[float, ...]

    @property
    def p50_ms(self) -> float:
        return self._percentile(50)

    @property
    def p90_ms(self) -> float:
        return self._percentile(90)

    @property
    def p99_ms(self) -> float:
        return self._percentile(99)

    @property
    def noisy(self) -> bool:
        return self._percentile(75) - self._percentile(25) > NOISY_ABOVE * self.p50_ms

    def _percentile(self, q: float) -> float:
        return float(np.percentile(self.samples_ms, q))


@dataclass(frozen=True)
class Pace:
    """How long a burst is: `warm_calls` untimed calls, then calls for `burst_ms` or `max_calls`, whichever ends first, but
    at least three."""

    burst_ms: float = 120.0
    warm_calls: int = 3
    max_calls: int = 60


class Contender(Protocol):
    """Runs one batch again and again where it lives, in a process of its own for example."""

    def burst(self, pace: Pace) -> list[float]:
        """Milliseconds of each timed call."""


def race(
    contenders: Sequence[Contender | Callable[[], object]],
    *,
    rounds: int = 8,
    burst_ms: float = Pace.burst_ms,
    warm_calls: int = Pace.warm_calls,
    max_calls: int = Pace.max_calls,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Timing]:
    """Times each contender in `rounds` bursts of the same `Pace`, contenders in turn.

    The order turns by one place each round, so nobody always follows the same neighbour.

    Args:
        contenders: a plain call runs one batch to its end, here.
        clock: seconds, for plain calls.
    """
    pace = Pace(burst_ms, warm_calls, max_calls)
    samples: list[list[float]] = [[] for _ in contenders]
    for round_number in range(rounds):
        for place in range(len(contenders)):
            turn = (place + round_number) % len(contenders)
            contender = contenders[turn]
            samples[turn] += contender.burst(pace) if hasattr(contender, "burst") else burst(contender, pace, clock)
            progress((round_number + (place + 1) / len(contenders)) / rounds)
    return [Timing(tuple(values)) for values in samples]


def burst(call: Callable[[], object], pace: Pace, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Milliseconds of each timed call of one burst."""
    for _ in range(pace.warm_calls):
        call()
    samples: list[float] = []
    while len(samples) < pace.max_calls and (len(samples) < 3 or sum(samples) < pace.burst_ms):
        start = clock()
        call()
        samples.append((clock() - start) * 1000)
    return samples
