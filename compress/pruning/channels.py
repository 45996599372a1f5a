"""Which layers' channels are the same channels: the analysis under the pruning plan.

Every Conv2d and Linear opens a new set of channels. Walking through the graph, each tensor knows along which dimension
it carries which sets, in what order. Adding or multiplying two tensors unites their sets; a depthwise convolution joins
the set that it reads; an operation that mixes, moves or counts channels keeps them all, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx, nn

from ..attention import Heads
from .operations import (
    ADDITIVE,
    CHANNELWISE_MODULES,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    INFORMATION,
    MULTIPLICATIVE,
    POOLING,
    POOLING_MODULES,
    RESHAPES,
    operation_name,
)
from .sets import ChannelSets
from .trace import call_counts, shape_of

LAYERS = (nn.Conv2d, nn.Linear)
ANSWER = "gives the answer: its outputs are the classes"


@dataclass(frozen=True)
class Part:
    """A run of channels of one set; in a flattened tensor each channel takes `span` neighbouring features."""

    set_id: int
    channels: int
    span: int = 1


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor carries these channels, in this order."""

    dim: int
    parts: tuple[Part, ...]

    @property
    def boundaries(self) -> tuple[tuple[int, int], ...]:
        return tuple((part.channels, part.span) for part in self.parts)


@dataclass(frozen=True)
class GroupedConv:
    """A grouped convolution between two sets of channels."""

    layer: str
    groups: int
    source: int | None
    result: int


