"""What each module type, function and method does to the channels of a tensor."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

ELEMENTWISE_MODULES = frozenset(
    {
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Sigmoid,
        nn.Tanh,
        nn.Softplus,
        nn.Softsign,
        nn.LogSigmoid,
        nn.Dropout,
        nn.Dropout2d,
        nn.AlphaDropout,
    }
)
"""Each value depends on its own value alone, so the channels pass wherever they are."""

CHANNELWISE_MODULES = frozenset({nn.BatchNorm2d, nn.BatchNorm1d, nn.PReLU})
"""One parameter per channel of dimension 1."""

POOLING_MODULES = frozenset(
    {
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
        nn.ZeroPad2d,
        nn.ReflectionPad2d,
        nn.ReplicationPad2d,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
    }
)
"""Positions are combined or moved within each channel of dimension 1."""

ELEMENTWISE = frozenset(
    {
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "softplus",
        "softsign",
        "logsigmoid",
        "dropout",
        "dropout2d",
        "alpha_dropout",
        "clamp",
        "clamp_",
        "contiguous",
        "clone",
        "detach",
        "float",
        "neg",
        "abs",
        "square",
        "stochastic_depth",
    }
)
POOLING = frozenset(
    {
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "interpolate",
    }
)
ADDITIVE = frozenset({"add", "iadd", "add_", "sub", "isub", "sub_"})
MULTIPLICATIVE = frozenset({"mul", "imul", "mul_", "div", "truediv", "div_"})
RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "expand", "expand_as"})
INFORMATION = frozenset(
    {
        "size",
        "dim",
        "numel",
        "getattr",
        "getitem",
        "len",
        "floordiv",
        "eq",
        "ne",
        "lt",
        "gt",
        "le",
        "ge",
        "mul",
        "add",
        "sub",
        "_assert",
        "truediv",
        "mod",
        "int",
    }
)
"""May read a tensor's shape; the result is no tensor."""

_OTHERS = frozenset({"cat", "concat", "concatenate", "permute", "transpose", "mean", "sum", "pow"})


def _functions() -> dict[object, str]:
    names = ELEMENTWISE | POOLING | ADDITIVE | MULTIPLICATIVE | RESHAPES | INFORMATION | _OTHERS
    found: dict[object, str] = {stochastic_depth: "stochastic_depth", getattr: "getattr", len: "len"}
    for name in sorted(names):
        for namespace in (F, torch, operator):
            function = getattr(namespace, name, None)
            if callable(function):
                found[function] = name
    return found


_NAMES = _functions()


def operation_name(node: fx.Node) -> str:
    """The name under which an operation is known here: of the method, or of torch's function."""
    if isinstance(node.target, str):
        return node.target
    known = _NAMES.get(node.target)
    return known or getattr(node.target, "__name__", str(node.target))
