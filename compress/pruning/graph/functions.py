"""What each function and method of torch does to the channels of the tensors that it reads.

A handler gets the analysis, the node and the channels of its first tensor; it returns those of the result, and keeps what
it cannot follow, with the operation and the user's line in the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from compress.pruning.graph.axes import Axis, Part
from compress.pruning.graph.layer_calls import (
    BOTH,
    attribute,
    channelwise,
    functional_layer,
    layer_norm,
    layer_norm_module,
    parameter,
    pixel_shuffle,
    pixel_unshuffle,
    softmax_module,
)
from compress.pruning.graph.layouts import (
    argument,
    arguments,
    dim_argument,
    expanded,
    indexed,
    permuted,
    rank,
    reshaped,
    size_at,
    through,
    transposed,
    untracked,
)
from compress.pruning.graph.operations import ELEMENTWISE, MULTIPLICATIVE, POINTWISE, POOLING, RESHAPES, operation_name
from compress.pruning.graph.tensors import stored
from compress.tracing.graph import number_of, shape_of

if TYPE_CHECKING:
    from compress.pruning.channels import Channels

Handler = Callable[["Channels", fx.Node, Axis | None], Axis | None]


# ---- value by value -----------------------------------------------------------------------------------------------


def _elementwise(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """One tensor, value by value; with more tensors, such as the limits of a clamp, as pointwise."""
    if len(channels.tensor_inputs(node)) > 1:
        return _pointwise(channels, node, source)
    return source


def _pointwise(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """Broadcast tensors, value by value: channels in the same place are united."""
    shape, inputs = shape_of(node), channels.tensor_inputs(node)
    where, name = channels.call_text(node), operation_name(node)
    tracked = [(item, axis) for item in inputs if (axis := channels.axes[item]) is not None]
    if not tracked or shape is None:
        return channels.frozen_axis(node, f"is combined with {where}")
    dims = _channel_dims(channels, tracked)
    (dim, *others) = dims
    if not others:
        _open_parameters(channels, inputs, dim)
    axes = {item: axis for item in inputs if (axis := channels.axes[item]) is not None}
    elsewhere = {item: axis for item, axis in axes.items() if axis.dim - rank(item) != dim}
    stray = [item for item in inputs if size_at(item, dim) > 1 and (item not in axes or item in elsewhere)]
    wide = [axis for item, axis in axes.items() if size_at(item, dim) == shape[dim] and item not in elsewhere]
    if others or stray or not wide:
        reason = channels.fixed_reason(list(elsewhere.values()))
        if reason is None and stray:
            parameter = f"the parameter {stray[0].target}" if stray[0].op == "get_attr" else "a tensor of another shape"
            reason = f"meets {parameter} in {where}, which stays as it is"
        return channels.opaque(node, reason or f"meets a tensor of another shape in {where}")
    for axis in elsewhere.values():
        channels.freeze(axis, f"is combined with {where}")
    join_reason = "their outputs are multiplied" if name in MULTIPLICATIVE else "their outputs are added"
    if name not in MULTIPLICATIVE and name not in _SUMS:
        join_reason = f"their outputs are combined in {where}"
    for other in wide[1:]:
        if not channels.join(wide[0], other, join_reason):
            return channels.opaque(node, f"meets a concatenation with other boundaries in {where}")
    return replace(wide[0], dim=dim + len(shape))


def _channel_dims(channels: Channels, tracked: Sequence[tuple[fx.Node, Axis]]) -> set[int]:
    """Along which dimensions, counted from the last one, the channels lie: those of layers rather than of parameters."""
    dims = {(item, axis): axis.dim - rank(item) for item, axis in tracked}
    layers = {
        dim
        for (item, axis), dim in dims.items()
        if size_at(item, dim) > 1 and any(channels.sets[part.set_id].layers for part in axis.parts)
    }
    wide = {dim for (item, _), dim in dims.items() if size_at(item, dim) > 1}
    return layers or wide or set(list(dims.values())[:1])


_SUMS = frozenset({"add", "iadd", "add_", "sub", "isub", "sub_", "rsub"})


def _open_parameters(channels: Channels, inputs: Sequence[fx.Node], dim: int) -> None:
    """A parameter of several dimensions, such as a map of positions, gets its channels where it meets some."""
    for item in inputs:
        if item.op == "get_attr" and channels.axes[item] is None and size_at(item, dim) > 1:
            tensor = stored(channels.graph_module, str(item.target))
            if isinstance(tensor, torch.Tensor) and not channels.roles.has(tensor):
                channels.axes[item] = channels.roles.opened(str(item.target), tensor, dim + tensor.dim())


# ---- along dimensions ---------------------------------------------------------------------------------------------


def _pooling(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    if source is None:
        return untracked(channels, node)
    return channels.require_dim_one(node, source, channels.call_text(node))


def _along(position: int, default: Any = None) -> Handler:
    """Works along dimensions that stay: the channels' must not be one of them."""

    def handler(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
        if source is None:
            return untracked(channels, node)
        count = rank(channels.tensor_inputs(node)[0])
        dims = dim_argument(node, position, count, default)
        if operation_name(node) == "flip":  # its dimensions may be several arguments
            listed = [number_of(one) for one in arguments(node, position, "dims")]
            dims = {one % count for one in listed if one is not None} if None not in listed else None
        if dims is None or source.dim in dims:
            return through(channels, node)
        return source

    return handler


def _reduction(position: int, *, exact: bool = False) -> Handler:
    """Dimensions go. Over the channels themselves, only what a removed channel adds nothing to (`exact`) can lose some."""

    def handler(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
        if source is None:
            return untracked(channels, node)
        if len(channels.tensor_inputs(node)) > 1:
            return _pointwise(channels, node, source)
        old = shape_of(channels.tensor_inputs(node)[0])
        if old is None:
            return through(channels, node)
        dims = dim_argument(node, position, len(old)) or set(range(len(old)))
        if source.dim in dims:
            if exact:
                return channels.frozen_axis(node, f"is tied to the result of {channels.call_text(node)}")
            return through(channels, node)
        keeps = argument(node, position + 1, "keepdim", "keepdims", default=False)
        gone = 0 if keeps else sum(dim < source.dim for dim in dims)
        return replace(source, dim=source.dim - gone)

    return handler


def _split(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`chunk`, `split`, `narrow`: parts along another dimension than the channels'."""
    if source is None:
        return untracked(channels, node)
    narrows = operation_name(node) in ("narrow", "index_select")
    count = rank(channels.tensor_inputs(node)[0])
    dims = dim_argument(node, 1 if narrows else 2, count, 0)
    if dims is None or source.dim in dims:
        return channels.opaque(node, f"its channels are divided by {channels.call_text(node)}")
    return source


def _unbound(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`unbind`, `select`: one dimension goes."""
    if source is None:
        return untracked(channels, node)
    dims = dim_argument(node, 1, rank(channels.tensor_inputs(node)[0]), 0)
    if dims is None or source.dim in dims:
        return channels.opaque(node, f"its channels are divided by {channels.call_text(node)}")
    return replace(source, dim=source.dim - (min(dims) < source.dim))


def _padded(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`F.pad`: pairs of widths, from the last dimension back."""
    if source is None:
        return untracked(channels, node)
    widths = arguments(node, 1, "pad")
    behind = rank(node) - 1 - source.dim
    own = widths[2 * behind : 2 * behind + 2]
    if any(width != 0 for width in own):
        return channels.opaque(node, f"its channels are padded by {channels.call_text(node)}")
    return source


# ---- several tensors ----------------------------------------------------------------------------------------------


def _concatenate(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """Along the channels they follow each other; along another dimension they are the same channels."""
    shape, items = shape_of(node), argument(node, 0, "tensors")
    where = channels.call_text(node)
    dim = number_of(argument(node, 1, "dim", "axis", default=0))
    axes = _axes_along_one_dim(channels, items)
    if shape is None or dim is None or not axes:
        return channels.opaque(node, f"its channels are joined with others along another dimension by {where}")
    if axes[0].dim == dim % len(shape):
        return Axis(dim % len(shape), tuple(part for axis in axes for part in axis.parts))
    return _same_channels(channels, node, axes)


def _stack(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """A new dimension, along which lie the same channels."""
    shape, items = shape_of(node), argument(node, 0, "tensors")
    dim = number_of(argument(node, 1, "dim", "axis", default=0))
    axes = _axes_along_one_dim(channels, items)
    if shape is None or dim is None or not axes:
        return through(channels, node)
    joined = _same_channels(channels, node, axes)
    return replace(axes[0], dim=axes[0].dim + (dim % len(shape) <= axes[0].dim)) if joined is axes[0] else joined


def _axes_along_one_dim(channels: Channels, items: Any) -> list[Axis]:
    """The channels of several tensors; none where one has no channels that are followed, or along another dimension."""
    nodes = items if isinstance(items, list | tuple) else ()
    axes = [axis for item in nodes if (axis := channels.axes.get(item)) is not None]
    return axes if len(axes) == len(nodes) and len({axis.dim for axis in axes}) == 1 else []


def _same_channels(channels: Channels, node: fx.Node, axes: Sequence[Axis]) -> Axis | None:
    for other in axes[1:]:
        if not channels.join(axes[0], other, f"their outputs lie side by side in {channels.call_text(node)}"):
            return channels.opaque(node, f"meets a concatenation with other boundaries in {channels.call_text(node)}")
    return axes[0]


def _matmul(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """A matrix that is a parameter: its rows go with the channels which they meet."""
    inputs = channels.tensor_inputs(node)
    tensor = parameter(channels, inputs[1]) if len(inputs) == 2 else None
    if source is None or tensor is None or tensor.dim() != 2 or source.dim != rank(inputs[0]) - 1:
        return through(channels, node)
    before = channels.roles.dims(tensor).get(1)
    gives = before or Axis(1, (Part(channels.sets.new(tensor.shape[1]), tensor.shape[1]),))
    channels.roles.bind({str(inputs[1].target): (tensor, {0: source, 1: gives})}, channels.call_text(node))
    return replace(gives, dim=rank(node) - 1)


def _einsum(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """One letter for the channels, in one tensor and in parameters; summed over, removed channels add nothing."""
    equation: Any = node.args[0]
    items: tuple[Any, ...] = node.args[1:]
    items = tuple(items[0]) if len(items) == 1 and isinstance(items[0], list | tuple) else items
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return through(channels, node)
    reads, gives = equation.replace(" ", "").split("->")
    terms = reads.split(",")
    lettered = [(item, term, channels.axes.get(item)) for item, term in zip(items, terms, strict=True)]
    tracked = [(term[axis.dim], axis) for item, term, axis in lettered if axis is not None and item.op != "get_attr"]
    if len(tracked) != 1:
        return through(channels, node)
    letter, axis = tracked[0]
    for item, term, _ in lettered:
        tensor = parameter(channels, item)
        if letter in term and tensor is not None and not channels.roles.has(tensor):
            channels.axes[item] = channels.roles.opened(str(item.target), tensor, term.index(letter))
    for item, term, _ in lettered:
        own = channels.axes.get(item)
        if letter in term and (own is None or own.dim != term.index(letter) or not channels.join(axis, own, BOTH)):
            return through(channels, node)
    if letter in gives:
        return replace(axis, dim=gives.index(letter))
    return channels.frozen_axis(node, f"is tied to the result of {channels.call_text(node)}")


AS_MODULES: dict[type[nn.Module], Handler] = {
    nn.Softmax: softmax_module,
    nn.LogSoftmax: softmax_module,
    nn.LayerNorm: layer_norm_module,
    nn.PixelShuffle: pixel_shuffle,
    nn.PixelUnshuffle: pixel_unshuffle,
}

READ_WEIGHTS = frozenset({"conv2d", "linear", "matmul"})
"""Operations whose handler says itself what becomes of a parameter with several dimensions."""

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(POOLING, _pooling),
    **dict.fromkeys(RESHAPES, reshaped),
    **dict.fromkeys(("expand", "expand_as", "repeat"), expanded),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transposed),
    "permute": permuted,
    "getitem": indexed,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    "stack": _stack,
    **dict.fromkeys(("mean", "amax", "amin", "max", "min", "median", "prod", "std", "var", "logsumexp"), _reduction(1)),
    "sum": _reduction(1, exact=True),
    "norm": _reduction(2, exact=True),
    **dict.fromkeys(("softmax", "log_softmax", "flip", "cumsum", "sort"), _along(1)),
    "roll": _along(2),
    "normalize": _elementwise,
    "getattr": attribute,
    **dict.fromkeys(("chunk", "split", "tensor_split", "narrow", "index_select"), _split),
    **dict.fromkeys(("unbind", "select"), _unbound),
    "pad": _padded,
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), channelwise),
    "layer_norm": layer_norm,
    **dict.fromkeys(("conv2d", "linear"), functional_layer),
    "matmul": _matmul,
    "einsum": _einsum,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
