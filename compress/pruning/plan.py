"""The pruning plan: which channels may go, which go together, how many stay, and why the others stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from compress.errors import PruningError, RequestError
from compress.models.attention import is_attention
from compress.pruning import config_list as config_lists
from compress.pruning import ranking as rankings
from compress.pruning.channel_sets import ChannelSet, ChannelSets
from compress.pruning.channels import ANSWER, LAYERS, Channels, GroupedConv
from compress.pruning.constraints import Constraints, Ranking, by_name, layers_inside
from compress.tracing import torch_base
from compress.tracing.graph import probe, traced_copy

DEFAULT_MULTIPLE = 8
EXCLUDED, KEPT, UNSELECTED = (
    "is excluded by you",
    "is kept whole by you, with a sparsity of 0",
    "is not selected by the config list",
)


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
class Unpruned:
    """A layer that keeps all its output channels."""

    layer: str
    reason: str
    """Why it stays, in a user's words."""
    kind: Literal["answer", "asked", "size", "structure"] = "structure"
    """Whether the answer, the user, the number of its channels or what is done with them keeps it."""
    cause: str = ""
    """The reason of the layer that it goes together with; its own where that is itself."""


@dataclass(frozen=True)
class Plan:
    """What will be removed from a model. Input channels follow from the output channels of the layers before."""

    groups: tuple[Group, ...]
    unpruned: tuple[Unpruned, ...]
    sparse_layers: tuple[str, ...] = ()
    """Layers that keep their shape and get zeros among their weights, by a fine-grained pruner."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers, ready for JSON, under the keys that records have."""
        fields = asdict(self)
        return {"groups": fields["groups"], "left_out": fields["unpruned"], "thinned": fields["sparse_layers"]}

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
    layer_sparsity: Mapping[str, float] | None = None,
    ranking: Ranking = "per-group",
    max_layer_sparsity: float | None = None,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    pruner: str = "l1-norm",
) -> Plan:
    """Decide what to remove from `model`; nothing is changed.

    Each group keeps the multiple of `multiple` nearest to (1 - sparsity) * channels, at least one multiple; around
    grouped convolutions either whole groups go or every group keeps the same number, whichever comes nearer. Attention
    loses whole heads.

    Args:
        model: a float32 module whose forward pass can be traced, in either mode.
        example: one or more images, float32 [N, C, H, W]; only the shape is used.
        sparsity: fraction of output channels to remove from each layer; 0 < sparsity < 1.
        multiple: kept channels are multiples of this.
        exclude: layers that stay, or modules whose layers all stay; what goes together with them stays too,
            and so do the heads of the attention that a layer is part of.
        layer_sparsity: layer or module -> fraction in place of `sparsity`, for its whole group; 0 keeps it whole.
        ranking: `global` lets the groups without a fraction of their own compete; see `ranking.kept_counts`.
        max_layer_sparsity: with global ranking, the largest fraction that any layer loses.
        config_list: NNI's way to say all of that, in place of the five arguments before; see `config_list.translate`.
        pruner: whose metric ranks globally.

    Raises:
        RequestError: an argument is out of range, names no layer of this model, or asks for what cannot be.
        PruningError: the model cannot be traced, or nothing in it can be removed.
    """
    _check_arguments(model, example, sparsity, multiple)
    if max_layer_sparsity is not None and not sparsity <= max_layer_sparsity < 1:
        raise RequestError("max_layer_sparsity", max_layer_sparsity, "a fraction from the sparsity to below 1")
    graph_module = traced_copy(model, example)
    probe(graph_module, example)
    channels = Channels(graph_module)
    if config_list is not None:
        constraints = config_lists.translate(model, channels.layers(), config_list)
    else:
        constraints = by_name(
            channels.layers(),
            sparsity,
            _whole(model, channels, exclude),
            layer_sparsity or {},
            ranking=ranking,
            cap=max_layer_sparsity,
        )
    if constraints.ranking == "global":
        rankings.require_metric(pruner)
    _keep_as_asked(channels, constraints)
    for conv in channels.grouped:
        settle_grouped(channels.sets, conv, constraints, multiple)
    groups, unpruned = decide(channels, model, constraints, multiple)
    if constraints.ranking == "global":
        groups, unchanged = _rank(model, groups, constraints, multiple, pruner)
        unpruned += unchanged
    if not groups:
        example_reason = f": {unpruned[0].layer} {unpruned[0].reason}" if unpruned else ""
        raise PruningError(
            f"Nothing in {type(model).__name__} can be pruned at sparsity {sparsity:g}; all of its "
            f"{len(unpruned)} Conv2d and Linear layers stay{example_reason}."
        )
    return Plan(groups, unpruned)


