"""NNI's pruners with the exact number of channels that each group keeps, and the check that they kept so many."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from compress import nni_bridge
from compress.errors import PruningError
from compress.methods.pruners import Pruner
from compress.models.attention import heads_of, is_attention, value_rows
from compress.pruning.interface import Group, Plan, PruningTraining, SparseModel
from compress.pruning.nni import data_driven, trained
from compress.pruning.nni.config import Masks, config_list, make_comparable
from compress.tracing.graph import structure_copy
from compress.training import device, single_pixel_convs_as_matmul

_MODULES = {"data_driven": data_driven, "trained": trained}
"""The modules that `Pruner.function` names a function of."""
_WEIGHTS_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class Choice:
    """Which channels stay, and the model whose weights the result takes: the input model, or a trained copy."""

    kept: dict[str, torch.Tensor]
    """layer -> bool of shape [out_channels]."""
    model: nn.Module


def choose(
    model: nn.Module, example: torch.Tensor, plan: Plan, pruner: Pruner, training: PruningTraining | None
) -> Choice:
    """Run `pruner` over a copy of `model`, which is only read; see `compress.pruning.prune` for what it raises.

    NNI has no wrapper for attention, so with a pruner that runs the model the L1 norm chooses the heads.

    Args:
        example: float32 [N, C, H, W] on the model's device.
    """
    if training is None or not pruner.needs_images:
        return Choice(kept_channels(model, plan, pruner.nni_class), model)
    _check_fits(model, plan)
    with_heads = [group for group in plan.groups if is_attention(model.get_submodule(group.layers[0]))]
    heads = kept_channels(model, replace(plan, groups=tuple(with_heads)), "L1NormPruner") if with_heads else {}
    plan = replace(plan, groups=tuple(group for group in plan.groups if group not in with_heads))
    subject = copy.deepcopy(structure_copy(model)).to(device())
    with nni_bridge.quiet(), torch.enable_grad(), single_pixel_convs_as_matmul(subject):
        torch.manual_seed(0)
        masks = _with_images(pruner, subject, example.to(device()), plan, training)
    return Choice(heads | _kept(plan, masks), _with_tensors_of(subject, model) if pruner.leaves_trained else model)


def _with_images(
    pruner: Pruner, model: nn.Module, example: torch.Tensor, plan: Plan, training: PruningTraining
) -> Masks:
    """The masks of the function that the registry names for `pruner`."""
    module, _, name = pruner.function.rpartition(".")
    masks: Masks = getattr(_MODULES[module], name)(model, example, plan, training, pruner)
    return masks


def kept_channels(model: nn.Module, plan: Plan, nni_class: str) -> dict[str, torch.Tensor]:
    """Run NNI's pruner over a copy of `model`; the layers of a group get the same channels removed.

    Args:
        model: the module that the plan was made for; only read.
        nni_class: name of the pruner in nni.compression.pruning.

    Returns: for each planned layer, which output channels are kept: bool of shape [out_channels].

    Raises:
        PruningError: the plan does not fit the model, or NNI kept other channels than planned.
    """
    _check_fits(model, plan)
    kept: dict[str, torch.Tensor] = {}
    for part in _portions(model, plan):
        subject = structure_copy(model)
        _heads_as_rows(subject, part)
        with nni_bridge.quiet(), torch.no_grad():
            pruner = _pruner_class(nni_class)(subject, config_list(subject, part))
            make_comparable(pruner, part)
            _, masks = pruner.compress()
        kept |= _kept(part, masks)
        del subject, pruner, masks
        gc.collect()  # NNI's wrappers refer to each other, and would keep their copies
    return kept


def _portions(model: nn.Module, plan: Plan) -> Iterator[Plan]:
    """The plan in parts of whole groups: NNI holds four copies of every weight that it looks at.

    How many channels a group keeps is planned, so groups do not compete here and no part needs to know of another.
    """
    part: list[Group] = []
    weights = 0
    for group in plan.groups:
        own = sum(_weight(model.get_submodule(layer)).numel() for layer in group.layers)
        if part and weights + own > _WEIGHTS_AT_ONCE:
            yield replace(plan, groups=tuple(part))
            part, weights = [], 0
        part, weights = [*part, group], weights + own
    if part:
        yield replace(plan, groups=tuple(part))


def zero_weights(model: nn.Module, plan: Plan, sparsity: float) -> SparseModel:
    """See `compress.pruning.zero_weights`; NNI's LevelPruner chooses."""
    result = copy.deepcopy(structure_copy(model))
    nni_bridge.know_subclasses(model, plan.sparse_layers)
    config = {"op_names": list(plan.sparse_layers), "target_names": ["weight"], "sparse_ratio": sparsity}
    with nni_bridge.quiet(), torch.no_grad():
        _, masks = _pruner_class("LevelPruner")(structure_copy(model), [config]).compress()
        for layer in plan.sparse_layers:
            result.get_submodule(layer).get_parameter("weight").masked_fill_(masks[layer]["weight"] == 0, 0.0)
    weights = {layer: result.get_submodule(layer).get_parameter("weight") for layer in plan.sparse_layers}
    zeros = {layer: float((weight == 0).float().mean()) for layer, weight in weights.items()}
    return SparseModel(result, zeros)


