"""Sets of channels that stay or go together, and the reasons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class ChannelSet:
    """Channels that stay or go together, the layers that have them, and why they go together."""

    channels: int
    layers: list[str] = field(default_factory=list)
    bonds: list[str] = field(default_factory=list)
    """Why these layers go together, in a user's words."""
    kept: str | None = None
    """Why nothing may be removed, in a user's words."""
    kept_layers: tuple[str, ...] = ()
    """The layers that `kept` is said of; the others only go together with them."""
    unit: int = 1
    """Neighbouring channels that stay or go together."""
    blocks: int = 1
    """Equal parts of the channels which each keep the same number."""


class ChannelSets:
    """Union-find over sets of channels."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._sets: list[ChannelSet] = []

    def new(self, channels: int, *, layer: str | None = None, kept: str | None = None) -> int:
        self._parent.append(len(self._parent))
        layers = [layer] if layer else []
        self._sets.append(ChannelSet(channels, layers, kept=kept, kept_layers=tuple(layers) if kept else ()))
        return len(self._parent) - 1

    def root(self, set_id: int) -> int:
        while self._parent[set_id] != set_id:
            self._parent[set_id] = self._parent[self._parent[set_id]]
            set_id = self._parent[set_id]
        return set_id

    def __getitem__(self, set_id: int) -> ChannelSet:
        return self._sets[self.root(set_id)]

    def roots(self) -> list[int]:
        return [index for index, parent in enumerate(self._parent) if index == parent]

    def join(self, first: int, second: int, bond: str) -> None:
        """Unite two sets of the same size; what keeps one keeps both."""
        into, gone = sorted((self.root(first), self.root(second)))
        one, other = self._sets[into], self._sets[gone]
        if bond not in one.bonds and one.layers and other.layers:  # a parameter only follows the layer that it meets
            one.bonds.append(bond)
        if into == gone:
            return
        self._parent[gone] = into
        one.layers += other.layers
        one.bonds += [reason for reason in other.bonds if reason not in one.bonds]
        if one.kept is None:
            one.kept, one.kept_layers = other.kept, other.kept_layers
        one.unit, one.blocks = math.lcm(one.unit, other.unit), math.lcm(one.blocks, other.blocks)

    def whole_units(self, set_id: int, unit: int, bond: str) -> None:
        """Rule that `unit` neighbouring channels stay or go together."""
        found = self[set_id]
        found.unit = math.lcm(found.unit, unit)
        if bond not in found.bonds:
            found.bonds.append(bond)

    def keep(self, set_id: int, reason: str, layers: Iterable[str] | None = None) -> None:
        """Rule that nothing of this set is removed; the first reason given is the one told."""
        found = self[set_id]
        if found.kept is None:
            found.kept, found.kept_layers = reason, tuple(found.layers if layers is None else layers)
