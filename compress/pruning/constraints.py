"""What a user wants removed from which layer, by layer name: one form for ratios, exclusions and config lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from compress.errors import RequestError, such_as

Ranking = Literal["per-group", "global"]


@dataclass(frozen=True)
class Constraints:
    """What is asked of the layers; a group of layers takes what is asked of its members."""

    sparsity: float
    """Fraction of output channels that goes where `ratios` says nothing else; 0 < sparsity < 1."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Layer -> its own fraction; 0 keeps it whole."""
    chosen: frozenset[str] | None = None
    """The layers that `sparsity` is meant for; None: all."""
    excluded: tuple[str, ...] = ()
    ranking: Ranking = "per-group"
    cap: float | None = None
    """With global ranking, the largest fraction that any layer loses."""
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that the user wrote -> their layers; refused when nothing can go from any of them."""
    where: str = "layer_sparsity"
    """The field of the request that a refusal of a ratio names."""

    def ratio(self, layers: Sequence[str]) -> float | None:
        """The fraction asked of a group; None when nothing is asked of it.

        Raises:
            RequestError: its members are asked for different fractions.
        """
        asked = {layer: self.ratios[layer] for layer in layers if layer in self.ratios}
        if len(set(asked.values())) > 1:
            first = next(iter(asked))
            second = next(layer for layer in asked if asked[layer] != asked[first])
            raise RequestError(
                self.where,
                f"{first}={asked[first]:g} and {second}={asked[second]:g}",
                "one fraction for both, because they lose the same channels",
            )
        if asked:
            return next(iter(asked.values()))
        return self.sparsity if self.chosen is None or self.chosen & set(layers) else None

    def competes(self, layers: Sequence[str]) -> bool:
        """Whether a group takes part in the global ranking: its own fraction takes it out."""
        return self.ranking == "global" and not any(layer in self.ratios for layer in layers)


def by_name(
    layers: Sequence[str],
    sparsity: float,
    exclude: Sequence[str],
    layer_sparsity: Mapping[str, float],
    **others: object,
) -> Constraints:
    """Constraints from names of layers or of modules with layers inside; the longer of two names wins.

    Raises:
        RequestError: a name that has no such layer, or a fraction out of range.
    """
    ratios: dict[str, float] = {}
    named = {}
    for name, ratio in sorted(layer_sparsity.items(), key=lambda item: item[0].count(".")):
        if not 0 <= ratio < 1:
            raise RequestError("layer_sparsity", f"{name}={ratio:g}", "a fraction from 0 to below 1")
        named[name] = tuple(layers_inside(layers, name, "layer_sparsity"))
        ratios |= dict.fromkeys(named[name], ratio)
    excluded = tuple(layer for name in exclude for layer in layers_inside(layers, name, "exclude"))
    named = {name: inside for name, inside in named.items() if any(ratios[layer] for layer in inside)}
    return Constraints(sparsity, ratios, excluded=excluded, named=named, **others)  # type: ignore[arg-type]


def layers_inside(layers: Sequence[str], name: str, where: str) -> list[str]:
    """The layer of this name, or the layers of the module of this name; `where` is the field that is refused."""
    inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
    if not inside:
        raise RequestError(
            where, name, f"the name of a Conv2d or Linear layer, or of a part with some{such_as(layers, name)}"
        )
    return inside
