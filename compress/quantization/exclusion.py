"""Layers of a quantized ONNX file back in floating point: what `layer_bits` 32 gives, without calibrating again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.methods.runtimes import Flavour
from compress.quantization.flavours import keep_float_layers_float
from compress.quantization.onnx_graph import array, constant, dequantized_by, name_of, operand, remove_unused


def exclude_layers(source: Path, layers: Collection[str], flavour: Flavour, destination: Path) -> None:
    """Write `source`, a file of `flavour`, to `destination` with `layers` (names of its nodes) in floating point.

    Weights and biases keep the values that their integers stand for. The input is read as it was before it was rounded,
    unless it moved since then (a pool, a reshape): there it stays rounded.
    """
    model = ir.load(source)
    for node in list(model.graph):
        if node.name in layers or _layer_of(node) in layers:
            _read_floats(model, node)
    if flavour == "onnxruntime":
        keep_float_layers_float(model)
    remove_unused(model)
    ir.save(model, destination)


def _layer_of(node: ir.Node) -> str | None:
    """Whose integer weights the node reads: further calls of a layer have names of their own."""
    dequantize = dequantized_by(operand(node, 1)) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    return name_of(operand(dequantize, 0)).rpartition(".codes")[0] if dequantize is not None else None


def _read_floats(model: ir.Model, layer: ir.Node) -> None:
    for index, value in enumerate(layer.inputs):
        dequantize = dequantized_by(value) if value is not None else None
        if value is None or dequantize is None:
            continue
        if operand(dequantize, 0).is_initializer():
            weights = constant(model, f"{dequantize.outputs[0].name}.float", _values(dequantize))
            ir.convenience.replace_all_uses_with(dequantize.outputs[0], weights)
            model.graph.remove(dequantize, safe=True)
        elif value.producer() is dequantize:
            layer.replace_input_with(index, _quantize_before(dequantize).inputs[0])
    _remove_unread(model)


def _values(dequantize: ir.Node) -> np.ndarray:
    """float32, of the shape of the codes, which are symmetric: zero is code 0."""
    codes, scales = array(operand(dequantize, 0)), array(operand(dequantize, 1))
    shape = [1] * codes.ndim
    if scales.ndim:
        shape[dequantize.attributes.get_int("axis", 1)] = -1
    values: np.ndarray = codes.astype(np.float32) * scales.reshape(shape)
    return values


def _quantize_before(dequantize: ir.Node) -> ir.Node:
    node = operand(dequantize, 0).producer()
    while node is not None and node.op_type != "QuantizeLinear":
        node = operand(node, 0).producer()  # a clip of integers
    assert node is not None, f"{dequantize.name} has no QuantizeLinear before it"
    return node


def _remove_unread(model: ir.Model) -> None:
    """Drop quantization that nothing reads any more."""
    for node in reversed(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip") and not any(v.uses() for v in node.outputs):
            if not any(value.is_graph_output() for value in node.outputs):
                model.graph.remove(node, safe=True)
