"""Where the quantization points of a graph stand, and which of them belong together."""

from __future__ import annotations

import operator
from functools import partial

from torch import fx

from compress.quantization.kinds import (
    FLOAT_LAYERS,
    LAYERS,
    RELUS,
    QPoint,
    first_operand,
    is_tensor,
    kind,
    makes_list,
    operands,
)
from compress.tracing.names import free_name

_INTEGER_WHEN_READ = ("add", "concat", "maxpool", "avgpool")


def insert_points(graph_module: fx.GraphModule) -> None:
    """Put a `QPoint` on every tensor that integer kernels exchange; the graph's answers stay."""
    tensors = _tensors_to_quantize(graph_module)
    points: dict[fx.Node, QPoint] = {}
    for tensor in tensors:
        name = free_name(graph_module, f"q_{tensor.name}")
        point = QPoint(name, str(tensor.target) if tensor.op == "call_module" else tensor.name)
        graph_module.add_submodule(name, point)
        with graph_module.graph.inserting_after(tensor):
            node = graph_module.graph.call_module(name, (tensor,))
        tensor.replace_all_uses_with(node, delete_user_cb=partial(operator.is_not, node))
        points[node] = point
    for node, point in points.items():
        point.non_negative = _non_negative(first_operand(node), graph_module)
        point.clipped_above = kind(first_operand(node), graph_module) == "relu6"
    _share_scales(graph_module, points)
    _mark_fused_by_tensorrt(graph_module, points)


def _tensors_to_quantize(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Every tensor that an integer kernel reads or a convolution hands on, in execution order.

    A convolution runs on integers in ONNX Runtime only when its result is quantized too, after the ReLU if there is
    one. Maximum pooling keeps its input's scale, so its result needs no point of its own.

    A layer kept in floating point reads what was not rounded, where only such layers read it; ONNX Runtime then computes
    the convolution before it in floating point, too.
    """
    readers = _integer_readers(graph_module)
    read_by = {node for reader in readers for node in operands(reader, kind(reader, graph_module))}
    chosen: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        operation = kind(node, graph_module)
        result = _after_relu(node, graph_module)
        if operation == "conv" and not _only_floats_read(result, graph_module):
            chosen[result] = None
        if operation == "concat" and node in readers:
            chosen[node] = None
        passes_scale = operation == "maxpool" and node in readers
        makes_tensor = node.op != "get_attr" and not makes_list(node) and is_tensor(node)
        if node in read_by and makes_tensor and not passes_scale:
            chosen[node] = None
    return [node for node in graph_module.graph.nodes if node in chosen and not _only_feeds_output(node)]


def _only_floats_read(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether layers that are kept in floating point, to be spared the rounding, are all that reads it."""
    kept = graph_module.meta.get(FLOAT_LAYERS, ())
    return all(user.op == "call_module" and str(user.target) in kept for user in node.users)


def _only_feeds_output(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _integer_readers(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Layers always; additions, concatenations and pools only when an integer kernel reads their result.

    An addition before a LayerNorm, say, gains nothing from integers and would only lose accuracy.
    """
    readers: set[fx.Node] = set()
    passes: set[fx.Node] = set()
    read: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        operation = kind(node, graph_module)
        if operation in LAYERS or (operation in _INTEGER_WHEN_READ and node in read):
            readers.add(node)
        elif operation in (*RELUS, "shape", "point") and node in read:
            passes.add(node)
        else:
            continue
        read.update(operands(node, operation))
    return readers


def _after_relu(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    only = next(iter(node.users)) if len(node.users) == 1 else None
    return only if only is not None and kind(only, graph_module) in RELUS else node


def _non_negative(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    operation = kind(node, graph_module)
    if operation in (*RELUS, "sigmoid"):
        return True
    if operation in ("add", "concat", "maxpool", "avgpool", "shape", "point"):
        return all(_non_negative(operand, graph_module) for operand in operands(node, operation))
    return False


def _share_scales(graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> None:
    """Concatenation copies integers, so its inputs and its result must mean the same by them; so does what only moves
    them, which would round a second time and keep runtimes from dropping the pair."""
    for node, point in points.items():
        made = first_operand(node)
        operation = kind(made, graph_module)
        if operation == "concat":
            inputs = [_point_of(operand, graph_module, points) for operand in operands(made, operation)]
        elif operation == "shape":
            inputs = [_point_of(made, graph_module, points)]
        else:
            continue
        members = [point, *(member for member in inputs if member is not None)]
        if len(members) == 1:
            continue
        merged = {member.scale_group for member in members} - {""}
        group = f"{operation}_{made.name}"
        for other in points.values():
            if other in members or other.scale_group in merged:
                other.scale_group = group
    for group in {point.scale_group for point in points.values()} - {""}:
        members = [point for point in points.values() if point.scale_group == group]
        non_negative = all(point.non_negative for point in members)
        for point in members:
            point.non_negative = non_negative


def _point_of(node: fx.Node, graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> QPoint | None:
    while node not in points and (operation := kind(node, graph_module)) in ("maxpool", "shape"):
        (node,) = operands(node, operation)
    return points.get(node)


def _mark_fused_by_tensorrt(graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> None:
    """TensorRT computes conv + add + ReLU and conv + activation in one kernel when no Q/DQ stands between them.

    Of two convolutions that meet in one addition only one is fused; the other hands over integers. (NVIDIA TensorRT
    developer guide, "Q/DQ placement recommendations".)
    """
    taken: set[fx.Node] = set()
    readers = _integer_readers(graph_module)
    for node, point in points.items():
        if kind(first_operand(node), graph_module) != "conv":
            continue
        users = [user for user in node.users if user.op != "output"]
        if all(user not in readers for user in users):
            point.only_onnxruntime = True
        elif len(users) == 1 and kind(users[0], graph_module) == "add" and users[0] not in taken:
            point.only_onnxruntime = True
            taken.add(users[0])
