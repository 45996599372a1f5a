"""Turn a float classifier into a graph that says where an integer kernel reads a tensor.

The result is an `fx.GraphModule` that computes what the model computed in eval mode: BatchNorm is folded into the
layer before it, dropout is gone, and a `QPoint` (an identity) stands on every tensor that integer kernels exchange.
Points are set per tensor, not per module, so that one ReLU module called ten times gets ten of them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import stochastic_depth

from compress.errors import QuantizationError
from compress.folding import fold
from compress.quantization import decompose

# What a node computes, by module class, function or tensor method. Anything not listed is "other" and stays float.
_KINDS: dict[str, tuple[object, ...]] = {
    "conv": (nn.Conv2d,),
    "linear": (nn.Linear,),
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "concat": (torch.cat, torch.concat, torch.concatenate),
    "maxpool": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    "avgpool": (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    "relu": (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    "relu6": (nn.ReLU6, F.relu6),
    "sigmoid": (nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_"),
    "shape": (nn.Flatten, torch.flatten, operator.getitem, torch.transpose, torch.permute, torch.reshape, torch.chunk,
              torch.split, "flatten", "view", "reshape", "transpose", "permute", "contiguous", "chunk", "split"),
    "removed": (nn.Dropout, nn.Dropout2d, nn.Identity, F.dropout, F.dropout2d, stochastic_depth),
}  # fmt: skip
_KIND_OF = {target: kind for kind, targets in _KINDS.items() for target in targets}
_PLAIN = {operator.iadd: operator.add, F.relu_: F.relu, torch.relu_: torch.relu}
_INTEGER_LAYERS = ("conv", "linear")
_INTEGER_WHEN_READ = ("add", "concat", "maxpool", "avgpool")


class QPoint(nn.Identity):
    """A tensor that integer kernels exchange; identity until it is observed or converted.

    `name` is its own place in the graph, `source` the layer that makes the tensor; `scale_group` joins points that must
    share one scale (the inputs and the output of a concatenation).
    """

    def __init__(self, name: str, source: str) -> None:
        super().__init__()
        self.name, self.source = name, source
        self.non_negative = False
        """The tensor comes out of a ReLU or a sigmoid, directly or through pools: it needs no sign."""
        self.clipped_above = False
        """The tensor comes out of a ReLU6: its upper bound does not follow from an unsigned container."""
        self.scale_group = ""
        self.only_onnxruntime = False
        """TensorRT fuses what makes and what reads this tensor; a point between them would break the fusion."""


def prepare(model: nn.Module, *, stays_float: frozenset[str] = frozenset()) -> fx.GraphModule:
    """A copy of `model`, folded and with its quantization points; eval mode, input and output unchanged.

    Layers named in `stays_float` are no integer kernels: no point stands on what only they read or write.
    Raises `QuantizationError` when the model cannot be traced by torch.fx or has nothing to quantize.
    """
    graph_module = _trace(copy.deepcopy(model).eval())
    _make_plain(graph_module)
    fold(graph_module)  # Jacob et al. 2018, section 3.2: weights are quantized as the deployed file holds them
    for name in stays_float:
        graph_module.get_submodule(name).stays_float = True
    _insert_points(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    if not any(isinstance(module, QPoint) for module in graph_module.modules()):
        raise QuantizationError(
            f"{type(model).__name__} has no Conv2d or Linear layer that it calls as a module, so there is nothing to "
            "quantize; choose 16 or 32 bits instead."
        )
    return graph_module


def quantized_layers(prepared: fx.GraphModule) -> tuple[str, ...]:
    """Names of the Conv2d and Linear layers whose weights become integers, in execution order."""
    names = (str(node.target) for node in prepared.graph.nodes if _kind(node, prepared) in _INTEGER_LAYERS)
    return tuple(dict.fromkeys(names))


def quantization_points(prepared: nn.Module) -> dict[str, QPoint]:
    """Every `QPoint` by its name in the graph."""
    return {name: module for name, module in prepared.named_modules() if isinstance(module, QPoint)}


def left_float(prepared: fx.GraphModule) -> list[dict[str, str]]:
    """The parts with weights, and the attention, that stay in floating point: `layer`, `type`, and `reason` in a user's
    words."""
    integer, products = set(quantized_layers(prepared)), decompose.products(prepared)
    parts = [{"layer": name, "type": kind, "reason": _PRODUCT} for name, kind in products.items()]
    for name, module in prepared.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        inside = any(name.startswith(parent + ".") and isinstance(prepared.get_submodule(parent), nn.MultiheadAttention)
                     for parent in _parents(name))  # fmt: skip
        if not own or name in integer or name in products or inside:
            continue
        if type(module) is nn.Module or module is prepared:  # what tracing leaves of a module: its learned constants
            parts += [
                {"layer": f"{name}.{key}".lstrip("."), "type": "Parameter", "reason": _LEARNED_CONSTANT} for key in own
            ]
        else:
            parts.append({"layer": name, "type": type(module).__name__, "reason": _why_float(module)})
    return parts


_PRODUCT = "attention multiplies activations with each other, which stays in floating point"
_LEARNED_CONSTANT = "a learned constant is added or multiplied in floating point"


def readers_of(prepared: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """The layers that read each quantization point's integers, directly or through pools and reshapes."""
    found = {}
    for node in prepared.graph.nodes:
        if _kind(node, prepared) == "point":
            found[str(node.target)] = tuple(dict.fromkeys(_layers_behind(node, prepared)))
    return found