class Channels:
    """The channels of every tensor in a graph whose shapes are known.

    Attributes:
        axes: what each tensor carries; None where that is nothing that can be followed.
        sets: the channel sets.
        own_set: the set that each Conv2d and Linear gives its outputs to.
        grouped: grouped convolutions that are not depthwise.
        followers: depthwise convolutions over joined layers: they have no channels of their own.
        answers: the layers whose outputs are the model's answer.
        attentions: the heads of each attention module; its set in `own_set` is that of the heads' outputs.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.modules = dict(graph_module.named_modules())
        self.sets = ChannelSets()
        self.axes: dict[fx.Node, Axis | None] = {}
        self.own_set: dict[str, int] = {}
        self.grouped: list[GroupedConv] = []
        self.followers: dict[str, Axis] = {}
        self.attentions: dict[str, Heads] = graph_module.meta["attentions"]
        self.answers = _answer_layers(graph_module, self.modules)
        self._calls = call_counts(graph_module)
        for node in graph_module.graph.nodes:
            self.axes[node] = self._visit(node)

    def layers(self) -> list[str]:
        """Every Conv2d, Linear and attention module that the forward pass calls, in order."""
        return list(self.own_set)

    def _visit(self, node: fx.Node) -> Axis | None:
        if "attention" in node.meta:
            self._open_attention(node, node.meta["attention"])
        if node.op == "placeholder":
            return self._unremovable(node, "is tied to the picture itself")
        if node.op == "output":
            self._keep_inputs(node, ANSWER)
            return None
        if node.op == "get_attr":
            return None
        return self._module(node) if node.op == "call_module" else self._operation(node)

    # -- modules -------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> Axis | None:
        name = str(node.target)
        module = self.modules[name]
        source = self._source_axis(node)
        if self._calls[name] > 1 and any(True for _ in module.parameters()):
            return self._used_twice(node, name, module)
        if type(module) is nn.Conv2d:
            return self._conv(node, name, module, source)
        if type(module) is nn.Linear:
            return self._linear(node, name, module, source)
        if type(module) in ELEMENTWISE_MODULES:
            return source
        if getattr(module, "running_mean", self) is None:
            return self._opaque(node, f"feeds {name}, a normalisation without running statistics")
        if type(module) in CHANNELWISE_MODULES or type(module) in POOLING_MODULES:
            return self._along_dim_one(node, source, f"{type(module).__name__} ({name})")
        if type(module) is nn.Flatten:
            return self._reshape(node, source)
        return self._opaque(node, f"feeds {type(module).__name__} ({name}), which mixes or counts its channels")

    def _used_twice(self, node: fx.Node, name: str, module: nn.Module) -> Axis | None:
        self._keep_inputs(node, f"feeds {name}, which the forward pass uses more than once")
        reason = "is used more than once in the forward pass"
        if type(module) in LAYERS and name not in self.own_set:
            self.own_set[name] = self.sets.new(module.weight.shape[0], layer=name, kept=reason)
        return self._unremovable(node, f"is tied to {name}, which the forward pass uses more than once")

    def _conv(self, node: fx.Node, name: str, conv: nn.Conv2d, source: Axis | None) -> Axis:
        if source is not None and source.dim != 1:
            self._keep(source, f"feeds {name} along another dimension than the channels")
            source = None
        if source is not None and conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            return self._depthwise(name, source)
        result = self._open_set(name, conv.out_channels)
        if conv.groups > 1:
            if source is not None and len(source.parts) > 1:
                self._keep(source, f"feeds the grouped convolution {name} through a concatenation")
                source = None
            set_id = None if source is None else source.parts[0].set_id
            self.grouped.append(GroupedConv(name, conv.groups, set_id, result))
        return Axis(1, (Part(result, conv.out_channels),))

    def _depthwise(self, name: str, source: Axis) -> Axis:
        if len(source.parts) > 1:
            self.followers[name] = source
            self.own_set[name] = source.parts[0].set_id
            return source
        set_id = source.parts[0].set_id
        self.own_set[name] = set_id
        found = self.sets[set_id]
        found.layers.append(name)
        bond = "a depthwise convolution works channel by channel"
        if bond not in found.bonds:
            found.bonds.append(bond)
        return source

    def _linear(self, node: fx.Node, name: str, linear: nn.Linear, source: Axis | None) -> Axis | None:
        shape = shape_of(node)
        if shape is None:
            return None
        if source is not None and source.dim != len(shape) - 1:
            self._keep(source, f"feeds {name}, which works across positions and not channels")
        result = self._open_set(name, linear.out_features)
        return Axis(len(shape) - 1, (Part(result, linear.out_features),))

    def _open_set(self, name: str, channels: int) -> int:
        kept = ANSWER if name in self.answers else None
        self.own_set[name] = self.sets.new(channels, layer=name, kept=kept)
        return self.own_set[name]

    def _open_attention(self, node: fx.Node, name: str) -> None:
        """A set of what the heads give: read inside the module alone, so no other layer's channels are tied to it."""
        if name not in self.own_set:
            heads = self.attentions[name]
            self.own_set[name] = self.sets.new(heads.channels, layer=name, kept=heads.refusal)
            found = self.sets[self.own_set[name]]
            found.unit = heads.width
            found.bonds.append(
                f"each of the {heads.count} attention heads of {heads.width} channels stays or goes whole"
            )
        if isinstance(self.modules.get(str(node.target)), nn.MultiheadAttention) and not _is_plain_self_attention(node):
            reason = "is called otherwise than as attention(x, x, x, need_weights=False), which is what can be pruned"
            self.sets.keep(self.own_set[name], reason)

    # -- functions and methods -----------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> Axis | None:
        name = operation_name(node)
        source = self._source_axis(node)
        if name in INFORMATION and shape_of(node) is None:
            return None
        if name in ADDITIVE or name in MULTIPLICATIVE:
            return self._join(node, name)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenate(node)
        if source is None:
            return self._opaque(node, f"is combined with the result of {self._where(node, name)}")
        if name in ELEMENTWISE and len(self._tensor_inputs(node)) == 1:
            return source
        if name in POOLING:
            return self._along_dim_one(node, source, self._where(node, name))
        if name in RESHAPES:
            return self._reshape(node, source)
        moved = {
            "permute": self._permute,
            "transpose": self._transpose,
            "mean": self._reduce,
            "sum": self._reduce,
            "getitem": self._index,
        }.get(name)
        axis = moved(node, source) if moved else None
        return axis or self._opaque(node, f"its channels go through {self._where(node, name)}")

    def _join(self, node: fx.Node, name: str) -> Axis | None:
        shape, inputs = shape_of(node), self._tensor_inputs(node)
        tracked = [(item, self.axes[item]) for item in inputs if self.axes[item] is not None]
        if not tracked or shape is None:
            return self._unremovable(node, f"is combined with {self._where(node, name)}")
        where = self._where(node, name)
        dims = {len(shape) - len(shape_of(item)) + axis.dim for item, axis in tracked}
        sizes = {item: _size_at(shape_of(item), max(dims) - len(shape)) for item in inputs}
        wide = [axis for item, axis in tracked if sizes[item] == shape[max(dims)]]
        plain = {item for item in inputs if self.axes[item] is None and sizes[item] > 1}
        spread = [item for item, _ in tracked if sizes[item] != shape[max(dims)]]
        if len(dims) > 1 or not wide or (name in ADDITIVE and spread):
            return self._opaque(
                node, self._fixed_reason(axis for _, axis in tracked) or f"meets a tensor of another shape in {where}"
            )
        if plain:
            return self._opaque(node, f"meets the parameter {_attribute(plain)} in {where}, which stays as it is")
        if name in ("div", "truediv", "div_") and len(tracked) > 1 and self.axes[inputs[-1]] in wide:
            return self._opaque(node, f"is divided channel by channel in {where}")
        bond = "their outputs are multiplied" if name in MULTIPLICATIVE else "their outputs are added"
        for other in wide[1:]:
            if other.boundaries != wide[0].boundaries:
                return self._opaque(node, f"meets a concatenation with other boundaries in {where}")
            for one, two in zip(wide[0].parts, other.parts, strict=True):
                self.sets.join(one.set_id, two.set_id, bond)
        return replace(wide[0], dim=max(dims))

    def _concatenate(self, node: fx.Node) -> Axis | None:
        shape, inputs = shape_of(node), self._tensor_inputs(node)
        where = self._where(node, "cat")
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        axes = [self.axes[item] for item in inputs]
        if shape is None or any(axis is None or axis.dim != dim % len(shape) for axis in axes):
            return self._opaque(node, f"its channels are joined with others along another dimension by {where}")
        return Axis(dim % len(shape), tuple(part for axis in axes for part in axis.parts))

    def _reshape(self, node: fx.Node, source: Axis | None) -> Axis | None:
        """A reshape keeps the channels where the dimensions up to theirs stay, or where it flattens all after them."""
        if source is None:
            return None
        name = "flatten" if node.op == "call_module" else operation_name(node)
        old, new = shape_of(self._tensor_inputs(node)[0]), shape_of(node)
        reason = f"its channels are rearranged by {self._where(node, name)}"
        if old is None or new is None:
            return self._opaque(node, reason)
        sizes = _reshape_sizes(node) if name in ("view", "reshape", "expand") else None
        counted = f"its channels are counted by a fixed number in {self._where(node, name)}"
        if new[: source.dim + 1] == old[: source.dim + 1]:
            return self._opaque(node, counted) if _is_fixed(sizes, source.dim) else source
        if source.dim == 1 and len(new) == 2 and new[0] == old[0]:
            if _is_fixed(sizes, 1):
                return self._opaque(node, counted)
            span = math.prod(old[2:])
            return Axis(1, tuple(replace(part, span=part.span * span) for part in source.parts))
        if name == "unsqueeze" and new == (*old[:1], 1, *old[1:]):
            return replace(source, dim=source.dim + 1)
        return self._opaque(node, reason)

    def _permute(self, node: fx.Node, source: Axis) -> Axis | None:
        order = node.kwargs.get("dims", node.args[1] if len(node.args) == 2 else node.args[1:])
        order = [index % len(order) for index in order]
        return replace(source, dim=order.index(source.dim))

    def _transpose(self, node: fx.Node, source: Axis) -> Axis | None:
        if len(node.args) != 3 or shape_of(node) is None:
            return None
        first, second = (index % len(shape_of(node)) for index in node.args[1:])
        return replace(source, dim={first: second, second: first}.get(source.dim, source.dim))

    def _reduce(self, node: fx.Node, source: Axis) -> Axis | None:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        old = shape_of(self._tensor_inputs(node)[0])
        if dims is None or old is None:
            return None
        dims = {index % len(old) for index in ([dims] if isinstance(dims, int) else dims)}
        if source.dim in dims:
            return None
        gone = 0 if len(shape_of(node) or ()) == len(old) else sum(dim < source.dim for dim in dims)
        return replace(source, dim=source.dim - gone)

    def _index(self, node: fx.Node, source: Axis) -> Axis | None:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if shape_of(node) is None or not all(isinstance(item, int | slice) for item in index):
            return None
        if len(index) > source.dim and index[source.dim] != slice(None):
            return None
        return replace(source, dim=source.dim - sum(isinstance(item, int) for item in index[: source.dim]))

    # -- shared --------------------------------------------------------------------------------------------------

    def _along_dim_one(self, node: fx.Node, source: Axis | None, what: str) -> Axis | None:
        if source is not None and source.dim != 1:
            return self._opaque(node, f"feeds {what} along another dimension than the channels")
        return source

    def _opaque(self, node: fx.Node, reason: str) -> Axis | None:
        self._keep_inputs(node, reason)
        name = str(node.target) if node.op == "call_module" else operation_name(node)
        return self._unremovable(node, f"is tied to the result of {self._where(node, name)}")

    def _unremovable(self, node: fx.Node, reason: str) -> Axis | None:
        """Channels that no layer in reach can drop; a later join keeps its partners with this reason."""
        shape = shape_of(node)
        if shape is None or len(shape) < 2:
            return None
        return Axis(1, (Part(self.sets.new(shape[1], kept=reason), shape[1]),))

    def _fixed_reason(self, axes: Iterable[Axis]) -> str | None:
        """The reason of the first operand whose channels belong to no layer at all."""
        found = (self.sets[part.set_id] for axis in axes for part in axis.parts)
        return next((one.kept for one in found if one.kept and not one.layers), None)

    def _keep_inputs(self, node: fx.Node, reason: str) -> None:
        for item in node.all_input_nodes:
            axis = self.axes.get(item)
            if axis is not None:
                self._keep(axis, reason)

    def _keep(self, axis: Axis, reason: str) -> None:
        for part in axis.parts:
            self.sets.keep(part.set_id, reason)

    def _tensor_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [item for item in node.all_input_nodes if shape_of(item) is not None]

    def _source_axis(self, node: fx.Node) -> Axis | None:
        inputs = self._tensor_inputs(node)
        return self.axes[inputs[0]] if inputs else None

    def _where(self, node: fx.Node, name: str) -> str:
        source = node.meta.get("source")
        call = name if node.op == "call_module" else f"{name}()"
        return f"{call} in {source}" if source else call


