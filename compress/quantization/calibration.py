"""Post-training calibration: from images through the float model to the range of every quantization point.

| estimator    | the range is                                                                                     |
|--------------|--------------------------------------------------------------------------------------------------|
| `average`    | the mean over batches of each batch's extremes; one odd image moves it little                      |
| `minmax`     | the extremes over all images: nothing is clipped                                                    |
| `percentile` | clipped so that 99.99 % of the magnitudes lie inside                                                |
| `mse`        | clipped where rounding and clipping together lose least, as mean squared error (Banner et al. 2019, |
|              | "Post training 4-bit quantization of convolutional networks", section 3)                            |
| `entropy`    | clipped where the distribution on the grid is nearest to the original's, as Kullback-Leibler        |
|              | divergence (Migacz 2017, "8-bit inference with TensorRT")                                           |

The last three read a histogram of magnitudes that grows by doubling its range, so the images are walked through once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from compress.errors import QuantizationError
from compress.quantization.prepare import quantization_points

Estimator = Literal["average", "minmax", "percentile", "mse", "entropy"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

BINS = 2048
PERCENTILE = 0.9999
_CANDIDATES = 100
_FINEST = 128
"""Bins: the narrowest threshold that the entropy estimator tries, as in the presentation it comes from."""


def calibrate(
    prepared: nn.Module, images: Iterable[Tensor], estimator: Estimator, bits: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The range (lowest, highest; scalars float32) of each quantization point of a prepared model in eval mode.

    Args:
        images: batches, float32 [N, 3, H, W], normalised.
        bits: of each point; estimators that clip weigh rounding against clipping.

    Raises:
        QuantizationError: there is no image, or a tensor is not finite; names the layer.
    """
    points = quantization_points(prepared)
    observers = {name: _Observer(keeps_histogram=estimator not in ("average", "minmax")) for name in points}
    hooks = [
        point.register_forward_pre_hook(lambda _, inputs, observer=observers[name]: observer.observe(inputs[0]))
        for name, point in points.items()
    ]
    try:
        with torch.no_grad():
            for batch in images:
                prepared(batch)
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {}
    for name, point in points.items():
        levels = 2 ** (bits[name] - (0 if point.non_negative and bits[name] < 8 else 1)) - 1
        ranges[name] = observers[name].range(point.source, estimator, levels)
    return ranges


class _Observer:
    """Extremes of each batch and, when asked for, a histogram of magnitudes."""

    def __init__(self, keeps_histogram: bool) -> None:
        self.extremes: list[tuple[Tensor, Tensor]] = []
        self.histogram = Histogram() if keeps_histogram else None

    def observe(self, values: Tensor) -> None:
        low, high = values.aminmax()
        self.extremes.append((low, high))
        if self.histogram is not None and bool(torch.isfinite(low) & torch.isfinite(high)):
            self.histogram.add(values)

    def range(self, source: str, estimator: Estimator, levels: int) -> tuple[Tensor, Tensor]:
        if not self.extremes:
            raise QuantizationError(
                f"{source}: no calibration image reached this layer, so its range is unknown; give at least one batch "
                "of images."
            )
        lows, highs = (torch.stack(values) for values in zip(*self.extremes, strict=True))
        if estimator == "average":
            return lows.mean(), highs.mean()
        low, high = lows.amin(), highs.amax()
        if self.histogram is None or self.histogram.limit == 0:
            return low, high
        threshold = torch.tensor(_THRESHOLDS[estimator](self.histogram, levels))
        return low.clamp(min=-threshold), high.clamp(max=threshold)


class Histogram:
    """Counts of magnitudes in `BINS` bins from 0 to `limit`; a larger value doubles the limit and halves the detail."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        """0 while every value was 0."""

    def add(self, values: Tensor) -> None:
        """Any shape, finite."""
        magnitudes = values.detach().abs().flatten().float()
        largest = float(magnitudes.max())
        if largest == 0:
            return
        if self.limit == 0:
            self.limit = largest
        while largest > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros(BINS // 2, dtype=torch.float64)])
            self.limit *= 2
        # Zeros say nothing about where to clip, and behind a ReLU they are half of all values.
        self.counts += torch.histc(magnitudes[magnitudes > 0], BINS, 0, self.limit).double()

    @property
    def centres(self) -> Tensor:
        """Of the bins: float64, shape [BINS], between 0 and `limit`."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)


def _percentile(histogram: Histogram, levels: int) -> float:
    shares = histogram.counts.cumsum(0) / histogram.counts.sum()
    return float((torch.searchsorted(shares, PERCENTILE) + 1) * histogram.limit / BINS)


def _least_squares(histogram: Histogram, levels: int) -> float:
    errors = {}
    for step in range(1, _CANDIDATES + 1):
        threshold = histogram.limit * step / _CANDIDATES
        scale = threshold / levels
        moved = (histogram.centres / scale).round().clamp(max=levels) * scale
        errors[threshold] = float(((moved - histogram.centres).square() * histogram.counts).sum())
    return min(errors, key=errors.__getitem__)


def _least_divergence(histogram: Histogram, levels: int) -> float:
    """Bins beyond the threshold are counted into the last one; a grid with more levels than bins changes nothing."""
    divergences = {}
    for kept in range(max(_FINEST, levels + 1), BINS + 1, 8):
        reference = histogram.counts[:kept].clone()
        coarse = _on_grid(reference, levels + 1)
        reference[-1] += histogram.counts[kept:].sum()
        present = reference > 0
        p, q = reference / reference.sum(), coarse / coarse.sum()
        divergences[kept] = float((p[present] * (p[present] / q[present].clamp(min=1e-12)).log()).sum())
    return min(divergences, key=divergences.__getitem__) * histogram.limit / BINS


def _on_grid(counts: Tensor, levels: int) -> Tensor:
    """The counts of each of `levels` equal parts, spread evenly over those bins of it that hold any."""
    part = torch.arange(len(counts)) * levels // len(counts)
    present = (counts > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, part, counts)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, part, present)
    return present * (sums / bins.clamp(min=1))[part]


_THRESHOLDS: dict[str, Callable[[Histogram, int], float]] = {
    "percentile": _percentile,
    "mse": _least_squares,
    "entropy": _least_divergence,
}


def weight_thresholds(weight: Tensor, levels: int, estimator: Estimator) -> Tensor:
    """The largest magnitude of each output channel's grid, float32 [channels], above or equal to 0.

    `mse` clips; the other estimators keep every weight.

    Args:
        weight: float32 [channels, ...].
        levels: positive codes of the grid.
    """
    magnitudes = weight.detach().flatten(1).abs()
    largest = magnitudes.amax(1)
    if estimator != "mse":
        return largest
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(_CANDIDATES // 4, _CANDIDATES + 1):
        threshold = largest * (step / _CANDIDATES)
        scale = (threshold / levels).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        error = ((magnitudes / scale).round().clamp(max=levels) * scale - magnitudes).square().sum(1)
        best, least = torch.where(error < least, threshold, best), torch.minimum(error, least)
    return best
