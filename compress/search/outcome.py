"""What is measured of a candidate. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """A structure on the runtime; its weights do not matter."""

    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    file_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What one candidate is like without training."""

    accuracy: float
    """Share of right answers, 0..1, on images held out from the training images; of agreement with the original where
    images have no labels. 0 where `stopped` says that it was not scored."""
    latency_ms: float
    """p50 of the chosen runtime, batch 1, the request's threads; scaled by how the dense model, raced beside it, has
    drifted since it was first measured."""
    parameters: int
    macs: int
    file_bytes: int
    """Of the ONNX file that the chosen runtime loads."""
    seconds: float
    """To make and measure it."""
    latency_low_ms: float
    """Lower and upper quartile of the single calls, scaled as the median."""
    latency_high_ms: float
    n_images: int
    """Images behind `accuracy`."""
    stopped: str | None = None
    """Why it was not scored; None for a complete measurement."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
