"""Graphs that hold for any batch size: numbers that Python computed from the batch size become operations again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.tracing.wording import Decision, Untraceable

_BY_BATCH = "does something else for another number of images at once; let it treat each image alone"


@dataclass(frozen=True)
class _Reference:
    index: int
    """Of the node in its graph."""


@dataclass(frozen=True)
class Description:
    """A graph as plain values, to be compared with another's."""

    nodes: list[tuple[str, Any, Any, Any]]
    decisions: Sequence[Decision]
    batch: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Description) and self.nodes == other.nodes


def describe(graph: fx.Graph, root: nn.Module, decisions: Sequence[Decision], batch: int) -> Description:
    index = {node: _Reference(position) for position, node in enumerate(graph.nodes)}
    nodes = []
    for node in graph.nodes:
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), index.__getitem__)
        nodes.append((node.op, _target(node, root), _plain(args), _plain(kwargs)))
    return Description(nodes, decisions, batch)


def map_nodes(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    """`arguments` with `function(node)` in place of each node; torch's own types allow no other results than arguments."""
    return fx.node.map_arg(arguments, function)


def _target(node: fx.Node, root: nn.Module) -> Any:
    """A constant that the code created while it was traced is compared by its shape."""
    value = getattr(root, str(node.target), None) if node.op == "get_attr" else None
    return tuple(value.shape) if isinstance(value, Tensor) else node.target


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [type(value).__name__.replace("immutable_", ""), *map(_plain, value)]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, slice):
        return ["slice", _plain(value.start), _plain(value.stop), _plain(value.step)]
    return value


def replace_batch_sizes(graph: fx.Graph, here: Description, there: Description) -> None:
    """Replace the numbers in `graph` that depend on the batch size, found by comparison with a larger batch.

    Raises:
        Untraceable: the graphs differ in more than numbers.
    """
    if len(here.nodes) != len(there.nodes):
        raise _refusal(here, there)
    nodes = list(graph.nodes)
    images = next(node for node in nodes if node.op == "placeholder")
    count: list[fx.Node] = []

    def number(one: int, other: int) -> fx.Node:
        growth = Fraction(other - one, there.batch - here.batch)
        rest = one - growth * here.batch
        if rest.denominator != 1:
            raise _refusal(here, there)
        if not count:
            with graph.inserting_after(images):
                count.append(graph.call_method("size", (images, 0)))
        call, value = graph.call_function, count[0]
        for function, operand, idle in (
            (operator.mul, growth.numerator, 1), (operator.floordiv, growth.denominator, 1), (operator.add, int(rest), 0),
        ):  # fmt: skip
            value = value if operand == idle else call(function, (value, operand))
        return value

    for node, one, other in zip(nodes, here.nodes, there.nodes, strict=True):
        if one == other:
            continue
        if one[:2] != other[:2]:
            raise _refusal(here, there)
        with graph.inserting_before(node):
            try:
                node.args = _merged(node.args, one[2], other[2], number)
                node.kwargs = _merged(dict(node.kwargs), one[3], other[3], number)
            except _Differs:
                raise _refusal(here, there) from None


class _Differs(Exception):
    pass


def _merged(value: Any, one: Any, other: Any, number: Any) -> Any:
    """`value`, described as `one`, with `number(...)` wherever `other` has another whole number."""
    if one == other:
        return value
    if isinstance(value, dict) and set(one) == set(other):
        return {key: _merged(item, one[key], other[key], number) for key, item in value.items()}
    if isinstance(value, list | tuple) and len(one) == len(other):
        items = [_merged(*three, number) for three in zip(value, one[1:], other[1:], strict=True)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, slice):
        parts = zip((value.start, value.stop, value.step), one[1:], other[1:], strict=True)
        return slice(*(_merged(*three, number) for three in parts))
    if type(one) is int and type(other) is int:
        return number(one, other)
    raise _Differs


def _refusal(here: Description, there: Description) -> Untraceable:
    pairs = zip(here.decisions, there.decisions, strict=False)
    first = next((one for one, other in pairs if one != other), None)
    last = next(iter(reversed(here.decisions)), None)
    return Untraceable(_BY_BATCH, getattr(first or last, "place", None))


def with_batch(images: Tensor, batch: int) -> Tensor:
    """Zeros [batch, ...] of the other dimensions, dtype and device of `images`; their values are not used."""
    return torch.zeros(batch, *images.shape[1:], dtype=images.dtype, device=images.device)
