"""NNI's pruners, told exactly how many channels each group keeps, and checked to have done so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _nni
from ..attention import heads_of, is_attention, value_rows
from ..errors import PruningError
from .plan import Group, Plan
from .trace import structure_copy


def config_list(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Write `plan` as an NNI 3.0 config list: one entry per layer, the layers of a group under one dependency id.

    NNI removes int(blocks_of_units * sparse_ratio) of the smallest metrics in each metric block; half a unit on top of
    the number wanted makes that count independent of rounding.
    """
    entries = []
    for index, group in enumerate(plan.groups):
        units = group.channels_before // group.unit // group.blocks
        removed = (group.channels_before - group.channels_after) // group.unit // group.blocks
        for layer in group.layers:
            entry: dict[str, Any] = {
                "op_names": [layer],
                "sparse_ratio": (removed + 0.5) / units,
                "dependency_group_id": f"group {index}",
                "internal_metric_block": group.blocks,
            }
            if group.unit > 1:
                dims = model.get_submodule(layer).weight.dim()
                entry["target_settings"] = {"weight": {"granularity": [group.unit] + [-1] * (dims - 1)}}
            entries.append(entry)
    return entries


def kept_channels(model: nn.Module, plan: Plan, nni_class: str) -> dict[str, torch.Tensor]:
    """Run NNI's pruner over a copy of `model`; the layers of a group get the same channels removed.

    Args:
        model: the module that the plan was made for; only read.
        nni_class: name of the pruner in nni.compression.pruning.

    Returns: for each planned layer, which output channels stay: bool [out_channels].

    Raises:
        PruningError: the plan does not fit the model, or NNI kept other channels than planned.
    """
    _check_fits(model, plan)
    subject = structure_copy(model)
    _make_comparable(subject, plan)
    with _nni.quiet(), torch.no_grad():
        pruner = _pruner_class(nni_class)(subject, config_list(subject, plan))
        _, masks = pruner.compress()
    kept = {layer: _kept_rows(layer, group, masks[layer]["weight"]) for layer, group in plan.layers.items()}
    for group in plan.groups:
        for layer in group.layers[1:]:
            if not torch.equal(kept[layer], kept[group.layers[0]]):
                raise PruningError(
                    f"NNI removed different channels in {group.layers[0]} and {layer}, which share "
                    "theirs; exclude one of them to go on without the group."
                )
    return kept


def _make_comparable(subject: nn.Module, plan: Plan) -> None:
    """Turn Linear layers that share channels with convolutions, as in a gate, into 1 x 1 convolutions.

    NNI averages the metrics within a group, and refuses metrics of two shapes.

    Attention, which NNI does not know, becomes a Linear of its value rows, so a head's metric is a norm (or, for fpgm, a
    distance) of W_V. Whole heads can go at a small loss (Michel et al., "Are Sixteen Heads Really Better than One?",
    arXiv:1905.10650). A small norm tells which for the reason it does with filters (Li et al., arXiv:1608.08710): it
    bounds what is handed on. A head gives averages of W_V x, whose weights sum to one, so the sizes of query and key
    decide where it looks and not how much it gives.
    """
    for group in plan.groups:
        members = {layer: subject.get_submodule(layer) for layer in group.layers}
        for layer, member in members.items():
            if is_attention(member):
                subject.set_submodule(layer, _of_values(member))
                members[layer] = subject.get_submodule(layer)
        if len({member.weight.dim() for member in members.values()}) == 1:
            continue
        for layer, member in members.items():
            if isinstance(member, nn.Linear):
                conv = nn.Conv2d(member.in_features, member.out_features, 1, bias=False, device="meta")
                conv.weight = nn.Parameter(member.weight.detach()[:, :, None, None], requires_grad=False)
                subject.set_submodule(layer, conv)


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
            f"NNI kept {int(kept.sum())} of {group.channels_before} channels in {layer} where "
            f"{group.channels_after} were planned; exclude the layer to go on without it."
        )
    return kept


def _pruner_class(nni_class: str) -> type:
    pruning = _nni.load("nni.compression.pruning")
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
