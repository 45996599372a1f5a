"""From a trained prepared model and its grids to the two forms that leave quantization.

`fake_quantized` is the reference: float arithmetic on the exact grid. `convert` is what gets exported: weights held
as int8, and quantize/dequantize operators in place of the points; `flavours` then fits the file to a runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.errors import QuantizationError
from compress.methods.runtimes import Flavour
from compress.quantization.flavours import bias_codes, code_range
from compress.quantization.grids import Quantized, WeightGrid
from compress.quantization.kinds import first_operand, layer_at
from compress.quantization.prepare import quantization_points, readers_of
from compress.tracing.names import free_name

CALLS = "calls"
"""Key of the graph module's meta: copy of a layer, for one of its further calls -> the layer."""


class FakeQuantize(nn.Module):
    """Moves a tensor onto `scale * code`, `qmin <= code <= qmax`; the arithmetic of NNI and of ONNX."""

    scale: Tensor

    def __init__(self, scale: float, qmin: int, qmax: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.qmin, self.qmax = qmin, qmax

    def forward(self, values: Tensor) -> Tensor:
        """float32 of any shape to the same shape, rounded to the grid."""
        return torch.round(torch.clamp(values / self.scale, self.qmin, self.qmax)) * self.scale


class QuantizeDequantize(nn.Module):
    """The ONNX pair QuantizeLinear, DequantizeLinear on int8 with zero at code 0."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.arguments = (scale, 0, -128, 127, torch.int8)

    def forward(self, values: Tensor) -> Tensor:
        """float32 of any shape to the same shape, rounded to the grid."""
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(values, *self.arguments)
        dequantized: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *self.arguments)
        return dequantized


class IntegerWeightLayer(nn.Module):
    """A Conv2d or Linear whose weight is stored as int8 codes with one scale per output channel."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    _layer: nn.Conv2d | nn.Linear

    def __init__(self, layer: nn.Conv2d | nn.Linear, grid: WeightGrid) -> None:
        super().__init__()
        codes, scales = grid.in_container(layer.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(scales), dtype=torch.int8))
        self.bias = layer.bias
        self._modules.update(layer._modules)  # the graph calls what a layer holds, such as its padding
        # Kept for its stride, padding and groups, outside of the module tree so that its weight is not exported.
        object.__setattr__(self, "_layer", layer)

    def forward(self, values: Tensor) -> Tensor:
        """float32 [N, C, H, W], or [..., features] for a Linear, to the layer's output."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zero_points, 0, -128, 127, torch.int8
        )
        if isinstance(self._layer, nn.Linear):
            return F.linear(values, weight, self.bias)
        result: Tensor = self._layer._conv_forward(values, weight, self.bias)
        return result


def fake_quantized(quantized: Quantized, flavour: Flavour | None = None) -> fx.GraphModule:
    """A float model on the grid; with a flavour, the grid as that flavour's file holds it.

    Without a flavour this is what NNI trained, bit for bit. A flavour leaves out the points that its file leaves out,
    and its 8-bit container reaches beyond the trained grid (to 255 scales after a ReLU where NNI stops at 127); biases
    are integers in the `onnxruntime` one.
    """
    model = _copy(quantized)
    readers = readers_of(model)
    for name, grid in _grids(model, quantized).items():
        layer = layer_at(model, name)
        layer.weight = nn.Parameter(
            grid.dequantized(layer.weight), requires_grad=False
        )  # another's may be the same tensor
    for name, point in quantization_points(model).items():
        activation = quantized.grids.activations[name]
        if flavour == "tensorrt" and point.only_onnxruntime:
            continue
        bounds = (activation.qmin, activation.qmax) if flavour is None else code_range(point, activation, flavour)
        model.set_submodule(name, FakeQuantize(activation.scale, *bounds))
    if flavour == "onnxruntime":
        _round_biases(model, readers, quantized)
    return model


def _round_biases(model: fx.GraphModule, readers: Mapping[str, tuple[str, ...]], quantized: Quantized) -> None:
    """Move each bias onto the grid that the file has for it: whole multiples of input scale times weight scale."""
    grids, calls = _grids(model, quantized), model.meta[CALLS]
    for name, layers in readers.items():
        for layer in layers:
            module = layer_at(model, layer)
            if module.bias is None:
                continue
            _, scales = grids[layer].in_container(layer_at(quantized.model, calls.get(layer, layer)).weight)
            unit = np.float32(quantized.grids.activations[name].scale) * scales.numpy()
            rounded = torch.from_numpy(bias_codes(module.bias.numpy(), unit) * unit)
            module.bias = nn.Parameter(rounded.to(module.bias.dtype), requires_grad=False)


def convert(quantized: Quantized) -> fx.GraphModule:
    """The neutral explicit Q/DQ model: int8 with zero at code 0 everywhere, every point present.

    It is made for export; run eagerly, it multiplies by reciprocal scales and so differs from ONNX in rare roundings.
    """
    model = _copy(quantized)
    points = quantization_points(model)
    for node in list(model.graph.nodes):
        point = points.get(str(node.target)) if node.op == "call_module" else None
        if point is not None and point.clipped_above:  # the grid ends below 6, so that quantizing clips as well
            clipped = first_operand(node)
            with model.graph.inserting_before(clipped):
                rectified = model.graph.call_function(F.relu, (clipped.args[0],))
            clipped.replace_all_uses_with(rectified)
            model.graph.erase_node(clipped)
    model.recompile()
    for name, grid in _grids(model, quantized).items():
        model.set_submodule(name, IntegerWeightLayer(layer_at(model, name), grid))
    for name in points:
        model.set_submodule(name, QuantizeDequantize(quantized.grids.activations[name].scale))
    return model


def weight_sqnr_db(quantized: Quantized) -> dict[str, float]:
    """Signal to quantization noise ratio of each layer's weights, in decibels; higher is closer to the floats."""
    ratios = {}
    for name, grid in quantized.grids.weights.items():
        weight = layer_at(quantized.model, name).weight.detach().double()
        noise = (weight - grid.dequantized(weight.float()).double()).square().mean().clamp_min(1e-30)
        ratios[name] = float(10 * torch.log10(weight.square().mean() / noise))
    return ratios


