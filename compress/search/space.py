"""What a search may choose from. Every ratio is one that leaves whole multiples of channels, so that no two differ in vain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from compress.pruning import Group
from compress.search.candidate import Candidate

LARGEST_RATIO = 0.9
"""No group loses more than this share, or it would be the bottleneck of everything behind it."""


@dataclass(frozen=True)
class Space:
    """The choices of a search."""

    groups: tuple[Group, ...]
    """Groups of layers whose ratio may be chosen, in the order of the forward pass."""
    multiple: int
    """Kept channels are multiples of this."""
    _: KW_ONLY
    largest: float = LARGEST_RATIO
    pruners: tuple[str, ...] = ("l1-norm",)
    """The first one is the base request's."""
    quantizers: tuple[str, ...] = ("qat",)
    sensitive: tuple[str, ...] = ()
    """Layers that may get `wide_bits`, the one that bears few bits worst first; a candidate widens the first n of them."""
    wide_bits: str = "32"
    """As in `Request.layer_bits`."""

    def choices(self, group: Group) -> tuple[float, ...]:
        """Every ratio that the group can have, ascending from 0."""
        step = math.lcm(self.multiple, group.unit * group.blocks)
        kept = range(step * (group.channels_before // step), 0, -step)
        ratios = (1 - count / group.channels_before for count in kept if count < group.channels_before)
        return (0.0, *(round(ratio, 6) for ratio in ratios if ratio <= self.largest))

    def nearest(self, group: Group, ratio: float) -> float:
        """The choice nearest to `ratio`; halfway, the one that keeps more."""
        return min(self.choices(group), key=lambda choice: (abs(choice - ratio), choice))

    def candidate(
        self,
        ratios: Mapping[str, float],
        *,
        widened: int = 0,
        pruner: str | None = None,
        quantizer: str | None = None,
    ) -> Candidate:
        """The candidate whose ratios are nearest to those wished for; a group that is not named stays whole.

        Args:
            ratios: lead layer -> share of its channels to remove.
            widened: how many of the sensitive layers get `wide_bits`; none where nothing is quantized.
        """
        chosen = {group: self.nearest(group, ratios.get(group.layers[0], 0.0)) for group in self.groups}
        named = tuple((layer, ratio) for group, ratio in chosen.items() for layer in group.layers)
        quantizer = quantizer or self.quantizers[0]
        wide = () if quantizer == "none" else tuple((name, self.wide_bits) for name in self.sensitive[:widened])
        return Candidate(named, wide, pruner or self.pruners[0], quantizer)

    def uniform(self, ratio: float, *, pruner: str | None = None, quantizer: str | None = None) -> Candidate:
        """Every group loses the same share, as near as its channels allow."""
        wished = {group.layers[0]: ratio for group in self.groups}
        return self.candidate(wished, pruner=pruner, quantizer=quantizer)
