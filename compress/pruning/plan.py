"""The pruning plan: which channels may go, which go together, how many stay, and why the others stay."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..attention import is_attention
from ..errors import PruningError, RequestError
from .channels import LAYERS, Channels, GroupedConv
from .sets import ChannelSet, ChannelSets
from .trace import probe, traced_copy

DEFAULT_MULTIPLE = 8


@dataclass(frozen=True)
class Group:
    """Layers that keep the same output channels, or one attention module, whose heads together are its channels."""

    layers: tuple[str, ...]
    """Names of the Conv2d and Linear modules, in the order of the forward pass; or of the attention module."""
    channels_before: int
    channels_after: int
    reason: str
    """Why these layers go together, in a user's words."""
    unit: int = 1
    """Neighbouring channels that stay or go together: the width of a grouped convolution's groups, or of a head."""
    blocks: int = 1
    """Equal parts of the channels that each keep the same number: the groups of a grouped convolution."""


@dataclass(frozen=True)
class LeftOut:
    """A layer that keeps all its output channels."""

    layer: str
    reason: str
    """Why it stays, in a user's words."""


@dataclass(frozen=True)
class Plan:
    """What will be removed from a model. Input channels follow from the output channels of the layers before."""

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers, ready for JSON."""
        return asdict(self)

    @property
    def layers(self) -> dict[str, Group]:
        """The group of each layer that loses channels."""
        return {layer: group for group in self.groups for layer in group.layers}


def plan(
    model: nn.Module,
    example: torch.Tensor,
    *,
    sparsity: float,
    multiple: int = DEFAULT_MULTIPLE,
    exclude: Sequence[str] = (),
) -> Plan:
    """Decide what to remove from `model`; nothing is changed.

    Each group keeps the multiple of `multiple` nearest to (1 - sparsity) * channels, at least one multiple; around
    grouped convolutions either whole groups go or every group keeps the same number, whichever comes nearer. Attention
    loses whole heads.

    Args:
        model: a float32 module that torch.fx can trace, in either mode.
        example: one or more images, float32 [N, C, H, W]; only the shape is used.
        sparsity: fraction of output channels to remove from each layer; 0 < sparsity < 1.
        multiple: kept channels are multiples of this.
        exclude: layers that stay, or modules whose layers all stay; what goes together with them stays too, and so do
            the heads of the attention that a layer is part of.

    Raises:
        RequestError: an argument is out of range, or `exclude` names no layer of this model.
        PruningError: the model cannot be traced, or nothing in it can be removed.
    """
    _check_arguments(model, example, sparsity, multiple)
    graph_module = traced_copy(model)
    probe(graph_module, example)
    channels = Channels(graph_module)
    for layer in _excluded_layers(model, channels, exclude):
        channels.sets.keep(channels.own_set[layer], "is excluded by you", [layer])
    target = _Target(sparsity, multiple)
    for conv in channels.grouped:
        _settle_grouped(channels.sets, conv, target)
    groups, left_out = _decide(channels, model, target)
    if not groups:
        example_reason = f": {left_out[0].layer} {left_out[0].reason}" if left_out else ""
        raise PruningError(
            f"Nothing in {type(model).__name__} can be pruned at sparsity {sparsity:g}; all of its "
            f"{len(left_out)} Conv2d and Linear layers stay{example_reason}."
        )
    return Plan(groups, left_out)


@dataclass(frozen=True)
class _Target:
    sparsity: float
    multiple: int

    def kept(self, channels: int, unit: int = 1, blocks: int = 1) -> int:
        """How many channels stay; `channels` itself where fewer would break a rule."""
        if channels % unit or (channels // unit) % blocks:
            return channels
        step = math.lcm(self.multiple, unit * blocks)
        wanted = (1 - self.sparsity) * channels
        # Half a step rounds up: the halfway case keeps more. The small number is for products such as 0.3 * 40.
        return min(channels, max(step, step * math.floor(wanted / step + 0.5 + 1e-9)))

    def miss(self, channels: int, kept: int) -> float:
        """How far a number of kept channels is from what was asked."""
        return abs(kept - (1 - self.sparsity) * channels)


def _check_arguments(model: nn.Module, example: torch.Tensor, sparsity: float, multiple: int) -> None:
    if not 0 < sparsity < 1:
        raise RequestError("sparsity", sparsity, "a fraction strictly between 0 and 1")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise RequestError("multiple", multiple, "a whole number from 1 up, such as 8")
    check_example(model, example)


def check_example(model: nn.Module, example: torch.Tensor) -> None:
    """Refuse what the pruning stage is not made for: other than float32 weights and images [N, C, H, W]."""
    if example.dim() != 4 or not example.is_floating_point():
        raise RequestError("example", tuple(example.shape), "float32 images of shape [N, C, H, W]")
    kinds = {str(parameter.dtype) for parameter in model.parameters() if parameter.dtype != torch.float32}
    if kinds:
        raise PruningError(
            f"{type(model).__name__} has {', '.join(sorted(kinds))} weights, and pruning works in "
            "float32; call model.float() first."
        )


def _excluded_layers(model: nn.Module, channels: Channels, exclude: Sequence[str]) -> list[str]:
    modules = [name for name, _ in model.named_modules() if name]
    layers = channels.layers()
    found = []
    for name in exclude:
        inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
        inside += [layer for layer in channels.attentions if name.startswith(f"{layer}.") and name in modules]
        if not inside:
            names = [item for item in modules if any(layer == item or layer.startswith(f"{item}.") for layer in layers)]
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f", such as {', '.join(close)}" if close else f", such as {', '.join(layers[:3])}"
            raise RequestError("exclude", name, f"the name of a Conv2d or Linear layer, or of a part with some{hint}")
        found += inside
    return found


def _settle_grouped(sets: ChannelSets, conv: GroupedConv, target: _Target) -> None:
    """Choose how the channels around a grouped convolution may go: whole groups, or evenly out of every group."""
    result = sets[conv.result]
    source = None if conv.source is None else sets[conv.source]
    free = source is not None and source.kept is None and result.kept is None
    if free and source.channels == result.channels:
        width = result.channels // conv.groups
        whole = target.kept(
            result.channels, math.lcm(width, source.unit, result.unit), math.lcm(source.blocks, result.blocks)
        )
        even = target.kept(result.channels, 1, conv.groups)
        if target.miss(result.channels, whole) <= target.miss(result.channels, even):
            sets.join(
                conv.source,
                conv.result,
                f"{conv.layer} is a grouped convolution that loses whole groups of {width} channels",
            )
            joined = sets[conv.result]
            joined.unit = math.lcm(joined.unit, width)
            return
    for found in (source, result):
        if found is not None:
            found.blocks = math.lcm(found.blocks, conv.groups)
            found.bonds.append(f"each of the {conv.groups} groups of {conv.layer} keeps the same number")


def _decide(channels: Channels, model: nn.Module, target: _Target) -> tuple[tuple[Group, ...], tuple[LeftOut, ...]]:
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    for root in channels.sets.roots():
        found = channels.sets[root]
        after = target.kept(found.channels, found.unit, found.blocks)
        if found.kept is not None:
            reasons |= {layer: _kept_reason(layer, found) for layer in found.layers}
        elif after >= found.channels:
            reasons |= {layer: _too_small(found, target) for layer in found.layers}
        elif found.layers:
            order = [layer for layer in channels.layers() if layer in set(found.layers)]
            groups.append(Group(tuple(order), found.channels, after, _group_reason(found), found.unit, found.blocks))
    for layer in channels.followers:
        reasons[layer] = "has no channels of its own: it follows the concatenation it reads, channel by channel"
    for name, module in model.named_modules():
        if (type(module) in LAYERS or is_attention(module)) and name not in channels.own_set:
            reasons[name] = "is not called by the forward pass, or only inside a module that torch.fx does not open"
    parts = tuple(f"{name}." for name in channels.attentions)
    reasons = {layer: reason for layer, reason in reasons.items() if not layer.startswith(parts)}
    order = {layer: index for index, layer in enumerate(channels.layers())}
    left_out = sorted(reasons, key=lambda layer: order.get(layer, len(order)))
    return tuple(groups), tuple(LeftOut(layer, reasons[layer]) for layer in left_out)


def _kept_reason(layer: str, found: ChannelSet) -> str:
    if layer in found.kept_layers or not found.kept_layers:
        return str(found.kept)
    return f"goes together with {found.kept_layers[0]}, which {found.kept}"


def _too_small(found: ChannelSet, target: _Target) -> str:
    rule = f"a multiple of {target.multiple}"
    rule += f" and whole groups of {found.unit}" if found.unit > 1 else ""
    rule += f" and as many from each of {found.blocks} groups" if found.blocks > 1 else ""
    wanted = (1 - target.sparsity) * found.channels
    if found.channels < 2 * target.multiple:
        count = "1 channel" if found.channels == 1 else f"{found.channels} channels"
        return f"has only {count}, too few to keep {rule} and remove the rest"
    return f"has {found.channels} channels: keeping {rule} nearest to {wanted:.0f} leaves none to remove"


def _group_reason(found: ChannelSet) -> str:
    if len(found.layers) > 1:
        return "; ".join(found.bonds)
    own = [bond for bond in found.bonds if bond.startswith("each of the")]
    return "; ".join(["no other layer shares its channels", *own])
