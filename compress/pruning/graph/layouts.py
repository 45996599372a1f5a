"""Operations that change a tensor's shape: where its channels are afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import fx

from compress.pruning.graph.axes import Axis
from compress.pruning.graph.operations import operation_name
from compress.tracing.graph import number_of, shape_of

if TYPE_CHECKING:
    from compress.pruning.channels import Channels


def untracked(channels: Channels, node: fx.Node) -> Axis | None:
    """The result for a tensor whose channels could not be followed: what it is combined with is frozen."""
    return channels.opaque(node, f"is combined with the result of {channels.call_text(node)}")


def through(channels: Channels, node: fx.Node) -> Axis | None:
    """The result of an operation that mixes or moves channels: they are frozen."""
    return channels.opaque(node, f"its channels go through {channels.call_text(node)}")


def rank(node: fx.Node) -> int:
    """How many dimensions the tensor of a node has."""
    return len(shape_of(node) or ())


def size_at(node: fx.Node, dim_from_the_end: int) -> int:
    """Its size along a dimension counted from the last one, 1 where it has no such dimension."""
    shape = shape_of(node) or ()
    return shape[dim_from_the_end] if len(shape) >= -dim_from_the_end else 1


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call by its position behind the tensor, which is 0, or by one of its names."""
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    position -= "input" in node.kwargs
    return node.args[position] if position < len(node.args) else default


def arguments(node: fx.Node, position: int, *names: str) -> tuple[Any, ...]:
    """The same for a list that may be written as one argument or as several."""
    value = argument(node, position, *names)
    if isinstance(value, list | tuple):
        return tuple(value)
    return tuple(node.args[position:]) if value is not None else ()


def dim_argument(node: fx.Node, position: int, count: int, default: Any = None) -> set[int] | None:
    """The dimensions that a call works along, counted from 0; None where it has no such argument or they are not numbers."""
    value = argument(node, position, "dim", "axis", "dims", default=default)
    dims = [number_of(one) for one in (value if isinstance(value, list | tuple) else (value,))]
    known = {one % count for one in dims if one is not None}
    return known if value is not None and None not in dims else None


def reshaped(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """A reshape keeps the channels where a dimension has as many places, behind as many before it, or each flattened."""
    if source is None:
        return channels.opaque(node, f"is combined with the result of {channels.call_text(node)}")
    old, new = shape_of(channels.tensor_inputs(node)[0]), shape_of(node)
    if old is None or new is None:
        return channels.opaque(node, f"its channels are rearranged by {channels.call_text(node)}")
    before, size = math.prod(old[: source.dim]), old[source.dim]
    for dim, width in enumerate(new):
        if math.prod(new[:dim]) != before or width == 1 < size:
            continue
        axis = _at(source, dim, size, width, old[source.dim + 1 :])
        if axis is not None:
            fixed = _written_size(node, dim, new)
            counted = f"its channels are counted by a fixed number in {channels.call_text(node)}"
            return channels.opaque(node, counted) if fixed and size > 1 else axis
    return channels.opaque(node, f"its channels are rearranged by {channels.call_text(node)}")


def _at(source: Axis, dim: int, size: int, width: int, behind: tuple[int, ...]) -> Axis | None:
    """The channels along `dim` of `width` places, which were `size` places with the dimensions `behind` them."""
    if width == size:
        return replace(source, dim=dim)
    flattened = [math.prod(behind[:count]) for count in range(1, len(behind) + 1)]
    if any(width == size * count for count in flattened):
        return replace(source.spanned(Fraction(width, size)), dim=dim)
    places = Fraction(width, size)
    if places < 1 and all((part.span * places).denominator == 1 for part in source.parts):
        return replace(source.spanned(places), dim=dim)
    return None


def _written_size(node: fx.Node, dim: int, new: tuple[int, ...]) -> bool:
    """Whether the new size at `dim` is a literal number in the user's code, which a pruned layer would no longer have."""
    if node.op == "call_module" or operation_name(node) not in ("view", "reshape", "unflatten"):
        return False
    sizes = arguments(node, 1, "shape", "size")
    return len(sizes) == len(new) and isinstance(sizes[dim], int) and sizes[dim] != -1


def expanded(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """Dimensions of one place are repeated; sizes line up from the last one."""
    old, new = shape_of(channels.tensor_inputs(node)[0]), shape_of(node)
    if source is None or old is None or new is None:
        return channels.opaque(node, f"is combined with the result of {channels.call_text(node)}")
    dim = source.dim + len(new) - len(old)
    if new[dim] != old[source.dim]:
        like = node.args[1] if operation_name(node) == "expand_as" and len(node.args) > 1 else None
        axis = channels.axes.get(like) if isinstance(like, fx.Node) else None
        return axis or channels.opaque(node, f"its channels are repeated by {channels.call_text(node)}")
    sizes = arguments(node, 1, "sizes", "size", "repeats") if operation_name(node) != "expand_as" else ()
    if operation_name(node) == "expand" and old[source.dim] > 1 and isinstance(sizes[dim], int) and sizes[dim] != -1:
        return channels.opaque(node, f"its channels are counted by a fixed number in {channels.call_text(node)}")
    return replace(source, dim=dim)


def permuted(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`permute`: the dimensions in another order."""
    dims = [number_of(one) for one in arguments(node, 1, "dims")]
    order = [one % len(dims) for one in dims if one is not None]
    if source is None or not order or len(order) < len(dims):
        return channels.opaque(node, f"its channels are rearranged by {channels.call_text(node)}")
    return replace(source, dim=order.index(source.dim))


def transposed(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`transpose`, `swapaxes`: two dimensions change places."""
    pair = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
    count = rank(node)
    if source is None or not count or not all(isinstance(one, int) for one in pair):
        return channels.opaque(node, f"its channels are rearranged by {channels.call_text(node)}")
    first, second = (one % count for one in pair)
    return replace(source, dim={first: second, second: first}.get(source.dim, source.dim))


def indexed(channels: Channels, node: fx.Node, source: Axis | None) -> Axis | None:
    """`x[...]`: a part of a tuple, or of a tensor along other dimensions than the channels'."""
    tensor, index = node.args
    reason = f"its channels go through {channels.call_text(node)}"
    if source is None or not isinstance(tensor, fx.Node):
        return channels.opaque(node, reason)
    old = shape_of(tensor)
    if old is None:
        return source  # one of several tensors, all with the same channels
    items = _without_ellipsis(index if isinstance(index, tuple) else (index,), len(old))
    dim, place = 0, 0
    for item in items:
        if item is None:
            place += 1
            continue
        if not (isinstance(item, int | slice) or number_of(item) is not None):
            return channels.opaque(node, reason)
        if dim == source.dim:
            keeps = isinstance(item, slice) and _keeps_all(item, old[dim])
            return replace(source, dim=place) if keeps else channels.opaque(node, reason)
        dim, place = dim + 1, place + isinstance(item, slice)
    return replace(source, dim=place + source.dim - dim)


def _without_ellipsis(index: Sequence[Any], count: int) -> list[Any]:
    spread: list[Any] = []
    for item in index:
        if item is Ellipsis:
            named = sum(1 for one in index if one is not None and one is not Ellipsis)
            spread += [slice(None)] * (count - named)
        else:
            spread.append(item)
    return spread + [slice(None)] * (count - sum(1 for one in spread if one is not None))


def _keeps_all(item: slice, size: int) -> bool:
    """Whether a slice takes every place, of a smaller tensor too."""
    stop = number_of(item.stop)
    return item.start in (None, 0) and item.step in (None, 1) and (item.stop is None or (stop or 0) >= size)
