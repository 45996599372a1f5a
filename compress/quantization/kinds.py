"""What the nodes of a prepared graph compute, in the terms of integer kernels."""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops import stochastic_depth

# What a node computes, by module class, function or tensor method. Anything not listed is "other" and stays float.
_KINDS: dict[str, tuple[object, ...]] = {
    "conv": (nn.Conv2d,),
    "linear": (nn.Linear,),
    "add": (operator.add, torch.add, "add"),
    "concat": (torch.cat, torch.concat, torch.concatenate),
    "maxpool": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    "avgpool": (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    "relu": (nn.ReLU, F.relu, torch.relu, "relu"),
    "relu6": (nn.ReLU6, F.relu6),
    "sigmoid": (nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid"),
    "shape": (nn.Flatten, torch.flatten, operator.getitem, torch.transpose, torch.permute, torch.reshape, torch.chunk,
              torch.split, "flatten", "view", "reshape", "transpose", "permute", "contiguous", "chunk", "split"),
    "dropped": (nn.Dropout, nn.Dropout2d, nn.Identity, F.dropout, F.dropout2d, stochastic_depth),
}  # fmt: skip
_KIND_OF = {target: kind for kind, targets in _KINDS.items() for target in targets}
LAYERS = ("conv", "linear")
"""Kinds with integer weights."""
RELUS = ("relu", "relu6")
SHAPE = "shape"
"""Key of a node's meta: the shape of the tensor that it gives on the images of `prepare`, or None for anything else."""
FLOAT_LAYERS, OWN_READS = "float_layers", "own_reads"
"""Keys of the graph module's meta: names of layers that are asked to stay in floating point, and of those whose tensors
the model also reads itself."""


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


def kind(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """The kind of operation, `point` for a quantization point, `other` for what integer kernels do not know."""
    if node.op == "call_module":
        if is_float(str(node.target), graph_module):
            return "other"
        module = graph_module.get_submodule(str(node.target))
        return "point" if isinstance(module, QPoint) else _KIND_OF.get(type(module), "other")
    operation = _KIND_OF.get(node.target, "other") if node.op in ("call_function", "call_method") else "other"
    if operation == "dropped" and _drops(node):
        return "other"
    return "other" if operation == "add" and not _is_tensor_add(node) else operation


def layer_at(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """The layer with integer weights of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear), f"{name} is a {type(layer).__name__}"
    return layer


def first_operand(node: fx.Node) -> fx.Node:
    """The node whose result `node` reads as its first argument."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node), f"{node.name} reads {operand!r}"
    return operand


def is_float(layer: str, graph_module: fx.GraphModule) -> bool:
    """Whether this layer was asked to stay in floating point, or has to because the model reads its tensors itself."""
    return any(layer in graph_module.meta.get(key, ()) for key in (FLOAT_LAYERS, OWN_READS))


def operands(node: fx.Node, operation: str) -> tuple[fx.Node, ...]:
    """The tensors that an operation of the kind `operation` computes with; sizes and other arguments are none."""
    if operation == "add":
        return tuple(arg for arg in node.args if isinstance(arg, fx.Node))
    if operation == "concat":
        tensors = node.args[0] if node.args else node.kwargs["tensors"]
        listed = tensors if isinstance(tensors, list | tuple) else [tensors]
        return tuple(tensor for tensor in listed if isinstance(tensor, fx.Node))
    first = node.args[0] if node.args else node.kwargs.get("input")
    return (first,) if isinstance(first, fx.Node) else ()


def makes_list(node: fx.Node) -> bool:
    """Whether it gives several tensors at once."""
    return node.target in (torch.chunk, torch.split, "chunk", "split")


def is_tensor(node: fx.Node) -> bool:
    """Whether it gave one tensor when `prepare` ran the graph; sizes are none."""
    return node.meta.get(SHAPE, ()) is not None


def _is_tensor_add(node: fx.Node) -> bool:
    """Whether two computed tensors are added; a learned constant (position embedding) or a number does not count."""
    plain = len(node.args) == 2 and not node.kwargs
    return plain and all(isinstance(arg, fx.Node) and arg.op != "get_attr" and is_tensor(arg) for arg in node.args)


def _drops(node: fx.Node) -> bool:
    """Whether a dropout function is called so that it drops in eval mode, too."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments["training"] is not False and bound.arguments["p"] != 0
