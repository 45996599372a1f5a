"""What each module type, function and method does to the channels of a tensor."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

ELEMENTWISE_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "Identity ReLU ReLU6 Hardtanh LeakyReLU RReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Sigmoid Tanh "
        "Softplus Softsign LogSigmoid Hardshrink Softshrink Tanhshrink Threshold "
        "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
    ).split()
)
"""Each value depends on its own value alone, so the channels pass wherever they are."""

CHANNELWISE_MODULES = (nn.BatchNorm2d, nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.InstanceNorm1d, nn.PReLU)
"""Each channel of dimension 1 is treated alone, with parameters of its own."""

POOLING_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "MaxPool1d MaxPool2d AvgPool1d AvgPool2d LPPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool2d ZeroPad2d "
        "ConstantPad2d CircularPad2d ReflectionPad2d ReplicationPad2d Upsample UpsamplingNearest2d UpsamplingBilinear2d"
    ).split()
)
"""Positions are combined or moved within each channel of dimension 1."""

ELEMENTWISE = frozenset(
    (
        "relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ rrelu elu elu_ selu celu gelu silu mish hardswish "
        "hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid hardshrink softshrink tanhshrink threshold "
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth "
        "clamp clamp_ clamp_min clamp_max clip neg abs abs_ square sqrt rsqrt exp log log1p expm1 reciprocal sign erf sin "
        "cos floor ceil round nan_to_num isnan logical_not contiguous clone detach float half double bool to type_as type "
        "zeros_like ones_like"
    ).split()
)
POINTWISE = frozenset(
    (
        "add iadd add_ sub isub sub_ rsub mul imul mul_ div truediv itruediv div_ floordiv pow remainder fmod minimum maximum "
        "where lerp addcmul addcdiv masked_fill masked_fill_ eq ne lt gt le ge logical_and logical_or and_ or_ atan2 hypot"
    ).split()
)
"""Each value depends on the values at the same place of several tensors, which torch broadcasts."""
MULTIPLICATIVE = frozenset("mul imul mul_ div truediv itruediv div_".split())
POOLING = frozenset(
    (
        "max_pool1d max_pool2d avg_pool1d avg_pool2d lp_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d "
        "interpolate upsample"
    ).split()
)
RESHAPES = frozenset("flatten unflatten view reshape reshape_as view_as squeeze unsqueeze".split())
INFORMATION = frozenset("size dim numel getattr len _assert ndimension element_size".split())
"""Reads a tensor's shape; the result is no tensor."""

_OTHERS = frozenset(
    (
        "getitem mod int cat concat concatenate stack permute transpose swapaxes swapdims mean sum amax amin max min median prod std "
        "var logsumexp norm argmax normalize chunk split tensor_split unbind narrow select index_select flip roll softmax "
        "log_softmax cumsum sort pad pixel_shuffle pixel_unshuffle expand expand_as repeat conv2d conv_transpose2d linear "
        "batch_norm instance_norm prelu layer_norm matmul einsum bmm getattr setitem mod"
    ).split()
)


def _functions() -> dict[object, str]:
    names = ELEMENTWISE | POINTWISE | POOLING | RESHAPES | INFORMATION | _OTHERS
    known: dict[object, str] = {
        stochastic_depth: "stochastic_depth",
        getattr: "getattr",
        len: "len",
        max: "max",
        min: "min",
    }
    for name in sorted(names):
        for namespace in (F, torch, operator):
            function = getattr(namespace, name, None)
            if callable(function):
                known[function] = name
    return known


_NAMES = _functions()


def operation_name(node: fx.Node) -> str:
    """The name under which an operation is known here: of the method, or of torch's function.

    A function that is not torch's keeps its own name in parentheses, which is never mistaken for one of torch's.
    """
    if isinstance(node.target, str):
        return node.target
    known = _NAMES.get(node.target)
    return known or f"({getattr(node.target, '__name__', str(node.target))})"
