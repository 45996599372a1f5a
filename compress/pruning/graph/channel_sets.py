"""Sets of channels that are kept or removed together, and the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["answer", "asked", "size", "structure"]
"""What keeps channels: they are the model's output, the user, their number, or what the network does with them."""


@dataclass
class ChannelSet:
    """Channels that are kept or removed together, and the layers that have them as their output channels."""

    channels: int
    layers: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why these layers share their channels."""
    unit: int = 1
    """Number of neighbouring channels that are kept or removed together."""
    blocks: int = 1
    """Number of equal parts of the channels that each keep the same number."""
    shape_reasons: list[str] = field(default_factory=list)
    """Why `unit` or `blocks` is more than one."""
    frozen_reason: str | None = None
    """Why no channel may be removed; None where channels may."""
    frozen_kind: Kind = "structure"
    frozen_layers: tuple[str, ...] = ()
    """The layers that `frozen_reason` speaks of; the others only share their channels."""

    def add_reason(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def add_shape_reason(self, reason: str) -> None:
        if reason not in self.shape_reasons:
            self.shape_reasons.append(reason)


@dataclass(frozen=True)
class GroupedConv:
    """A grouped convolution, and the ids of the sets of its input and output channels."""

    layer: str
    groups: int
    source: int | None
    result: int


class ChannelSets:
    """Union-find over sets of channels."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._sets: list[ChannelSet] = []

    def new(
        self, channels: int, *, layer: str | None = None, frozen: str | None = None, kind: Kind = "structure"
    ) -> int:
        """A set of its own, frozen from the start where a reason is given; returns its id."""
        self._parent.append(len(self._parent))
        self._sets.append(ChannelSet(channels, [layer] if layer else []))
        set_id = len(self._parent) - 1
        if frozen is not None:
            self.freeze(set_id, frozen, kind=kind)
        return set_id

    def root(self, set_id: int) -> int:
        while self._parent[set_id] != set_id:
            self._parent[set_id] = self._parent[self._parent[set_id]]
            set_id = self._parent[set_id]
        return set_id

    def __getitem__(self, set_id: int) -> ChannelSet:
        return self._sets[self.root(set_id)]

    def roots(self) -> list[int]:
        return [index for index, parent in enumerate(self._parent) if index == parent]

    def join(self, first: int, second: int, reason: str) -> None:
        """Unite two sets of the same size; where one of them is frozen, both are."""
        into, gone = sorted((self.root(first), self.root(second)))
        one, other = self._sets[into], self._sets[gone]
        if one.layers and other.layers:  # a parameter only follows the layer that it meets
            one.add_reason(reason)
        if into == gone:
            return
        self._parent[gone] = into
        one.layers += other.layers
        for text in other.reasons:
            one.add_reason(text)
        for text in other.shape_reasons:
            one.add_shape_reason(text)
        if one.frozen_reason is None:
            one.frozen_reason, one.frozen_kind = other.frozen_reason, other.frozen_kind
            one.frozen_layers = other.frozen_layers
        one.unit, one.blocks = math.lcm(one.unit, other.unit), math.lcm(one.blocks, other.blocks)

    def add_layer(self, set_id: int, layer: str, reason: str) -> None:
        """Give a set another layer, whose output channels are the set's."""
        self[set_id].layers.append(layer)
        self[set_id].add_reason(reason)

    def require_units(self, set_id: int, unit: int, reason: str) -> None:
        """Rule that `unit` neighbouring channels are kept or removed together."""
        channel_set = self[set_id]
        channel_set.unit = math.lcm(channel_set.unit, unit)
        channel_set.add_shape_reason(reason)

    def require_blocks(self, set_id: int, blocks: int, reason: str) -> None:
        """Rule that each of `blocks` equal parts of the channels keeps the same number."""
        channel_set = self[set_id]
        channel_set.blocks = math.lcm(channel_set.blocks, blocks)
        channel_set.add_shape_reason(reason)

    def freeze(
        self, set_id: int, reason: str, layers: Iterable[str] | None = None, *, kind: Kind = "structure"
    ) -> None:
        """Rule that no channel of this set is removed; the first reason is the one that is reported.

        Args:
            layers: those that the reason speaks of; None for all of the set.
        """
        channel_set = self[set_id]
        if channel_set.frozen_reason is None:
            channel_set.frozen_reason, channel_set.frozen_kind = reason, kind
            channel_set.frozen_layers = tuple(channel_set.layers if layers is None else layers)