def plan_without_shrinking(model: nn.Module, *, exclude: Sequence[str] = ()) -> Plan:
    """The plan of a fine-grained pruner: every Conv2d and Linear keeps its shape and gets zeros, unless excluded.

    Raises:
        RequestError: `exclude` names no layer of this model.
        PruningError: no layer is left.
    """
    layers = [name for name, module in model.named_modules() if torch_base(type(module)) in LAYERS]
    excluded = {layer for name in exclude for layer in layers_inside(layers, name, "exclude")}
    sparse_layers = tuple(layer for layer in layers if layer not in excluded)
    if not sparse_layers:
        raise PruningError(
            f"Nothing in {type(model).__name__} can be pruned: {len(excluded)} of its {len(layers)} Conv2d and Linear "
            "layers are excluded; exclude fewer."
        )
    reasons = {layer: "keeps its shape: its smallest weights become zero" for layer in sparse_layers}
    unpruned = tuple(Unpruned(layer, reasons.get(layer, EXCLUDED)) for layer in layers)
    return Plan((), unpruned, sparse_layers)


def _keep_as_asked(channels: Channels, constraints: Constraints) -> None:
    """Rule out what the user excludes, keeps whole, or does not select."""
    sets = channels.sets
    for layer in constraints.excluded:
        sets.keep(channels.own_set[layer], EXCLUDED, [layer])
    for root in sets.roots():
        layers = sets[root].layers
        ratio = constraints.ratio(layers)
        if ratio == 0:
            sets.keep(root, KEPT)
        elif ratio is None:
            sets.keep(root, UNSELECTED)


