"""Latency through the real runtime: contenders take turns in bursts, every sample is kept.

How a number is taken decides the number. Calls of many models alternated one by one find the caches cold each time;
one model after the other measures the machine's drift. Here every contender runs a short burst, so that its weights
are warm as they are in use, and the bursts of all contenders alternate, so that drift hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def race(
    contenders: Sequence[Callable[[], object]],
    *,
    rounds: int = 8,
    burst_ms: float = 120.0,
    warm_calls: int = 3,
    max_calls: int = 60,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Timing]:
    """Times each contender (a call that runs one batch to its end) in `rounds` bursts, contenders in turn.

    A burst starts with `warm_calls` untimed calls, then lasts `burst_ms` or `max_calls`, whichever is shorter, and
    holds at least three timed calls. The order turns by one place each round, so nobody always follows the same neighbour.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    for round_number in range(rounds):
        for place in range(len(contenders)):
            turn = (place + round_number) % len(contenders)
            samples[turn] += _burst(contenders[turn], burst_ms, warm_calls, max_calls, clock)
            progress((round_number + (place + 1) / len(contenders)) / rounds)
    return [Timing(tuple(values)) for values in samples]


def _burst(
    call: Callable[[], object], burst_ms: float, warm_calls: int, max_calls: int, clock: Callable[[], float]
) -> list[float]:
    for _ in range(warm_calls):
        call()
    samples: list[float] = []
    while len(samples) < max_calls and (len(samples) < 3 or sum(samples) < burst_ms):
        start = clock()
        call()
        samples.append((clock() - start) * 1000)
    return samples
