"""From a trained prepared model and its ranges to the two forms that leave quantization.

`fake_quantized` is the reference: float arithmetic on the exact grid. `convert` is what gets exported: weights held
as int8, and quantize/dequantize operators in place of the points; `flavours` then fits the file to a runtime.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.errors import QuantizationError
from compress.quantization.flavours import Flavour, bias_codes, code_range
from compress.quantization.prepare import quantization_points, readers_of
from compress.quantization.ranges import Quantized, WeightGrid


class FakeQuantize(nn.Module):
    """Moves a tensor onto `scale * code`, `lowest <= code <= highest`; the arithmetic of NNI and of ONNX."""

    def __init__(self, scale: float, lowest: int, highest: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.lowest, self.highest = lowest, highest

    def forward(self, values: Tensor) -> Tensor:
        return torch.round(torch.clamp(values / self.scale, self.lowest, self.highest)) * self.scale


class QuantizeDequantize(nn.Module):
    """The ONNX pair QuantizeLinear, DequantizeLinear on int8 with zero at code 0."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.arguments = (scale, 0, -128, 127, torch.int8)

    def forward(self, values: Tensor) -> Tensor:
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(values, *self.arguments)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *self.arguments)


class IntegerWeightLayer(nn.Module):
    """A Conv2d or Linear whose weight is stored as int8 codes with one scale per output channel."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, grid: WeightGrid) -> None:
        super().__init__()
        codes, scales = grid.in_container(layer.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int8))
        self.bias = layer.bias
        # Kept for its stride, padding and groups, outside of the module tree so that its weight is not exported.
        object.__setattr__(self, "_layer", layer)

    def forward(self, values: Tensor) -> Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zero_points, 0, -128, 127, torch.int8
        )
        if isinstance(self._layer, nn.Linear):
            return F.linear(values, weight, self.bias)
        return self._layer._conv_forward(values, weight, self.bias)


def fake_quantized(quantized: Quantized, flavour: Flavour | None = None) -> fx.GraphModule:
    """A float model on the grid; with a flavour, the grid as that flavour's file holds it.

    Without a flavour this is what NNI trained, bit for bit. A flavour leaves out the points that its file leaves out,
    and its 8-bit container reaches beyond the trained grid (to 255 scales after a ReLU where NNI stops at 127); biases
    are integers in the `onnxruntime` one.
    """
    model = _copy(quantized)
    for name, grid in quantized.ranges.weights.items():
        layer = model.get_submodule(name)
        layer.weight.copy_(grid.dequantized(layer.weight))
    for name, point in quantization_points(model).items():
        grid = quantized.ranges.activations[name]
        if flavour == "tensorrt" and point.only_onnxruntime:
            continue
        lowest, highest = (grid.lowest, grid.highest) if flavour is None else code_range(point, grid, flavour)
        model.set_submodule(name, FakeQuantize(grid.scale, lowest, highest))
    if flavour == "onnxruntime":
        _round_biases(model, quantized)
    return model


def _round_biases(model: fx.GraphModule, quantized: Quantized) -> None:
    """Move each bias onto the grid that the file has for it: whole multiples of input scale times weight scale."""
    for name, layers in readers_of(quantized.model).items():
        for layer in layers:
            module = model.get_submodule(layer)
            if module.bias is None:
                continue
            _, scales = quantized.ranges.weights[layer].in_container(quantized.model.get_submodule(layer).weight)
            unit = np.float32(quantized.ranges.activations[name].scale) * scales.numpy()
            module.bias.copy_(torch.from_numpy(bias_codes(module.bias.numpy(), unit) * unit))


def convert(quantized: Quantized) -> fx.GraphModule:
    """The neutral explicit Q/DQ model: int8 with zero at code 0 everywhere, every point present.

    It is made for export; run eagerly, it multiplies by reciprocal scales and so differs from ONNX in rare roundings.
    """
    model = _copy(quantized)
    points = quantization_points(model)
    for node in list(model.graph.nodes):
        point = points.get(str(node.target)) if node.op == "call_module" else None
        if point is not None and point.clipped_above:  # the grid ends below 6, so that quantizing clips as well
            clipped = node.args[0]
            with model.graph.inserting_before(clipped):
                rectified = model.graph.call_function(F.relu, (clipped.args[0],))
            clipped.replace_all_uses_with(rectified)
            model.graph.erase_node(clipped)
    model.recompile()
    for name, grid in quantized.ranges.weights.items():
        model.set_submodule(name, IntegerWeightLayer(model.get_submodule(name), grid))
    for name in points:
        model.set_submodule(name, QuantizeDequantize(quantized.ranges.activations[name].scale))
    return model


def weight_sqnr_db(quantized: Quantized) -> dict[str, float]:
    """Signal to quantization noise ratio of each layer's weights, in decibels; higher is closer to the floats."""
    ratios = {}
    for name, grid in quantized.ranges.weights.items():
        weight = quantized.model.get_submodule(name).weight.detach().double()
        noise = (weight - grid.dequantized(weight.float()).double()).square().mean().clamp_min(1e-30)
        ratios[name] = float(10 * torch.log10(weight.square().mean() / noise))
    return ratios


def _copy(quantized: Quantized) -> fx.GraphModule:
    expected = set(quantization_points(quantized.model))
    if expected != set(quantized.ranges.activations):
        odd = sorted(expected ^ set(quantized.ranges.activations))[0]
        raise QuantizationError(f"{odd}: the ranges belong to a model with other points; quantize the model again.")
    return copy.deepcopy(quantized.model).eval().requires_grad_(False)
