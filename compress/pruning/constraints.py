"""What a user wants removed from which layer, by layer name: one form for ratios, exclusions and config lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from compress.errors import RequestError, such_as

Ranking = Literal["per-group", "global"]


@dataclass(frozen=True)
class Constraints:
    """What the user sets for single layers; it holds for the whole group that a layer shares its channels with."""

    sparsity: float
    """Fraction of output channels removed where `ratios` has no other; 0 < sparsity < 1."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Layer -> its own fraction; with 0 it is not pruned."""
    selected: frozenset[str] | None = None
    """The layers that `sparsity` is meant for; None: all."""
    excluded: tuple[str, ...] = ()
    ranking: Ranking = "per-group"
    max_layer_sparsity: float | None = None
    """With global ranking, the largest fraction that any layer loses."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that the user set a fraction for -> their layers; refused when none of these can be pruned."""
    request_field: str = "layer_sparsity"
    """The field of the request that a refusal of a fraction names."""

    def ratio(self, layers: Sequence[str]) -> float | None:
        """The fraction to remove from a group; None when the user selected none of its layers.

        Raises:
            RequestError: the user set different fractions for its layers.
        """
        own = {layer: self.ratios[layer] for layer in layers if layer in self.ratios}
        if len(set(own.values())) > 1:
            first = next(iter(own))
            second = next(layer for layer in own if own[layer] != own[first])
            raise RequestError(
                self.request_field,
                f"{first}={own[first]:g} and {second}={own[second]:g}",
                "one fraction for both, because they lose the same channels",
            )
        if own:
            return next(iter(own.values()))
        return self.sparsity if self.selected is None or self.selected & set(layers) else None

    def competes(self, layers: Sequence[str]) -> bool:
        """Whether a group takes part in the global ranking: its own fraction takes it out."""
        return self.ranking == "global" and not any(layer in self.ratios for layer in layers)


def by_name(
    layers: Sequence[str],
    sparsity: float,
    exclude: Sequence[str] = (),
    layer_sparsity: Mapping[str, float] | None = None,
    *,
    ranking: Ranking = "per-group",
    max_layer_sparsity: float | None = None,
) -> Constraints:
    """Constraints from names of layers, or of modules with layers inside; the longer of two names wins.

    Raises:
        RequestError: a name that has no such layer, or a fraction out of range.
    """
    ratios: dict[str, float] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, ratio in sorted((layer_sparsity or {}).items(), key=lambda item: item[0].count(".")):
        if not 0 <= ratio < 1:
            raise RequestError("layer_sparsity", f"{name}={ratio:g}", "a fraction from 0 to below 1")
        names[name] = tuple(layers_inside(layers, name, "layer_sparsity"))
        ratios |= dict.fromkeys(names[name], ratio)
    excluded = tuple(layer for name in exclude for layer in layers_inside(layers, name, "exclude"))
    names = {name: inside for name, inside in names.items() if any(ratios[layer] for layer in inside)}
    return Constraints(
        sparsity, ratios, excluded=excluded, ranking=ranking, max_layer_sparsity=max_layer_sparsity, names=names
    )


def layers_inside(layers: Sequence[str], name: str, field: str) -> list[str]:
    """The layer of this name, or the layers inside the module of this name; `field` is the field that is refused."""
    inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
    if not inside:
        raise RequestError(
            field, name, f"the name of a Conv2d or Linear layer, or of a module with some{such_as(layers, name)}"
        )
    return inside
