"""How many channels each group of layers keeps, and why the other layers keep all of theirs.

A group keeps a multiple of `multiple` channels, in whole units and evenly from each block. With 64 channels, a sparsity
of 0.4 and multiples of 8, 38.4 channels should stay: 40 do, the nearest multiple. With groups of 16 channels that are
kept or removed as a whole, the step is lcm(8, 16) = 16 and 32 or 48 would be kept: 32, which is nearer to 38.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from compress.errors import RequestError
from compress.models.attention import is_attention
from compress.pruning import ranking as rankings
from compress.pruning.channels import LAYERS, Channels
from compress.pruning.constraints import Constraints
from compress.pruning.graph.channel_sets import ChannelSet, ChannelSets, GroupedConv
from compress.pruning.interface import Group, Unpruned, clause
from compress.tracing import torch_base


@dataclass(frozen=True)
class _Target:
    sparsity: float
    multiple: int

    def kept(self, channels: int, unit: int = 1, blocks: int = 1) -> int:
        """The allowed number of channels that comes nearest to the target; `channels` itself where no other is allowed."""
        if channels % unit or (channels // unit) % blocks:
            return channels
        step = math.lcm(self.multiple, unit * blocks)
        exact = (1 - self.sparsity) * channels
        # Half a step rounds up: the halfway case keeps more. The small number is for products such as 0.3 * 40.
        return min(channels, max(step, step * math.floor(exact / step + 0.5 + 1e-9)))

    def fewest(self, channels: int, unit: int = 1, blocks: int = 1) -> int:
        """The smallest allowed number that removes no more than the target's fraction; at least one multiple."""
        if channels % unit or (channels // unit) % blocks:
            return channels
        step = math.lcm(self.multiple, unit * blocks)
        return min(channels, max(step, step * math.ceil((1 - self.sparsity) * channels / step - 1e-9)))

    def miss(self, channels: int, kept: int) -> float:
        """How many channels lie between `kept` and the target."""
        return abs(kept - (1 - self.sparsity) * channels)


# ---- grouped convolutions -----------------------------------------------------------------------------------------


def settle_grouped(sets: ChannelSets, conv: GroupedConv, constraints: Constraints, multiple: int) -> None:
    """Choose how a grouped convolution loses channels: whole groups, or the same number from every group.

    Whole groups tie the channels that it reads to those that it gives. Of the two ways, the one that comes nearer to the
    sparsity is taken.
    """
    result = sets[conv.result]
    if conv.source is not None and _can_share(sets[conv.source], result, constraints):
        source = sets[conv.source]
        target = _Target(constraints.ratio([*source.layers, *result.layers]) or 0.0, multiple)
        width = result.channels // conv.groups
        unit = math.lcm(width, source.unit, result.unit)
        whole = target.kept(result.channels, unit, math.lcm(source.blocks, result.blocks))
        even = target.kept(result.channels, 1, conv.groups)
        if target.miss(result.channels, whole) <= target.miss(result.channels, even):
            reason = f"{conv.layer} is a grouped convolution that loses whole groups of {width} channels"
            sets.join(conv.source, conv.result, reason)
            joined = sets[conv.result]
            joined.unit = math.lcm(joined.unit, width)
            return
    for set_id in (conv.source, conv.result):
        if set_id is not None:
            reason = f"each of the {conv.groups} groups of {conv.layer} keeps the same number"
            sets.require_blocks(set_id, conv.groups, reason)


def _can_share(source: ChannelSet, result: ChannelSet, constraints: Constraints) -> bool:
    """Whether two sets can become one: both may lose channels, and no constraint gives them different fractions."""
    if source.frozen_reason is not None or result.frozen_reason is not None or source.channels != result.channels:
        return False
    if constraints.ratio(source.layers) == constraints.ratio(result.layers):
        return True
    return not all(any(layer in constraints.ratios for layer in one.layers) for one in (source, result))


# ---- every set ----------------------------------------------------------------------------------------------------


def allocate(
    channels: Channels, model: nn.Module, constraints: Constraints, multiple: int
) -> tuple[tuple[Group, ...], tuple[Unpruned, ...]]:
    """The groups that lose channels, and the layers that are not pruned with the reason.

    Call `settle_grouped` for every grouped convolution before.
    """
    groups: list[Group] = []
    unpruned: dict[str, Unpruned] = {}
    for root in channels.sets.roots():
        channel_set = channels.sets[root]
        target = _Target(constraints.ratio(channel_set.layers) or 0.0, multiple)
        after = _channels_after(channel_set, constraints, target)
        if channel_set.frozen_reason is not None:
            unpruned |= {name: _frozen(name, channel_set, channel_set.frozen_reason) for name in channel_set.layers}
        elif after >= channel_set.channels:
            reason = _too_small(channel_set, target)
            unpruned |= {name: Unpruned(name, reason, "size", reason) for name in channel_set.layers}
        elif channel_set.layers:
            groups.append(_group(channels, channel_set, after))
    unpruned |= _without_channels(channels, model)
    _refuse_named(channels, constraints, {name: one.reason for name, one in unpruned.items()})
    inner = tuple(f"{name}." for name in channels.attentions)
    order = {layer: index for index, layer in enumerate(channels.layers())}
    names = sorted(
        (name for name in unpruned if not name.startswith(inner)), key=lambda name: order.get(name, len(order))
    )
    return tuple(groups), tuple(unpruned[name] for name in names)


def _channels_after(channel_set: ChannelSet, constraints: Constraints, target: _Target) -> int:
    """How many channels are kept; of a set that global ranking decides on, the fewest that are allowed."""
    if not constraints.competes(channel_set.layers):
        return target.kept(channel_set.channels, channel_set.unit, channel_set.blocks)
    limit = constraints.max_layer_sparsity
    return replace(target, sparsity=1.0 if limit is None else limit).fewest(
        channel_set.channels, channel_set.unit, channel_set.blocks
    )


def _group(channels: Channels, channel_set: ChannelSet, after: int) -> Group:
    layers = tuple(layer for layer in channels.layers() if layer in set(channel_set.layers))
    reasons = channel_set.reasons if len(layers) > 1 else ["no other layer shares its channels"]
    return Group(
        layers,
        channel_set.channels,
        after,
        "; ".join([*reasons, *channel_set.shape_reasons]),
        channel_set.unit,
        channel_set.blocks,
    )


def _frozen(layer: str, channel_set: ChannelSet, cause: str) -> Unpruned:
    first = channel_set.frozen_layers[0] if channel_set.frozen_layers else layer
    own = layer in channel_set.frozen_layers or first == layer
    reason = cause if own else f"shares its channels with {first}, {clause('which', cause)}"
    return Unpruned(layer, reason, channel_set.frozen_kind, cause)


def _too_small(channel_set: ChannelSet, target: _Target) -> str:
    rule = f"a multiple of {target.multiple}"
    rule += f" and whole groups of {channel_set.unit}" if channel_set.unit > 1 else ""
    rule += f" and as many from each of {channel_set.blocks} groups" if channel_set.blocks > 1 else ""
    if channel_set.channels < 2 * target.multiple:
        count = "1 channel" if channel_set.channels == 1 else f"{channel_set.channels} channels"
        return f"has only {count}, too few to keep {rule} and remove the rest"
    exact = (1 - target.sparsity) * channel_set.channels
    return f"has {channel_set.channels} channels: keeping {rule} nearest to {exact:.0f} leaves none to remove"


def _without_channels(channels: Channels, model: nn.Module) -> dict[str, Unpruned]:
    """The layers that have no set of channels of their own."""
    unpruned = {}
    for name in channels.followers:
        reason = "has no channels of its own: it follows the concatenation it reads, channel by channel"
        unpruned[name] = Unpruned(name, reason, cause=reason)
    for name, module in model.named_modules():
        if (torch_base(type(module)) in LAYERS or is_attention(module)) and name not in channels.own_set:
            reason = "is not called by the forward pass, or only inside a module that is not opened"
            unpruned[name] = Unpruned(name, reason, cause=reason)
    return unpruned


def _refuse_named(channels: Channels, constraints: Constraints, reasons: Mapping[str, str]) -> None:
    """Raise `RequestError` for a fraction that the user set by a name of which no layer can be pruned."""
    sets = (channels.sets[root] for root in channels.sets.roots())
    frozen = {*channels.followers, *(layer for one in sets if one.frozen_reason for layer in one.layers)}
    for name, layers in constraints.names.items():
        if frozen.issuperset(layers):
            why = clause(layers[0], reasons[layers[0]])
            raise RequestError(constraints.request_field, name, f"a layer that can be pruned, but {why}")


# ---- global ranking -----------------------------------------------------------------------------------------------


def rank_globally(
    model: nn.Module, groups: tuple[Group, ...], constraints: Constraints, multiple: int, pruner: str
) -> tuple[tuple[Group, ...], tuple[Unpruned, ...]]:
    """The groups with the counts that global ranking gives them, and the layers that it removes nothing from.

    Args:
        groups: from `allocate`, those that compete with the fewest channels that are allowed.
    """
    rivals = [group for group in groups if constraints.competes(group.layers)]
    counts = rankings.kept_counts(model, rivals, sparsity=constraints.sparsity, multiple=multiple, pruner=pruner)
    ranked = {group.layers: replace(group, channels_after=count) for group, count in zip(rivals, counts, strict=True)}
    groups = tuple(ranked.get(group.layers, group) for group in groups)
    pruned = tuple(group for group in groups if group.channels_after < group.channels_before)
    reason = "ranks above the others: its channels matter most"
    unpruned = (layer for group in groups if group not in pruned for layer in group.layers)
    return pruned, tuple(Unpruned(layer, reason, "size", reason) for layer in unpruned)
