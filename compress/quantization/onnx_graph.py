"""Reading and editing the nodes, values and initializers of an ONNX graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Clip")
"""Operators whose output codes are input codes."""


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input number `index` of a node that has one there."""
    value = node.inputs[index]
    assert value is not None, f"{node.name} has no input {index}"
    return value


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def array(value: ir.Value) -> np.ndarray:
    """The elements of a constant, in its own type and shape."""
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value.numpy()


def name_of(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def dequantized_by(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a layer's operand comes from, directly or through what only moves values."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES:
        node = operand(node, 0).producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def clip(model: ir.Model, value: ir.Value, name: str, low: np.generic, high: np.generic, dtype: ir.DataType) -> ir.Node:
    """A Clip of `value` to `low`..`high`, not yet in the graph; `name` begins the names of its constants."""
    sides = {"lowest": low, "highest": high}
    bounds = [constant(model, f"{name}.{side}", np.array(bound)) for side, bound in sides.items()]
    node = ir.node("Clip", [value, *bounds], name=f"{name}.clip")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = f"{name}.clipped", value.shape, dtype
    return node


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