def _with_tensors_of(trained_copy: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of `model`, with its modes, requires_grad and ties, that has the tensors of `trained_copy`."""
    result = copy.deepcopy(structure_copy(model))
    tensors = {**dict(trained_copy.named_parameters()), **dict(trained_copy.named_buffers())}
    with torch.no_grad():
        for name, tensor in chain(result.named_parameters(), result.named_buffers()):
            tensor.copy_(tensors[name])
    return result


def _kept(plan: Plan, masks: Masks) -> dict[str, torch.Tensor]:
    """For each planned layer the output channels that its mask keeps, having checked them against the plan."""
    kept = {layer: _kept_rows(layer, group, masks[layer]["weight"].cpu()) for layer, group in plan.layers.items()}
    for group in plan.groups:
        for layer in group.layers[1:]:
            if not torch.equal(kept[layer], kept[group.layers[0]]):
                raise PruningError(
                    f"The pruner chose different channels in {group.layers[0]} and {layer}, which share "
                    "theirs; exclude one of them to go on without the group."
                )
    return kept


def _heads_as_rows(subject: nn.Module, plan: Plan) -> None:
    """Turn attention, which NNI does not know, into a Linear of its value rows.

    So a head's metric is a norm (or, for fpgm, a distance) of W_V. Whole heads can go at a small loss (Michel et al., "Are
    Sixteen Heads Really Better than One?", arXiv:1905.10650). A small norm tells which for the reason it does with filters
    (Li et al., arXiv:1608.08710): it bounds what is handed on. A head gives averages of W_V x, whose weights sum to one,
    so the sizes of query and key decide where it looks and not how much it gives.
    """
    for layer in plan.layers:
        if is_attention(subject.get_submodule(layer)):
            subject.set_submodule(layer, _of_values(subject.get_submodule(layer)))


def _of_values(attention: nn.Module) -> nn.Linear:
    """A Linear of the value rows; the attention's parts keep their names in it, as other groups may be of these."""
    rows = value_rows(attention)
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows.detach(), requires_grad=False)
    for name, part in attention.named_children():
        linear.add_module(name, part)
    return linear


def _check_fits(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for layer, group in plan.layers.items():
        channels = _output_channels(modules.get(layer))
        if channels != group.channels_before:
            got = "no such layer" if channels is None else f"{channels} channels"
            raise PruningError(
                f"The plan was made for another model: it expects {group.channels_before} output "
                f"channels in {layer} and finds {got}; call plan() on this model."
            )


def _weight(module: nn.Module) -> torch.Tensor:
    """What NNI gets to see of a layer."""
    return value_rows(module) if is_attention(module) else module.get_parameter("weight")


def _output_channels(module: nn.Module | None) -> int | None:
    if module is not None and is_attention(module):
        return heads_of(module).channels
    weight = getattr(module, "weight", None)
    return None if weight is None else weight.shape[0]


def _kept_rows(layer: str, group: Group, mask: torch.Tensor) -> torch.Tensor:
    """The output channels that a weight mask keeps, having checked that it keeps whole ones, and as many as planned."""
    rows = mask.flatten(1)
    kept = rows.amax(1) > 0
    if int(kept.sum()) != group.channels_after or not torch.equal(kept, rows.amin(1) > 0):
        raise PruningError(
            f"The pruner keeps {int(kept.sum())} of {group.channels_before} channels in {layer} where "
            f"{group.channels_after} were planned; exclude the layer to go on without it."
        )
    return kept


def _pruner_class(nni_class: str) -> type:
    pruning = nni_bridge.load("nni.compression.pruning")
    base = getattr(pruning, nni_class)
    return _fast_fpgm(base) if nni_class == "FPGMPruner" else base


def _fast_fpgm(base: type) -> type:
    """NNI's FPGM pruner with its metric as one distance matrix.

    NNI sums the distances to all other channels row by row: minutes for a fully connected layer of VGG. The metric is
    the same (He et al., CVPR 2019, equation 6).
    """

    def sum_of_distances(values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1]).double()
        return torch.cdist(rows, rows).sum(1).to(values.dtype).reshape(values.shape[:-1])

    def _calculate_metrics(self: Any, data: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        return {
            layer: {
                name: self._target_spaces[layer][name]._scaler.shrink(value, sum_of_distances, keepdim=True)
                for name, value in tensors.items()
            }
            for layer, tensors in data.items()
        }

    return type("FPGMPruner", (base,), {"_calculate_metrics": _calculate_metrics})
