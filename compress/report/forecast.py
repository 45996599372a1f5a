"""What was forecast of a model before it was trained, and what came true.

A forecast is measured: `compress.search.front` makes the model at several sparsities without training and times each on the
runtime. Between two of them everything is taken as linear in the sparsity.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import RequestError, RunError
from compress.files import write_text
from compress.report import Came, Expected, Forecast, Verdict
from compress.request import Request

FILE = "forecast.json"
SAME = (
    "model", "checkpoint", "data", "input_size", "mean", "std", "pruner", "quantizer", "weight_bits", "activation_bits",
    "channel_multiple", "ranking", "max_layer_sparsity", "layer_sparsity", "layer_bits", "exclude", "config_list",
    "quantization_config_list", "first_last_bits", "calibration", "threads",
)  # fmt: skip
"""Of a run and the forecast for it. Sparsity may differ, and how long and how a model is trained."""


class Point(BaseModel):
    """The model at one sparsity, without training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float
    accuracy: float
    """Share of right answers, 0..1, on images held out from the training images."""
    points_lost: float
    """Percentage points below the original on the same images, and a 95 % interval of it."""
    points_lost_low: float
    points_lost_high: float
    latency_ms: float
    speedup: float
    """Over the fastest real fp32 of the original; the quartiles of the single calls give the other two."""
    speedup_low: float
    speedup_high: float
    file_bytes: int
    parameters: int
    macs: int


class Front(BaseModel):
    """What forecast.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: dict[str, Any]
    runtime: str
    n_images: int
    dense_accuracy: float
    dense_latency_ms: float
    points: tuple[Point, ...]
    """By sparsity, ascending."""

    @classmethod
    def from_file(cls, path: Path) -> Front:
        """Raises `RunError` when the file is missing or no forecast."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            raise RunError(
                f"{path} is not a forecast. Give the {FILE} that `python -m compress forecast --out DIR` leaves in DIR."
            ) from None

    def at(self, request: Request) -> Expected:
        """What is expected of a run.

        Raises:
            RequestError: the forecast is of something else, or the sparsity lies outside of what was measured.
        """
        asked = request.model_dump(mode="json")
        for name in SAME:
            if asked[name] != self.request[name]:
                raise RequestError(name, asked[name], f"{self.request[name]!r}, as in the forecast, or no forecast")
        lowest, highest = self.points[0].sparsity, self.points[-1].sparsity
        if not lowest <= request.sparsity <= highest:
            allowed = f"a value from {lowest:g} to {highest:g}, which the forecast covers, or no forecast"
            raise RequestError("sparsity", request.sparsity, allowed)
        names = Expected.model_fields.keys() & Point.model_fields.keys()
        values = {name: self._between(name, request.sparsity) for name in names}
        return Expected(**values, runtime=self.runtime, n_images=self.n_images)

    def _between(self, name: str, sparsity: float) -> float:
        above = next(number for number, point in enumerate(self.points) if point.sparsity >= sparsity)
        high, low = self.points[above], self.points[max(0, above - 1)]
        span = high.sparsity - low.sparsity
        share = (sparsity - low.sparsity) / span if span else 1.0
        values: tuple[float, float] = getattr(low, name), getattr(high, name)
        return values[0] + share * (values[1] - values[0])


def difference(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float, float]:
    """first - second of two shares, with a 95 % interval.

    Args: (share, low, high) with each one's Wilson interval; Newcombe's hybrid score method (1998, method 10) joins them. It
    takes the two as independent, so on the same images it is wider than need be.
    """
    (p1, l1, u1), (p2, l2, u2) = first, second
    return (p1 - p2, p1 - p2 - math.hypot(p1 - l1, u2 - p2), p1 - p2 + math.hypot(u1 - p1, p2 - l2))


def keep(expected: Expected, folder: Path) -> None:
    """In a run's folder, where its report looks for it."""
    write_text(folder / FILE, expected.model_dump_json(indent=1) + "\n")


def came_true(folder: Path, verdict: Verdict, file_bytes: int) -> Forecast | None:
    """What was expected of the run in `folder` beside what it reached; None without a forecast."""
    path = folder / FILE
    if not path.exists():
        return None
    expected = Expected(**json.loads(path.read_text(encoding="utf-8")))
    came = Came(
        points_lost=verdict.accuracy_drop_points, speedup=verdict.speedup_vs_fastest_fp32, file_bytes=file_bytes
    )
    return Forecast(expected=expected, came=came, text=_words(expected, came, verdict.runtime))


def _words(expected: Expected, came: Came, runtime: str | None) -> str:
    said = (
        f"Forecast before training: {expected.points_lost:.1f} points lost ({expected.points_lost_low:.1f} to "
        f"{expected.points_lost_high:.1f}) on {expected.n_images:,} held-out images, {expected.speedup:.1f}x faster "
        f"({expected.speedup_low:.1f} to {expected.speedup_high:.1f}) on {expected.runtime}, {expected.file_bytes / 1e6:.2f} MB."
    )
    true = []
    if came.points_lost is not None:
        true.append(f"{came.points_lost:.1f} points lost{_beside(came.points_lost, expected, 'points_lost')}")
    if came.speedup is not None:
        where = "" if runtime == expected.runtime else f" on {runtime}"
        true.append(f"{came.speedup:.1f}x faster{where}{_beside(came.speedup, expected, 'speedup')}")
    true.append(f"{came.file_bytes / 1e6:.2f} MB")
    return f"{said} After training: {', '.join(true)}."


def _beside(value: float, expected: Expected, name: str) -> str:
    low, high = getattr(expected, f"{name}_low"), getattr(expected, f"{name}_high")
    return (
        " (as forecast)"
        if low <= value <= high
        else " (less than forecast)"
        if value < low
        else " (more than forecast)"
    )