def _layers_behind(node: fx.Node, prepared: fx.GraphModule) -> Iterator[str]:
    for user in node.users:
        kind = _kind(user, prepared)
        if kind in _INTEGER_LAYERS:
            yield str(user.target)
        elif kind in ("maxpool", "shape"):
            yield from _layers_behind(user, prepared)


def _parents(name: str) -> Iterator[str]:
    pieces = name.split(".")
    return (".".join(pieces[:i]) for i in range(1, len(pieces)))


def _why_float(module: nn.Module) -> str:
    if getattr(module, "stays_float", False):
        return "it is kept in floating point, as asked"
    if isinstance(module, nn.MultiheadAttention):
        return _PRODUCT
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "this BatchNorm does not follow a convolution directly, so it cannot be folded into one"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return "normalisation computes its statistics from each image and needs floating point"
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return "the model reads this layer's weights itself instead of calling the layer"
    return f"there is no integer kernel for {type(module).__name__}"


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return decompose.trace(model)
    except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
        raise QuantizationError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); quantization needs a forward() without "
            "branches on tensor values."
        ) from error


def _kind(node: fx.Node, graph_module: fx.GraphModule) -> str:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if getattr(module, "stays_float", False):
            return "other"
        return "point" if isinstance(module, QPoint) else _KIND_OF.get(type(module), "other")
    kind = _KIND_OF.get(node.target, "other") if node.op in ("call_function", "call_method") else "other"
    return "other" if kind == "add" and not _is_tensor_add(node) else kind


def _is_tensor_add(node: fx.Node) -> bool:
    """Whether two computed tensors are added; a learned constant (position embedding) or a number does not count."""
    plain = len(node.args) == 2 and not node.kwargs
    return plain and all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in node.args)


def _make_plain(graph_module: fx.GraphModule) -> None:
    """Drop what eval mode ignores, and replace in-place operations: a point must not see its tensor change later."""
    for module in graph_module.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    for node in list(graph_module.graph.nodes):
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function":
            node.target = _PLAIN.get(node.target, node.target)
        elif node.op == "call_method" and node.target in ("add_", "relu_", "sigmoid_"):
            node.target = str(node.target).rstrip("_")
        if _kind(node, graph_module) == "removed":
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _insert_points(graph_module: fx.GraphModule) -> None:
    tensors = _tensors_to_quantize(graph_module)
    points: dict[fx.Node, QPoint] = {}
    for tensor in tensors:
        name = f"q_{tensor.name}"
        point = QPoint(name, str(tensor.target) if tensor.op == "call_module" else tensor.name)
        graph_module.add_submodule(name, point)
        with graph_module.graph.inserting_after(tensor):
            node = graph_module.graph.call_module(name, (tensor,))
        tensor.replace_all_uses_with(node, delete_user_cb=lambda user, own=node: user is not own)
        points[node] = point
    for node, point in points.items():
        point.non_negative = _non_negative(node.args[0], graph_module)
        point.clipped_above = _kind(node.args[0], graph_module) == "relu6"
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
    chosen: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        kind = _kind(node, graph_module)
        result = _after_relu(node, graph_module)
        if kind == "conv" and not _only_floats_read(result, graph_module):
            chosen[result] = None
        if kind == "concat" and node in readers:
            chosen[node] = None
        read = any(user in readers for user in node.users)
        passes_scale = kind == "maxpool" and node in readers
        makes_tensor = node.op != "get_attr" and not _makes_list(node)
        if read and makes_tensor and not passes_scale:
            chosen[node] = None
    return [node for node in graph_module.graph.nodes if node in chosen and not _only_feeds_output(node)]


