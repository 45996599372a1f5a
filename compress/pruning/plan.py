"""The pruning plan: which layers lose how many channels, which share theirs, and why the others are not pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.errors import PruningError, RequestError
from compress.pruning import config_list as config_lists
from compress.pruning.allocation import allocate, rank_globally, settle_grouped
from compress.pruning.channels import LAYERS, Channels, analyse
from compress.pruning.constraints import Constraints, Ranking, by_name, layers_inside
from compress.pruning.interface import Plan, Unpruned, clause
from compress.pruning.ranking import require_metric
from compress.tracing import torch_base

DEFAULT_MULTIPLE = 8
EXCLUDED = "is excluded by you"
ZERO_SPARSITY = "has a sparsity of 0, as you set it"
UNSELECTED = "is not selected by the config list"


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

    Each group keeps the multiple of `multiple` nearest to (1 - sparsity) * channels, at least one multiple. A grouped
    convolution loses whole groups or the same number of channels from every group, whichever comes nearer. Attention
    loses whole heads.

    Args:
        model: a float32 module whose forward pass can be traced, in either mode.
        example: one or more images, float32 [N, C, H, W]; only the shape is used.
        sparsity: fraction of output channels to remove from each layer; 0 < sparsity < 1.
        multiple: kept channels are multiples of this.
        exclude: layers that are not pruned, or modules of which no layer is; neither are the layers that share their
            channels, nor the heads of the attention that a layer is part of.
        layer_sparsity: layer or module -> fraction in place of `sparsity`, for its whole group; with 0 it is not pruned.
        ranking: `global` lets the groups without a fraction of their own compete; see `ranking.kept_counts`.
        max_layer_sparsity: with global ranking, the largest fraction that any layer loses.
        config_list: an NNI config list in place of the five arguments before; see `config_list.translate`.
        pruner: whose metric ranks globally.

    Raises:
        RequestError: an argument is out of range, names no layer of this model, or asks for what cannot be.
        PruningError: the model cannot be traced, or nothing in it can be removed.
    """
    _check_arguments(sparsity, multiple, max_layer_sparsity)
    check_example(model, example)
    channels = analyse(model, example)
    if config_list is not None:
        constraints = config_lists.translate(model, channels.layers(), config_list)
    else:
        layers, excluded = channels.layers(), _attention_of(model, channels, exclude)
        constraints = by_name(
            layers, sparsity, excluded, layer_sparsity, ranking=ranking, max_layer_sparsity=max_layer_sparsity
        )
    if constraints.ranking == "global":
        require_metric(pruner)
    _apply(constraints, channels)
    for conv in channels.grouped:
        settle_grouped(channels.sets, conv, constraints, multiple)
    groups, unpruned = allocate(channels, model, constraints, multiple)
    if constraints.ranking == "global":
        groups, unchanged = rank_globally(model, groups, constraints, multiple, pruner)
        unpruned += unchanged
    if not groups:
        raise _nothing_to_prune(model, sparsity, unpruned)
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


def _nothing_to_prune(model: nn.Module, sparsity: float, unpruned: Sequence[Unpruned]) -> PruningError:
    first = f": {clause(unpruned[0].layer, unpruned[0].reason)}" if unpruned else ""
    return PruningError(
        f"Nothing in {type(model).__name__} can be pruned at sparsity {sparsity:g}; all of its {len(unpruned)} Conv2d and "
        f"Linear layers keep their channels{first}."
    )


def _apply(constraints: Constraints, channels: Channels) -> None:
    """Freeze the channels of layers that the user excludes, gives a sparsity of 0, or does not select."""
    sets = channels.sets
    for layer in constraints.excluded:
        sets.freeze(channels.own_set[layer], EXCLUDED, [layer], kind="asked")
    for root in sets.roots():
        ratio = constraints.ratio(sets[root].layers)
        if ratio == 0:
            sets.freeze(root, ZERO_SPARSITY, kind="asked")
        elif ratio is None:
            sets.freeze(root, UNSELECTED, kind="asked")


def _check_arguments(sparsity: float, multiple: int, max_layer_sparsity: float | None) -> None:
    if not 0 < sparsity < 1:
        raise RequestError("sparsity", sparsity, "a fraction strictly between 0 and 1")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise RequestError("multiple", multiple, "a whole number from 1 up, such as 8")
    if max_layer_sparsity is not None and not sparsity <= max_layer_sparsity < 1:
        raise RequestError("max_layer_sparsity", max_layer_sparsity, "a fraction from the sparsity to below 1")


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


def _attention_of(model: nn.Module, channels: Channels, names: Sequence[str]) -> list[str]:
    """`names`, with the attention in place of each module inside it: an attention is pruned by whole heads."""
    modules = {name for name, _ in model.named_modules()}
    return [
        next((a for a in channels.attentions if name.startswith(f"{a}.") and name in modules), name) for name in names
    ]
