"""Along which dimension a tensor carries which channels, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from compress.pruning.graph.channel_sets import ChannelSets


@dataclass(frozen=True)
class Part:
    """A run of channels of one set.

    In a flattened tensor each channel takes `span` neighbouring features; behind a pixel shuffle 1 / span neighbouring
    channels make one feature.
    """

    set_id: int
    channels: int
    span: Fraction = Fraction(1)

    @property
    def features(self) -> int:
        return int(self.channels * self.span)


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor carries these channels, in this order."""

    dim: int
    parts: tuple[Part, ...]

    @property
    def boundaries(self) -> tuple[tuple[int, Fraction], ...]:
        return tuple((part.channels, part.span) for part in self.parts)

    def spanned(self, factor: Fraction) -> Axis:
        """The same channels, each taking `factor` times as many features."""
        return replace(self, parts=tuple(replace(part, span=part.span * factor) for part in self.parts))


def kept_features(axis: Axis | None, sets: ChannelSets, kept: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """Which features along `axis.dim` are kept, bool of shape [features] on the CPU; None where all are.

    Args:
        kept: root of a channel set -> which of its channels are kept, bool of shape [channels].
    """
    if axis is None:
        return None
    roots = [sets.root(part.set_id) for part in axis.parts]
    if not any(root in kept for root in roots):
        return None
    rows = []
    for root, part in zip(roots, axis.parts, strict=True):
        channels = kept.get(root, torch.ones(part.channels, dtype=torch.bool)).cpu()
        one = part.span.denominator
        rows.append(channels[::one] if one > 1 else channels.repeat_interleave(part.span.numerator))
    return torch.cat(rows)