def _only_floats_read(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether layers that are kept in floating point, to be spared the rounding, are all that reads it."""
    modules = [graph_module.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    return len(modules) == len(node.users) and all(getattr(module, "stays_float", False) for module in modules)


def _only_feeds_output(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _makes_list(node: fx.Node) -> bool:
    return node.target in (torch.chunk, torch.split, "chunk", "split")


def _integer_readers(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Layers always; additions, concatenations and pools only when an integer kernel reads their result.

    An addition before a LayerNorm, say, gains nothing from integers and would only lose accuracy.
    """
    readers: set[fx.Node] = set()
    passes: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        kind = _kind(node, graph_module)
        feeds_integers = any(user in readers or user in passes for user in node.users)
        if kind in _INTEGER_LAYERS or (kind in _INTEGER_WHEN_READ and feeds_integers):
            readers.add(node)
        elif kind in ("relu", "relu6", "shape", "point") and feeds_integers:
            passes.add(node)
    return readers


def _after_relu(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    only = next(iter(node.users)) if len(node.users) == 1 else None
    return only if only is not None and _kind(only, graph_module) in ("relu", "relu6") else node


def _non_negative(node: object, graph_module: fx.GraphModule) -> bool:
    if not isinstance(node, fx.Node):
        return False
    kind = _kind(node, graph_module)
    if kind in ("relu", "relu6", "sigmoid"):
        return True
    if kind == "add":
        return all(_non_negative(arg, graph_module) for arg in node.args)
    if kind == "concat":
        return all(_non_negative(arg, graph_module) for arg in _concatenated(node))
    return kind in ("maxpool", "avgpool", "shape", "point") and _non_negative(node.args[0], graph_module)


def _concatenated(node: fx.Node) -> tuple[fx.Node, ...]:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    return tuple(tensors) if isinstance(tensors, (list, tuple)) else ()


def _share_scales(graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> None:
    """Concatenation copies integers, so its inputs and its result must mean the same by them; so does what only moves
    them, which would round a second time and keep runtimes from dropping the pair."""
    for node, point in points.items():
        made = node.args[0]
        if _kind(made, graph_module) == "concat":
            inputs = [_point_of(arg, graph_module, points) for arg in _concatenated(made)]
        elif _kind(made, graph_module) == "shape":
            inputs = [_point_of(made, graph_module, points)]
        else:
            continue
        members = [point, *(member for member in inputs if member is not None)]
        if len(members) == 1:
            continue
        merged = {member.scale_group for member in members} - {""}
        group = f"{_kind(made, graph_module)}_{made.name}"
        for other in points.values():
            if other in members or other.scale_group in merged:
                other.scale_group = group
    for group in {point.scale_group for point in points.values()} - {""}:
        members = [point for point in points.values() if point.scale_group == group]
        non_negative = all(point.non_negative for point in members)
        for point in members:
            point.non_negative = non_negative


def _point_of(node: fx.Node, graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> QPoint | None:
    while node not in points and _kind(node, graph_module) in ("maxpool", "shape"):
        node = node.args[0]
    return points.get(node)


def _mark_fused_by_tensorrt(graph_module: fx.GraphModule, points: dict[fx.Node, QPoint]) -> None:
    """TensorRT computes conv + add + ReLU and conv + activation in one kernel when no Q/DQ stands between them.

    Of two convolutions that meet in one addition only one is fused; the other hands over integers. (NVIDIA TensorRT
    developer guide, "Q/DQ placement recommendations".)
    """
    taken: set[fx.Node] = set()
    readers = _integer_readers(graph_module)
    for node, point in points.items():
        if _kind(node.args[0], graph_module) != "conv":
            continue
        users = [user for user in node.users if user.op != "output"]
        if all(user not in readers for user in users):
            point.only_onnxruntime = True
        elif len(users) == 1 and _kind(users[0], graph_module) == "add" and users[0] not in taken:
            point.only_onnxruntime = True
            taken.add(users[0])
