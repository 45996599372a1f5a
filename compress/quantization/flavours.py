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

from compress.methods.runtimes import Flavour
from compress.quantization.grids import ActivationGrid, Grids
from compress.quantization.kinds import QPoint
from compress.quantization.onnx_graph import (
    array,
    clip,
    constant,
    dequantized_by,
    free_suffix,
    name_of,
    operand,
    remove_unused,
)

_BEYOND = 1e30


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
        ir.convenience.replace_all_uses_with(dequantize.outputs[0], operand(quantize, 0))
        model.graph.remove([dequantize, quantize], safe=True)
    elif _narrow(point, grid, "tensorrt"):
        low, high = (np.float32(code * grid.scale) for code in code_range(point, grid, "tensorrt"))
        bound = clip(model, operand(quantize, 0), point.name, low, high, ir.DataType.FLOAT)
        model.graph.insert_before(quantize, bound)
        quantize.replace_input_with(0, bound.outputs[0])


def _edit_for_onnxruntime(model: ir.Model, quantize: ir.Node, point: QPoint, grid: ActivationGrid) -> None:
    ((dequantize, _),) = quantize.outputs[0].uses()
    zero = zero_point(point, grid, "onnxruntime")
    value = constant(model, f"{point.name}.zero_point.uint8", np.array(zero, dtype=np.uint8))
    quantize.replace_input_with(2, value)
    dequantize.replace_input_with(2, value)
    quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)  # a clone shares its types with the original
    if _narrow(point, grid, "onnxruntime"):
        low, high = (np.uint8(code + zero) for code in code_range(point, grid, "onnxruntime"))
        bound = clip(model, quantize.outputs[0], point.name, low, high, ir.DataType.UINT8)
        model.graph.insert_after(quantize, bound)
        dequantize.replace_input_with(0, bound.outputs[0])


def _quantize_biases(model: ir.Model) -> None:
    """Store the bias of each integer layer as int32 in units of input scale times weight scale.

    ONNX Runtime does that by itself for most convolutions, and runs a fully connected layer in float without it; said in
    the file, it is the same for every layer and runtime, and `fake_quantized` can do the same.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or not operand(node, 2).is_initializer():
            continue
        data, weight = (dequantized_by(operand(node, index)) for index in range(2))
        if data is None or weight is None:
            continue
        name, bias = name_of(operand(node, 2)), array(operand(node, 2))
        scale = array(operand(data, 1)) * array(operand(weight, 1))
        call = free_suffix(model, f"{name}.codes")
        arrays = {"codes": bias_codes(bias, scale), "scales": scale, "zero_points": np.zeros(bias.shape, np.int32)}
        inputs = [constant(model, f"{name}.{part}{call}", values) for part, values in arrays.items()]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{name}.dequantize{call}")
        dequantize.outputs[0].name = f"{name}.dequantized{call}"
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])


def bias_codes(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Whole multiples, int32, of `scale` (input scale times weight scale, float32 [channels]) nearest to the bias."""
    codes: np.ndarray = np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31), 2**31 - 1)
    return codes.astype(np.int32)


def keep_float_layers_float(model: ir.Model) -> None:
    """Clip what a layer with float weights reads, to bounds beyond every value.

    Between a dequantized input and a quantized output ONNX Runtime quantizes float weights by itself, with one scale for
    all channels (its WeightBiasQuantization), unless another operator stands in between.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm") or not operand(node, 1).is_initializer():
            continue
        if not operand(node, 0).is_graph_input():
            low, high = np.float32(-_BEYOND), np.float32(_BEYOND)
            bound = clip(model, operand(node, 0), f"{node.name}.input", low, high, ir.DataType.FLOAT)
            model.graph.insert_before(node, bound)
            node.replace_input_with(0, bound.outputs[0])
