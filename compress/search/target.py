"""What a search has to reach, and how far a measured candidate is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.errors import RequestError
from compress.search.outcome import Outcome

POINTS_PER_DOUBLING = 100.0
"""Points of accuracy that missing a limit by a factor of two weighs: no gain in accuracy makes up for a missed limit."""


@dataclass(frozen=True)
class Target:
    """At least one of the limits on speed and size has to be given."""

    max_accuracy_drop: float = 1.0
    """Points, 0..100, against the dense model; held by the trained run, on its test images."""
    min_speedup: float | None = None
    """Over the fastest real fp32 of the dense model, one image at a time."""
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    """Of the smallest deployable file; 1 MB is 10^6 bytes."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_accuracy_drop <= 100:
            raise RequestError("max_accuracy_drop", self.max_accuracy_drop, "a number of points from 0 to 100")
        for field in ("min_speedup", "max_latency_ms", "max_size_mb"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(field, value, "a number above 0")
        if self.min_speedup is self.max_latency_ms is self.max_size_mb is None:
            raise RequestError("min_speedup", None, "a limit: give --min-speedup, --max-latency-ms or --max-size-mb")

    def excess(self, latency_ms: float, file_bytes: int, dense: Outcome) -> float:
        """The largest of measured / allowed over all limits on speed and size: at most 1 keeps to them."""
        ratios = []
        if self.min_speedup is not None:
            ratios.append(latency_ms * self.min_speedup / dense.latency_ms)
        if self.max_latency_ms is not None:
            ratios.append(latency_ms / self.max_latency_ms)
        if self.max_size_mb is not None:
            ratios.append(file_bytes / 1e6 / self.max_size_mb)
        return max(ratios)

    def score(self, outcome: Outcome, dense: Outcome) -> float:
        """To be maximised: points of accuracy gained or lost before training, far less where a limit is missed.

        The limit on accuracy is no part of it: training brings accuracy back, and the most accurate start is the best.
        """
        missed = max(0.0, math.log2(self.excess(outcome.latency_ms, outcome.file_bytes, dense)))
        return 100 * (outcome.accuracy - dense.accuracy) - POINTS_PER_DOUBLING * missed