def _copy(quantized: Quantized) -> fx.GraphModule:
    expected = set(quantization_points(quantized.model))
    if expected != set(quantized.grids.activations):
        odd = sorted(expected ^ set(quantized.grids.activations))[0]
        raise QuantizationError(f"{odd}: the grids belong to a model with other points; quantize the model again.")
    model = copy.deepcopy(quantized.model).eval().requires_grad_(False)
    model.meta[CALLS] = _unshare(model, quantized.grids.weights)
    return model


def _unshare(model: fx.GraphModule, layers: Collection[str]) -> dict[str, str]:
    """Give every further call of a layer a copy of its own, and return whose copy it is, by the copy's name.

    What a call reads decides its bias's grid, and ONNX Runtime takes no constant that two integer layers share.
    """
    copies: dict[str, str] = {}
    called: set[str] = set()
    for node in model.graph.nodes:
        layer = str(node.target)
        if node.op != "call_module" or layer not in layers:
            continue
        if layer in called:
            parent, _, own = layer.rpartition(".")
            name = free_name(model.get_submodule(parent), f"{own}_2")
            node.target = f"{parent}.{name}".lstrip(".")
            model.add_submodule(node.target, copy.deepcopy(model.get_submodule(layer)))
            copies[node.target] = layer
        called.add(layer)
    model.recompile()
    return copies


def _grids(model: fx.GraphModule, quantized: Quantized) -> dict[str, WeightGrid]:
    """Of each layer and of the copies of it in `model`."""
    grids = quantized.grids.weights
    return grids | {name: grids[layer] for name, layer in model.meta[CALLS].items()}
