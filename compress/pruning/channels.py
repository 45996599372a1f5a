"""Which layers share their channels: the dependency analysis that every pruning plan is made from.

An example of two layers, of which the first is to lose 32 of its 64 output channels:

    conv1 = nn.Conv2d(3, 64, 3)          y = relu(norm1(conv1(x)))
    norm1 = nn.BatchNorm2d(64)           z = conv2(y)
    conv2 = nn.Conv2d(64, 128, 3)

conv1 opens a set of 64 channels, and its result carries the set along dimension 1: `Axis(1, (Part(set_id=0, channels=64),))`.
norm1 and relu treat each channel alone, so y carries the same axis. conv2 reads it and opens a set of its own, of 128. Every
tensor with a dimension for set 0 loses 32 places of it, and nothing else changes:

    conv1.weight [64, 3, 3, 3]    -> [32, 3, 3, 3]      conv1.bias [64] -> [32]        its outputs are set 0
    norm1.weight, bias, running_mean, running_var       [64] -> [32] each              its channels are set 0
    conv2.weight [128, 64, 3, 3]  -> [128, 32, 3, 3]    conv2.bias [128] stays         its inputs are set 0

With 64 outputs in conv2 and `z = conv2(y) + y`, the addition joins the two sets, since channel i of both is added: conv1 and
conv2 then lose the same channels. With `y.flatten(1)` of 7 x 7 maps before a Linear, each channel takes 49 neighbouring
features: `Part(set_id=0, channels=64, span=49)`.

The rules: every Conv2d and Linear opens a set. Adding or multiplying two tensors joins their sets. A depthwise convolution
joins the set that it reads. An operation that mixes, moves or counts channels freezes all of them, and the reason is kept.
Parameters and buffers that the forward pass reads by itself, such as a scale for each channel, have sets without a layer:
joined with a layer's set, they lose what the layer loses. Every tensor has one record of which channels lie along which of
its dimensions, so a layer that is called twice, and two layers that share a weight, read and give the same channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from compress.models.attention import Heads
from compress.pruning.graph import functions
from compress.pruning.graph.axes import Axis, Part
from compress.pruning.graph.channel_sets import ChannelSets, GroupedConv, Kind
from compress.pruning.graph.layouts import reshaped
from compress.pruning.graph.operations import (
    CHANNELWISE_MODULES,
    ELEMENTWISE_MODULES,
    INFORMATION,
    POOLING_MODULES,
    operation_name,
)
from compress.pruning.graph.tensors import READS, Dims, Roles, owners, stored
from compress.tracing.graph import call_counts, probe, shape_of, traced_copy

LAYERS = (nn.Conv2d, nn.Linear)
ANSWER = "gives the answer: its outputs are the classes"


@dataclass(frozen=True)
class Call:
    """A module with tensors of its own: the shape and the channels of its input and of its output."""

    input_shape: tuple[int, ...]
    input: Axis | None
    output_shape: tuple[int, ...]
    output: Axis | None


def analyse(model: nn.Module, example: torch.Tensor) -> Channels:
    """The channels of every tensor in `model`'s forward pass.

    Args:
        model: a module that can be traced, in either mode; only read.
        example: images [N, C, H, W] on the model's device; only the shape is used.

    Raises:
        PruningError: the model cannot be traced.
    """
    graph_module = traced_copy(model, example)
    probe(graph_module, example)
    return Channels(graph_module)


class Channels:
    """The channels of every tensor in a graph whose shapes are known.

    Attributes:
        axes: node -> the channels of its result; None where they cannot be followed.
        sets: the channel sets.
        roles: the channels along each dimension of parameters and buffers.
        own_set: Conv2d, Linear or attention -> the id of the set of its output channels, of attention of its heads'.
        calls: module with tensors whose sizes follow from its channels -> its input and output.
        grouped: grouped convolutions that are not depthwise.
        followers: depthwise convolutions over a concatenation: they have no channels of their own.
        output_layers: the layers whose outputs are the model's.
        attentions: attention module -> its heads.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        in_graph = {name: module for name, module in graph_module.named_modules() if type(module) is not nn.Module}
        self.modules = dict(graph_module.meta["root"].named_modules()) | in_graph
        self.sets = ChannelSets()
        self.roles = Roles(self.sets, frozenset(graph_module.meta["root"].state_dict()))
        self.axes: dict[fx.Node, Axis | None] = {}
        self.own_set: dict[str, int] = {}
        self.calls: dict[str, Call] = {}
        self.grouped: list[GroupedConv] = []
        self.followers: dict[str, Axis] = {}
        self.attentions: dict[str, Heads] = graph_module.meta["attentions"]
        self.output_layers = _output_layers(graph_module, self.modules)
        self._counts = call_counts(graph_module)
        for node in graph_module.graph.nodes:
            self.axes[node] = self._visit(node)
        self._keep_shared_attention()

    def layers(self) -> list[str]:
        """Every Conv2d, Linear and attention module that the forward pass calls, in order."""
        return list(self.own_set)

    def _visit(self, node: fx.Node) -> Axis | None:
        if "attention" in node.meta:
            self._open_attention(node, node.meta["attention"])
        if node.op == "placeholder":
            return self.frozen_axis(node, "is tied to the picture itself")
        if node.op == "output":
            self.freeze_inputs(node, ANSWER, "answer")
            return None
        if node.op == "get_attr":
            return self.roles.axis_of(str(node.target), stored(self.graph_module, str(node.target)))
        return self._module(node) if node.op == "call_module" else self._operation(node)

    # -- modules -------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> Axis | None:
        name = str(node.target)
        module, source = self.modules[name], self.source_axis(node)
        if type(module) is nn.Conv2d:
            return self.conv(node, name, module, source)
        if type(module) is nn.Linear:
            return self.linear(node, name, module, source)
        if type(module) is nn.ConvTranspose2d:
            return self._transposed_conv(node, name, module, source)
        if type(module) in ELEMENTWISE_MODULES:
            return source
        if type(module) in CHANNELWISE_MODULES:
            return self._channelwise(node, name, module, source)
        if type(module) is nn.GroupNorm:
            return self._group_norm(node, name, module, source)
        if type(module) in POOLING_MODULES:
            return self.require_dim_one(node, source, f"{type(module).__name__} ({name})")
        if type(module) in (nn.Flatten, nn.Unflatten):
            return reshaped(self, node, source)
        if type(module) in functions.AS_MODULES:
            return functions.AS_MODULES[type(module)](self, node, source)
        return self.opaque(node, f"feeds {type(module).__name__} ({name}), which mixes or counts its channels")

    def _channelwise(self, node: fx.Node, name: str, module: nn.Module, source: Axis | None) -> Axis | None:
        axis = self.require_dim_one(node, source, f"{type(module).__name__} ({name})")
        tensors = {key: tensor for key, tensor in _tensors(module).items() if tensor.numel() > 1}
        if axis is not None:
            self.note_call(node, name, axis)
            self.roles.bind({f"{name}.{key}": (tensor, {0: axis}) for key, tensor in tensors.items()}, name)
        return axis

    def _group_norm(self, node: fx.Node, name: str, norm: nn.GroupNorm, source: Axis | None) -> Axis | None:
        """Each group is normalised by its own mean and deviation, so that only whole groups can go."""
        width = norm.num_channels // norm.num_groups
        what = f"feeds GroupNorm ({name})"
        if source is None or source.dim != 1:
            return self.opaque(node, f"{what} along another dimension than the channels")
        if norm.num_groups == 1:
            return self.opaque(node, f"{what}, which normalises over all channels at once")
        if any(part.span != 1 or part.channels % width for part in source.parts):
            return self.opaque(node, f"{what} through a concatenation with other boundaries than its groups")
        for part in source.parts:
            reason = f"each of the {norm.num_groups} groups of {name} (GroupNorm) is kept or removed as a whole"
            self.sets.require_units(part.set_id, width, reason)
        return self._channelwise(node, name, norm, source)

    def conv(self, node: fx.Node, name: str, conv: nn.Conv2d, source: Axis | None) -> Axis:
        """A convolution of the layer `name`, called as a module or as a function."""
        if source is not None and source.dim != 1:
            self.freeze(source, f"feeds {name} along another dimension than the channels")
            source = None
        if source is not None and conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
            self._bind(node, name, conv, source, source, {0: source})
            return self._depthwise(name, source)
        result = self.open_set(name, conv.out_channels)
        if conv.groups > 1 and source is not None:
            if len(source.parts) > 1 or source.parts[0].span != 1:
                self.freeze(source, f"feeds the grouped convolution {name} through a concatenation")
            elif all(one.layer != name for one in self.grouped):
                self.grouped.append(GroupedConv(name, conv.groups, source.parts[0].set_id, result))
        elif conv.groups > 1:
            self.grouped.append(GroupedConv(name, conv.groups, None, result))
        gives = Axis(1, (Part(result, conv.out_channels),))
        self._bind(node, name, conv, source, gives, {0: gives, READS if conv.groups > 1 else 1: source})
        return gives

    def _depthwise(self, name: str, source: Axis) -> Axis:
        if len(source.parts) > 1 or source.parts[0].span != 1:
            self.followers[name] = source
            self.own_set.setdefault(name, source.parts[0].set_id)
            return source
        set_id = source.parts[0].set_id
        if name not in self.own_set:
            self.own_set[name] = set_id
            self.sets.add_layer(set_id, name, "a depthwise convolution works channel by channel")
        return source

    def linear(self, node: fx.Node, name: str, linear: nn.Linear, source: Axis | None) -> Axis | None:
        """A fully connected layer `name`, called as a module or as a function."""
        shape = shape_of(node)
        if shape is None:
            return None
        if source is not None and source.dim != len(shape) - 1:
            self.freeze(source, f"feeds {name}, which works across positions and not channels")
            source = None
        result = self.open_set(name, linear.out_features)
        gives = Axis(len(shape) - 1, (Part(result, linear.out_features),))
        self._bind(node, name, linear, source, gives, {0: gives, 1: source})
        return gives

    def _transposed_conv(self, node: fx.Node, name: str, conv: nn.ConvTranspose2d, source: Axis | None) -> Axis | None:
        """NNI's pruners do not rank its channels: they are removed with those that they are added to, or depthwise."""
        if source is None or source.dim != 1:
            return self.opaque(node, f"feeds {name} along another dimension than the channels")
        if conv.groups == conv.in_channels == conv.out_channels > 1:
            self._bind(node, name, conv, source, source, {0: source})
            return source
        if conv.groups > 1:
            return self.opaque(node, f"feeds {name}, a grouped transposed convolution")
        gives = Axis(1, (Part(self.sets.new(conv.out_channels), conv.out_channels),))
        self._bind(node, name, conv, source, gives, {0: source, 1: gives})
        return gives

    def _bind(self, node: fx.Node, name: str, layer: nn.Module, reads: Axis | None, gives: Axis, weight: Dims) -> None:
        self.note_call(node, name, reads, gives)
        tensors: dict[str, tuple[torch.Tensor, Dims]] = {f"{name}.weight": (layer.get_parameter("weight"), weight)}
        if layer.bias is not None:
            tensors[f"{name}.bias"] = (layer.get_parameter("bias"), {0: gives})
        self.roles.bind(tensors, name)

    def note_call(self, node: fx.Node, name: str, reads: Axis | None, gives: Axis | None = None) -> None:
        """Record the input and output of module `name`; of several calls the first, as all have to agree."""
        input_shape, output_shape = shape_of(self.tensor_inputs(node)[0]), shape_of(node)
        if input_shape is not None and output_shape is not None:
            self.calls.setdefault(name, Call(input_shape, reads, output_shape, reads if gives is None else gives))

    def open_set(self, name: str, channels: int) -> int:
        """The set of layer `name`: a new one at its first call."""
        if name not in self.own_set:
            frozen = ANSWER if name in self.output_layers else None
            self.own_set[name] = self.sets.new(channels, layer=name, frozen=frozen, kind="answer")
        return self.own_set[name]

    # -- attention -----------------------------------------------------------------------------------------------

    def _open_attention(self, node: fx.Node, name: str) -> None:
        """A set for the outputs of the heads: only the module itself reads them, so no other layer shares them."""
        if name not in self.own_set:
            heads = self.attentions[name]
            self.own_set[name] = self.sets.new(heads.channels, layer=name, frozen=heads.refusal)
            reason = (
                f"each of the {heads.count} attention heads of {heads.width} channels is kept or removed as a whole"
            )
            self.sets.require_units(self.own_set[name], heads.width, reason)
        if isinstance(self.modules.get(str(node.target)), nn.MultiheadAttention):
            if not _is_plain_self_attention(node):
                reason = (
                    "is called otherwise than as attention(x, x, x, need_weights=False), which is what can be pruned"
                )
                self.sets.freeze(self.own_set[name], reason)
            elif self._counts[str(node.target)] > 1:
                self.sets.freeze(self.own_set[name], "is an attention that the forward pass uses more than once")

    def _keep_shared_attention(self) -> None:
        """Freeze an attention that shares a tensor with another module: its heads are removed from its own tensors alone."""
        owned = owners(self.graph_module)
        for name in self.attentions:
            for tensor in self.modules[name].parameters():
                other = next((one for one in owned[id(tensor)] if not one.startswith(f"{name}.")), None)
                if other is not None and name in self.own_set:
                    self.sets.freeze(self.own_set[name], f"is an attention that shares a weight with {other}")

    # -- functions and methods -----------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> Axis | None:
        name, source = operation_name(node), self.source_axis(node)
        if shape_of(node) is None and (name in INFORMATION or (source is None and not self.tensor_inputs(node))):
            return None
        handler = functions.HANDLERS.get(name)
        if handler is None:
            return self.opaque(node, f"its channels go through {self.call_text(node)}")
        axis = handler(self, node, source)
        for item in node.all_input_nodes:
            if item.op == "get_attr" and self.axes[item] is None and name not in functions.READ_WEIGHTS:
                self.roles.freeze(
                    stored(self.graph_module, str(item.target)), f"is read by {self.call_text(node)} as well"
                )
        return axis

    # -- shared with the operations ------------------------------------------------------------------------------

    def join(self, first: Axis, other: Axis, reason: str) -> bool:
        """Join the sets of two axes part by part; False where their boundaries differ."""
        if first.boundaries != other.boundaries:
            return False
        for one, two in zip(first.parts, other.parts, strict=True):
            self.sets.join(one.set_id, two.set_id, reason)
        return True

    def require_dim_one(self, node: fx.Node, source: Axis | None, what: str) -> Axis | None:
        """`source`, where its channels lie along dimension 1; else they are frozen."""
        if source is not None and source.dim != 1:
            return self.opaque(node, f"feeds {what} along another dimension than the channels")
        return source

    def opaque(self, node: fx.Node, reason: str) -> Axis | None:
        """Freeze every channel that `node` reads, and what is joined with its result."""
        self.freeze_inputs(node, reason)
        return self.frozen_axis(node, f"is tied to the result of {self.call_text(node)}")

    def frozen_axis(self, node: fx.Node, reason: str) -> Axis | None:
        """A frozen set for the result of `node`; what is joined with it later is frozen with this reason."""
        shape = shape_of(node)
        if shape is None or len(shape) < 2:
            return None
        return Axis(1, (Part(self.sets.new(shape[1], frozen=reason), shape[1]),))

    def fixed_reason(self, axes: list[Axis]) -> str | None:
        """The reason of the first operand whose channels belong to no layer at all."""
        sets = (self.sets[part.set_id] for axis in axes for part in axis.parts)
        return next((one.frozen_reason for one in sets if one.frozen_reason and not one.layers), None)

    def freeze_inputs(self, node: fx.Node, reason: str, kind: Kind = "structure") -> None:
        """Rule that no channel of any tensor that `node` reads is removed."""
        for item in node.all_input_nodes:
            axis = self.axes.get(item)
            if axis is not None:
                self.freeze(axis, reason, kind)
            if item.op == "get_attr":
                self.roles.freeze(stored(self.graph_module, str(item.target)), reason, kind)

    def freeze(self, axis: Axis, reason: str, kind: Kind = "structure") -> None:
        """Rule that no channel of `axis` is removed."""
        for part in axis.parts:
            self.sets.freeze(part.set_id, reason, kind=kind)

    def tensor_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [item for item in node.all_input_nodes if shape_of(item) is not None]

    def source_axis(self, node: fx.Node) -> Axis | None:
        """The channels of the first tensor, or tuple of tensors, that `node` reads."""
        if node.args and isinstance(node.args[0], fx.Node) and shape_of(node.args[0]) is None:
            return self.axes.get(node.args[0])
        inputs = self.tensor_inputs(node)
        return self.axes[inputs[0]] if inputs else None

    def call_text(self, node: fx.Node) -> str:
        """The operation of `node` with the line of the user's code, such as "mean() in forward (net.py, line 7)"."""
        source = node.meta.get("source")
        call = f"{operation_name(node).strip('()')}()"
        if node.op == "call_module":
            call = f"{type(self.modules[str(node.target)]).__name__} ({node.target})"
        return f"{call} in {source}" if source else call


def _output_layers(graph_module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> set[str]:
    """The last Conv2d or Linear layer on every path to the output."""
    layers: set[str] = set()
    stack = [node for node in graph_module.graph.nodes if node.op == "output"]
    visited = set(stack)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in visited:
                continue
            visited.add(node)
            if node.op == "call_module" and type(modules[str(node.target)]) in LAYERS:
                layers.add(str(node.target))
            else:
                stack.append(node)
    return layers


def _is_plain_self_attention(node: fx.Node) -> bool:
    if len(node.args) != 3 or not isinstance(node.args[0], fx.Node):
        return False
    same = node.args[0] is node.args[1] is node.args[2]
    return same and dict(node.kwargs) == {"need_weights": False} and len(shape_of(node.args[0]) or ()) == 3


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of `module` itself that have a number for each channel."""
    return {
        **dict(module.named_parameters(recurse=False)),
        **{key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.dim() > 0},
    }
