"""What layers called as functions, and modules without a set of channels of their own, do to the channels they read."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from compress.pruning.graph.axes import Axis
from compress.pruning.graph.layouts import argument, arguments, rank, size_at, through, untracked
from compress.pruning.graph.operations import operation_name
from compress.pruning.graph.tensors import stored
from compress.tracing.graph import number_of, shape_of

if TYPE_CHECKING:
    from compress.pruning.channels import Channels

BOTH = "their channels are multiplied"


def parameter(channels: Channels, node: Any) -> torch.Tensor | None:
    """The tensor, of any shape, that `node` reads as an attribute of the model; None where it reads anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = stored(channels.graph_module, str(node.target))
    return tensor if isinstance(tensor, torch.Tensor) else None


# ---- layers called as functions -----------------------------------------------------------------------------------


def channelwise(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`batch_norm`, `instance_norm`, `prelu`: vectors of a number for each channel."""
    axis = source and channels.require_dim_one(node, source, channels.call_text(node))
    if axis is None or axis is not source:
        return axis or untracked(channels, node)
    for item in channels.tensor_inputs(node)[1:]:
        own = channels.axes[item]
        if size_at(item, -1) > 1 and (own is None or not channels.join(axis, replace(own, dim=1), BOTH)):
            return channels.opaque(node, f"meets a tensor in {channels.call_text(node)}, which stays as it is")
    return axis


def layer_norm(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    shape = arguments(node, 1, "normalized_shape")
    if source is None or source.dim >= rank(node) - len(shape):
        return channels.opaque(node, f"feeds {channels.call_text(node)}, which normalises over the channels")
    return source


def functional_layer(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`conv2d`, `linear` with the weight of a layer of their own, or with a fixed filter for each channel."""
    weight = argument(node, 1, "weight")
    owner, key = str(weight.target).rpartition(".")[::2] if parameter(channels, weight) is not None else ("", "")
    layer = channels.modules.get(owner)
    bias = argument(node, 2, "bias")
    own_bias = bias is None or (isinstance(bias, fx.Node) and str(bias.target) == f"{owner}.bias")
    if key == "weight" and own_bias and bool(bias is not None) == (getattr(layer, "bias", None) is not None):
        if operation_name(node) == "conv2d" and isinstance(layer, nn.Conv2d):
            return channels.conv(node, owner, layer, source)
        if operation_name(node) == "linear" and isinstance(layer, nn.Linear):
            return channels.linear(node, owner, layer, source)
    if operation_name(node) == "conv2d" and bias is None and source is not None and source.dim == 1:
        return _filtered(channels, node, source, weight)
    return through(channels, node)


def _filtered(channels: Channels, node: fx.Node, source: Axis, weight: Any) -> Axis | None:
    """A depthwise convolution whose filters are no layer's: a blur, a fixed derivative."""
    groups, size = argument(node, 6, "groups", default=1), (shape_of(channels.tensor_inputs(node)[0]) or (0, 0))[1]
    shape = shape_of(weight) if isinstance(weight, fx.Node) else None
    if number_of(groups) != size or shape is None or shape[0] != size:
        return through(channels, node)
    if not isinstance(groups, fx.Node):
        return channels.opaque(node, f"its channels are counted by a fixed number in {channels.call_text(node)}")
    tensor = parameter(channels, weight)
    if tensor is not None:
        channels.roles.bind({str(weight.target): (tensor, {0: source})}, str(weight.target))
        channels.roles.names[id(tensor)] = str(weight.target)
        return source
    if operation_name(weight) in ("expand", "repeat") and (shape_of(weight.args[0]) or (0,))[0] == 1:
        return source if isinstance(arguments(weight, 1)[0], fx.Node) else through(channels, node)
    own = channels.axes.get(weight)
    if own is not None and own.dim == 0 and channels.join(source, own, BOTH):
        return source
    return through(channels, node)


def attribute(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`.values` and `.indices` of what gives several tensors; of a matrix `.T`."""
    if source is not None and isinstance(node.args[0], fx.Node) and shape_of(node.args[0]) is None:
        return source
    if source is not None and node.args[1] == "T" and rank(node) == 2:
        return replace(source, dim=1 - source.dim)
    return through(channels, node)


# ---- pixels and channels ------------------------------------------------------------------------------------------


def pixel_shuffle(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """A square of neighbouring channels becomes a square of pixels: it is kept or removed as a whole."""
    factor = _factor(channels, node, "upscale_factor")
    if source is None or source.dim != 1 or factor is None or any(part.span != 1 for part in source.parts):
        return through(channels, node)
    if any(part.channels % factor**2 for part in source.parts):
        return through(channels, node)
    for part in source.parts:
        reason = f"each square of {factor**2} channels that {channels.call_text(node)} makes pixels of is kept or removed as a whole"
        channels.sets.require_units(part.set_id, factor**2, reason)
    return source.spanned(Fraction(1, factor**2))


def pixel_unshuffle(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    factor = _factor(channels, node, "downscale_factor")
    if source is None or source.dim != 1 or factor is None or any(part.span < 1 for part in source.parts):
        return through(channels, node)
    return source.spanned(Fraction(factor**2))


def _factor(channels: Channels, node: fx.Node, name: str) -> int | None:
    if node.op == "call_module":
        return int(getattr(channels.modules[str(node.target)], name))
    return number_of(argument(node, 1, name))


# ---- modules that are functions -----------------------------------------------------------------------------------


def softmax_module(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    dim = channels.modules[str(node.target)].dim
    if source is None or dim is None or source.dim == dim % rank(node):
        return through(channels, node)
    return source


def layer_norm_module(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    name = str(node.target)
    if source is None or source.dim >= rank(node) - len(channels.modules[name].normalized_shape):
        return channels.opaque(node, f"feeds LayerNorm ({name}), which mixes or counts its channels")
    return source
