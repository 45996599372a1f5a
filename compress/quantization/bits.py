"""How many bits each layer gets: the general numbers, the rule for the first and last layer, and single exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from compress.errors import QuantizationError, RequestError, such_as
from compress.quantization.prepare import quantization_points, quantized_layers, readers_of

FLOAT = 32


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weights and of the tensors that it reads; both 32 where it stays in floating point."""

    weights: int
    activations: int

    @property
    def keep_float(self) -> bool:
        return self.weights == FLOAT

    def __str__(self) -> str:
        return "float" if self.keep_float else f"{self.weights}/{self.activations}"


@dataclass(frozen=True)
class BitPlan:
    """The bits of every Conv2d and Linear of a model, by name in execution order."""

    weight_bits: int
    """Of layers without a rule of their own."""
    activation_bits: int
    """Of those layers, and of tensors that only additions, pools and concatenations read."""
    layers: dict[str, LayerBits]

    @property
    def keep_float(self) -> frozenset[str]:
        return frozenset(name for name, bits in self.layers.items() if bits.keep_float)

    def of_points(self, prepared: fx.GraphModule) -> dict[str, int]:
        """Bits of each quantization point: the widest layer that reads it decides, and all members of a group agree."""
        bits = {
            name: max(
                (self.layers[layer].activations for layer in layers if not self.layers[layer].keep_float),
                default=self.activation_bits,
            )
            for name, layers in readers_of(prepared).items()
        }
        points = quantization_points(prepared)
        widest: dict[str, int] = {}
        for name, point in points.items():
            widest[point.scale_group] = max(widest.get(point.scale_group, 0), bits[name])
        return {name: widest[point.scale_group] if point.scale_group else bits[name] for name, point in points.items()}


def assign_bits(
    prepared: fx.GraphModule,
    weight_bits: int,
    activation_bits: int,
    *,
    first_last_bits: int = 0,
    layer_bits: Mapping[str, str] | None = None,
) -> BitPlan:
    """The plan for a prepared model.

    Args:
        first_last_bits: the first and the last layer get at least these: the image and the answer bear the coarsest
            grid worst (Zhou et al. 2016, section 2.7). 32 keeps both in floating point.
        layer_bits: by layer or module name `W`, `W/A` or `32`; the longest name that fits a layer wins.

    Raises:
        RequestError: a name of `layer_bits` is no layer or module with layers.
        QuantizationError: no layer is left to quantize.
    """
    layers = quantized_layers(prepared)
    plan = {name: LayerBits(weight_bits, activation_bits) for name in layers}
    for name in {layers[0], layers[-1]}:
        widened = first_last_bits if first_last_bits == FLOAT else None
        plan[name] = LayerBits(
            widened or max(weight_bits, first_last_bits), widened or max(activation_bits, first_last_bits)
        )
    exceptions = sorted((layer_bits or {}).items(), key=lambda exception: len(exception[0]))
    for selected, text in exceptions:
        for name in _layers_of(selected, layers):
            plan[name] = parse_bits(text, activation_bits)
    if all(bits.keep_float for bits in plan.values()):
        raise QuantizationError(
            "Every layer is asked to stay in floating point, so there is nothing to quantize; choose 32 bits for the "
            "whole model instead, or name fewer layers."
        )
    return BitPlan(weight_bits, activation_bits, plan)


def parse_bits(text: str, activation_bits: int) -> LayerBits:
    """`4`, `4/8` or `32`; without a second number the layer reads what the others read."""
    weights, _, activations = text.partition("/")
    if int(weights) == FLOAT:
        return LayerBits(FLOAT, FLOAT)
    return LayerBits(int(weights), int(activations or activation_bits))


def _layers_of(name: str, layers: tuple[str, ...]) -> list[str]:
    """The layer of that name, or those inside the module of that name."""
    matching = [layer for layer in layers if layer == name or layer.startswith(name + ".")]
    if not matching:
        raise RequestError("layer_bits", name, f"a layer to quantize, or a module with some{such_as(layers, name)}")
    return matching