def _answer_layers(graph_module: fx.GraphModule, modules: dict[str, nn.Module]) -> set[str]:
    """The Conv2d and Linear layers nearest to the output on every path back from it."""
    found: set[str] = set()
    stack = [node for node in graph_module.graph.nodes if node.op == "output"]
    seen = set(stack)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            if node.op == "call_module" and type(modules[str(node.target)]) in LAYERS:
                found.add(str(node.target))
            else:
                stack.append(node)
    return found


def _is_plain_self_attention(node: fx.Node) -> bool:
    same = len(node.args) == 3 and node.args[0] is node.args[1] is node.args[2]
    return same and dict(node.kwargs) == {"need_weights": False} and len(shape_of(node.args[0]) or ()) == 3


def _size_at(shape: tuple[int, ...], dim_from_the_end: int) -> int:
    return shape[dim_from_the_end] if len(shape) >= -dim_from_the_end else 1


def _attribute(nodes: set[fx.Node]) -> str:
    return ", ".join(sorted(str(node.target) for node in nodes))


def _reshape_sizes(node: fx.Node) -> tuple[object, ...]:
    sizes = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size", ())),)
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)


def _is_fixed(sizes: tuple[object, ...] | None, dim: int) -> bool:
    """Whether the size asked for at `dim` is a number written down, which a pruned layer would no longer meet."""
    return bool(sizes) and dim < len(sizes) and isinstance(sizes[dim], int) and sizes[dim] != -1
