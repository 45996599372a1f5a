"""The two Q/DQ conventions of one quantized ONNX graph.

| flavour       | activations                                                     | conv to add, activation  |
|---------------|-----------------------------------------------------------------|--------------------------|
| `tensorrt`    | int8, zero is code 0                                            | none: TensorRT fuses     |
| `onnxruntime` | uint8 on the same scales; zero is 0 after a ReLU, 128 elsewhere | a point                  |

Both start from the neutral graph that `convert` exports: int8, zero is code 0, every point present. Scales and weight
codes are never touched. A grid narrower than its container (fewer than 8 bits; the bound of a ReLU6) needs a clip:
ONNX Runtime clips the integers behind the kernel, TensorRT the floats in front of the pair, where each can fuse it. In
the `onnxruntime` flavour biases are integers, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from compress.engines.base import Flavour
from compress.quantization.grids import ActivationGrid, Grids
from compress.quantization.kinds import QPoint

_BEYOND = 1e30
_MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Clip")
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "onnxruntime")


def zero_point(point: QPoint, grid: ActivationGrid, flavour: Flavour) -> int:
    """Zero's code. Where it is code 0 of a uint8, the quantization itself is the ReLU and costs nothing."""
    if flavour == "tensorrt" or point.non_negative:
        return 0
    return -grid.qmin if grid.qmax > 127 else 128


def code_range(point: QPoint, grid: ActivationGrid, flavour: Flavour) -> tuple[int, int]:
    """Smallest and largest code that a file of this flavour can hold for this point, zero being code 0."""
    zero = zero_point(point, grid, flavour)
    low, high = (-128, 127) if flavour == "tensorrt" else (-zero, 255 - zero)
    if _narrow(point, grid, flavour):
        return max(low, grid.qmin), min(high, grid.qmax)
    return low, high


def _narrow(point: QPoint, grid: ActivationGrid, flavour: Flavour) -> bool:
    return grid.bits < 8 or (flavour == "onnxruntime" and point.clipped_above)


def apply_flavour(neutral: ir.Model, points: Mapping[str, QPoint], grids: Grids, flavour: Flavour) -> ir.Model:
    """A copy of the neutral graph in `flavour`."""
    model = neutral.clone()
    for node in list(model.graph):
        name, _, role = (node.name or "").rpartition(".")
        if role != "quantize" or name not in points:
            continue
        if flavour == "tensorrt":
            _edit_for_tensorrt(model, node, points[name], grids.activations[name])
        else:
            _edit_for_onnxruntime(model, node, points[name], grids.activations[name])
    if flavour == "onnxruntime":
        _quantize_biases(model)
        keep_float_layers_float(model)
    remove_unused(model)
    return model


def _edit_for_tensorrt(model: ir.Model, quantize: ir.Node, point: QPoint, grid: ActivationGrid) -> None:
    ((dequantize, _),) = quantize.outputs[0].uses()
    if point.only_onnxruntime:
        ir.convenience.replace_all_uses_with(dequantize.outputs[0], quantize.inputs[0])
        model.graph.remove([dequantize, quantize], safe=True)
    elif _narrow(point, grid, "tensorrt"):
        low, high = (np.float32(code * grid.scale) for code in code_range(point, grid, "tensorrt"))
        clip = _clip(model, quantize.inputs[0], point.name, low, high, ir.DataType.FLOAT)
        model.graph.insert_before(quantize, clip)
        quantize.replace_input_with(0, clip.outputs[0])


def _edit_for_onnxruntime(model: ir.Model, quantize: ir.Node, point: QPoint, grid: ActivationGrid) -> None:
    ((dequantize, _),) = quantize.outputs[0].uses()
    zero = zero_point(point, grid, "onnxruntime")
    value = constant(model, f"{point.name}.zero_point.uint8", np.array(zero, dtype=np.uint8))
    quantize.replace_input_with(2, value)
    dequantize.replace_input_with(2, value)
    quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)  # a clone shares its types with the original
    if _narrow(point, grid, "onnxruntime"):
        low, high = (np.uint8(code + zero) for code in code_range(point, grid, "onnxruntime"))
        clip = _clip(model, quantize.outputs[0], point.name, low, high, ir.DataType.UINT8)
        model.graph.insert_after(quantize, clip)
        dequantize.replace_input_with(0, clip.outputs[0])


def _clip(
    model: ir.Model, value: ir.Value, name: str, low: np.generic, high: np.generic, dtype: ir.DataType
) -> ir.Node:
    sides = {"lowest": low, "highest": high}
    bounds = [constant(model, f"{name}.{side}", np.array(bound)) for side, bound in sides.items()]
    clip = ir.node("Clip", [value, *bounds], name=f"{name}.clip")
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].dtype = f"{name}.clipped", value.shape, dtype
    return clip


def _quantize_biases(model: ir.Model) -> None:
    """Store the bias of each integer layer as int32 in units of input scale times weight scale.

    ONNX Runtime does that by itself for most convolutions, and runs a fully connected layer in float without it; said in
    the file, it is the same for every layer and runtime, and `fake_quantized` can do the same.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].is_initializer():
            continue
        data, weight = dequantized_by(node.inputs[0]), dequantized_by(node.inputs[1])
        if data is None or weight is None:
            continue
        name, bias = node.inputs[2].name, node.inputs[2].const_value.numpy()
        scale = data.inputs[1].const_value.numpy() * weight.inputs[1].const_value.numpy()
        call = free_suffix(model, f"{name}.codes")
        arrays = {"codes": bias_codes(bias, scale), "scales": scale, "zero_points": np.zeros(bias.shape, np.int32)}
        inputs = [constant(model, f"{name}.{part}{call}", array) for part, array in arrays.items()]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{name}.dequantize{call}")
        dequantize.outputs[0].name = f"{name}.dequantized{call}"
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])


def bias_codes(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Whole multiples, int32, of `scale` (input scale times weight scale, float32 [channels]) nearest to the bias."""
    return np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31), 2**31 - 1).astype(np.int32)


def dequantized_by(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a layer's operand comes from, directly or through what only moves values."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def keep_float_layers_float(model: ir.Model) -> None:
    """Clip what a layer with float weights reads, to bounds beyond every value.

    Between a dequantized input and a quantized output ONNX Runtime quantizes float weights by itself, with one scale for
    all channels (its WeightBiasQuantization), unless another operator stands in between.
    """
    for node in list(model.graph):
        if node.op_type in ("Conv", "Gemm") and node.inputs[1].is_initializer() and not node.inputs[0].is_graph_input():
            low, high = np.float32(-_BEYOND), np.float32(_BEYOND)
            clip = _clip(model, node.inputs[0], f"{node.name}.input", low, high, ir.DataType.FLOAT)
            model.graph.insert_before(node, clip)
            node.replace_input_with(0, clip.outputs[0])


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """The graph's initializer of that name, made from `array` when there is none yet."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                     const_value=ir.tensor(array, name=name))  # fmt: skip
    model.graph.register_initializer(value)
    return value


def free_suffix(model: ir.Model, name: str) -> str:
    """What has to be added to `name` for a new initializer: nothing, or `_2`, `_3` ... where it is taken."""
    suffix, number = "", 1
    while f"{name}{suffix}" in model.graph.initializers:
        number += 1
        suffix = f"_{number}"
    return suffix


def remove_unused(model: ir.Model) -> None:
    """Drop initializers that nothing reads any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
