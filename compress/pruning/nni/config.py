"""A pruning plan in NNI's terms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress import nni_bridge
from compress.pruning.interface import Plan

Masks = Mapping[str, Mapping[str, torch.Tensor]]
"""NNI's form: layer -> parameter name -> 0/1 of the parameter's shape."""


def config_list(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Write `plan` as an NNI 3.0 config list: one entry per layer, the layers of a group under one dependency id.

    NNI removes int(blocks_of_units * sparse_ratio) of the smallest metrics in each metric block; half a unit more than
    the planned number makes that count independent of rounding.
    """
    nni_bridge.know_subclasses(model, plan.layers)
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
                dims = model.get_submodule(layer).get_parameter("weight").dim()
                entry["target_settings"] = {"weight": {"granularity": [group.unit] + [-1] * (dims - 1)}}
            entries.append(entry)
    return entries


def make_comparable(pruner: Any, plan: Plan) -> None:
    """Let an NNI pruner average the metrics of Linear layers and convolutions that share their channels, as in a gate.

    NNI adds up the metrics of a group, which must have one shape: those of a Linear get the dimensions of a convolution.
    """
    for group in plan.groups:
        spaces = [pruner._target_spaces[layer]["weight"] for layer in group.layers]
        most = max(space.target.dim() for space in spaces)
        for space in spaces:
            if space.target.dim() < most:
                space._scaler = _padded_class()(space._scaler, most - space.target.dim())


@functools.cache
def _padded_class() -> type:
    """NNI's Scaling whose metrics have more dimensions, of size one, than the weight."""
    base = nni_bridge.load("nni.compression.utils.scaling").Scaling

    class Padded(base):  # type: ignore[misc, valid-type]
        def __init__(self, plain: Any, more: int) -> None:
            super().__init__(plain.kernel_size, plain.kernel_padding_mode, plain.kernel_padding_val)
            self._more = more

        def shrink(self, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            metrics: torch.Tensor = super().shrink(target, *args, **kwargs)
            return metrics[(..., *[None] * self._more)]

        def expand(self, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            mask: torch.Tensor = super().expand(target.flatten(-self._more - 1), *args, **kwargs)
            return mask

    return Padded