def _rank(
    model: nn.Module, groups: tuple[Group, ...], constraints: Constraints, multiple: int, pruner: str
) -> tuple[tuple[Group, ...], tuple[Unpruned, ...]]:
    """The groups with what global ranking leaves them; until here they have the fewest channels that are allowed."""
    rivals = [group for group in groups if constraints.competes(group.layers)]
    counts = rankings.kept_counts(
        model,
        [(group.layers, group.channels_before, group.channels_after, group.unit, group.blocks) for group in rivals],
        sparsity=constraints.sparsity,
        multiple=multiple,
        pruner=pruner,
    )
    ranked = {group.layers: replace(group, channels_after=count) for group, count in zip(rivals, counts, strict=True)}
    groups = tuple(ranked.get(group.layers, group) for group in groups)
    whole = [layer for group in groups if group.channels_after == group.channels_before for layer in group.layers]
    reason = "ranks above the others: its channels matter most"
    return tuple(group for group in groups if group.layers[0] not in whole), tuple(
        Unpruned(name, reason, "size", reason) for name in whole
    )


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

    def fewest(self, channels: int, unit: int = 1, blocks: int = 1) -> int:
        """The smallest number that does not remove more than the target's share; at least one multiple."""
        if channels % unit or (channels // unit) % blocks:
            return channels
        step = math.lcm(self.multiple, unit * blocks)
        return min(channels, max(step, step * math.ceil((1 - self.sparsity) * channels / step - 1e-9)))

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


def _whole(model: nn.Module, channels: Channels, names: Sequence[str]) -> list[str]:
    """`names`, where a part of an attention stands for the attention."""
    modules = {name for name, _ in model.named_modules()}
    return [
        next((a for a in channels.attentions if name.startswith(f"{a}.") and name in modules), name) for name in names
    ]


def settle_grouped(sets: ChannelSets, conv: GroupedConv, constraints: Constraints, multiple: int) -> None:
    """Choose how the channels around a grouped convolution may go: whole groups, or evenly out of every group."""
    result = sets[conv.result]
    source = None if conv.source is None else sets[conv.source]
    free = source is not None and source.kept is None and result.kept is None
    fractions = {constraints.ratio(found.layers) for found in (source, result) if found is not None}
    if (
        free
        and source.channels == result.channels
        and (len(fractions) == 1 or not _have_own(constraints, source, result))
    ):
        target = _Target(constraints.ratio([*source.layers, *result.layers]) or 0.0, multiple)
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


def _have_own(constraints: Constraints, *sets: ChannelSet) -> bool:
    """Whether each of these sets is asked for a fraction of its own, so that they cannot share one."""
    return all(any(layer in constraints.ratios for layer in found.layers) for found in sets)


def decide(
    channels: Channels, model: nn.Module, constraints: Constraints, multiple: int
) -> tuple[tuple[Group, ...], tuple[Unpruned, ...]]:
    """The groups that lose channels, and the layers that stay with the reason; grouped convolutions are settled."""
    groups: list[Group] = []
    whole: dict[str, Unpruned] = {}
    for root in channels.sets.roots():
        found = channels.sets[root]
        target = _Target(constraints.ratio(found.layers) or 0.0, multiple)
        after = _channels_after(found, constraints, target)
        if found.kept is not None:
            kind = _KINDS.get(found.kept, "structure")
            whole |= {name: Unpruned(name, _kept_reason(name, found), kind, found.kept) for name in found.layers}
        elif after >= found.channels:
            reason = _too_small(found, target)
            whole |= {name: Unpruned(name, reason, "size", reason) for name in found.layers}
        elif found.layers:
            order = [layer for layer in channels.layers() if layer in set(found.layers)]
            groups.append(Group(tuple(order), found.channels, after, _group_reason(found), found.unit, found.blocks))
    for name in channels.followers:
        reason = "has no channels of its own: it follows the concatenation it reads, channel by channel"
        whole[name] = Unpruned(name, reason, cause=reason)
    for name, module in model.named_modules():
        if (torch_base(type(module)) in LAYERS or is_attention(module)) and name not in channels.own_set:
            reason = "is not called by the forward pass, or only inside a module that is not opened"
            whole[name] = Unpruned(name, reason, cause=reason)
    _refuse_named(channels, constraints, {name: left.reason for name, left in whole.items()})
    parts = tuple(f"{name}." for name in channels.attentions)
    order = {layer: index for index, layer in enumerate(channels.layers())}
    names = sorted((name for name in whole if not name.startswith(parts)), key=lambda name: order.get(name, len(order)))
    return tuple(groups), tuple(whole[name] for name in names)


_KINDS: dict[str, Literal["answer", "asked"]] = {
    ANSWER: "answer",
    **dict.fromkeys((EXCLUDED, KEPT, UNSELECTED), "asked"),
}


def _channels_after(found: ChannelSet, constraints: Constraints, target: _Target) -> int:
    """What is kept; of a group that competes, the fewest that may be."""
    if not constraints.competes(found.layers):
        return target.kept(found.channels, found.unit, found.blocks)
    limit = replace(target, sparsity=1.0 if constraints.cap is None else constraints.cap)
    return limit.fewest(found.channels, found.unit, found.blocks)


def _refuse_named(channels: Channels, constraints: Constraints, reasons: Mapping[str, str]) -> None:
    """Raise `RequestError` for a fraction asked by name of layers that all must stay whole."""
    sets = (channels.sets[root] for root in channels.sets.roots())
    fixed = {*channels.followers, *(layer for found in sets if found.kept for layer in found.layers)}
    for name, layers in constraints.named.items():
        if fixed.issuperset(layers):
            raise RequestError(
                constraints.where, name, f"a layer that can be pruned, but {layers[0]} {reasons[layers[0]]}"
            )


def _kept_reason(layer: str, found: ChannelSet) -> str:
    if layer in found.kept_layers or not found.kept_layers:
        return str(found.kept)
    reason = str(found.kept)
    which = f"whose {reason.removeprefix('its ')}" if reason.startswith("its ") else f"which {reason}"
    return f"goes together with {found.kept_layers[0]}, {which}"


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
