"""Global ranking: groups of layers compete, and those whose channels are least important lose the largest share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.errors import RequestError
from compress.models.attention import is_attention, value_rows
from compress.pruning.interface import Group


def _geometric_median(rows: Tensor) -> Tensor:
    return torch.cdist(rows.double(), rows.double()).sum(1).float()


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1-norm": lambda rows: rows.abs().sum(1),
    "l2-norm": lambda rows: rows.norm(dim=1),
    "fpgm": _geometric_median,
}
"""Pruner -> importance of each output channel, float [channels], >= 0, from the layer's weights [channels, ...] flattened."""


def require_metric(pruner: str) -> None:
    """Raise `RequestError` for a pruner whose importance of a channel is not computed from the weights alone."""
    if pruner not in METRICS:
        raise RequestError(
            "ranking", "global", f"per-group with {pruner}, because only {', '.join(METRICS)} rank by weights alone"
        )


def kept_counts(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    sparsity: float,
    multiple: int,
    pruner: str,
) -> list[int]:
    """How many channels each group keeps, so that together they lose `sparsity` of their layers' output channels.

    A channel's importance is the mean over the layers of its group, as in NNI's dependency groups, divided by the mean
    over the group's channels: layers of different width and scale become comparable. This is the normalisation that
    DepGraph's pruner uses by default (Fang et al., CVPR 2023, arXiv:2301.12900). Multiples of channels are then removed in
    the order of their mean importance, until another one would lead away from `sparsity`.

    Args:
        groups: those that compete; `channels_after` is the fewest that each may keep.
        sparsity: fraction of the output channels of all layers of all groups to remove.

    Raises:
        RequestError: the pruner's importance is not computed from the weights alone.
    """
    require_metric(pruner)
    steps: list[tuple[float, int, int, int]] = []
    for index, group in enumerate(groups):
        scores, channels = _ascending(model, group, METRICS[pruner]), group.channels_before
        width, unit = math.lcm(multiple, group.unit * group.blocks), group.unit * group.blocks
        kept = channels
        while kept > group.channels_after:
            fewer = (kept - 1) // width * width
            removed = slice((channels - kept) // unit, (channels - fewer) // unit)
            steps.append((float(scores[removed].mean()), index, fewer, (kept - fewer) * len(group.layers)))
            kept = fewer
    counts = [group.channels_before for group in groups]
    to_remove = sparsity * sum(len(group.layers) * group.channels_before for group in groups)
    for _, index, fewer, removed_channels in sorted(steps, key=lambda step: step[0]):
        if abs(to_remove - removed_channels) > abs(to_remove):
            break
        counts[index], to_remove = fewer, to_remove - removed_channels
    return counts


def _ascending(model: nn.Module, group: Group, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """Normalised importance of what is removed first, second, ...: float [channels / unit / blocks], ascending."""
    with torch.no_grad():
        scores = torch.stack([metric(_rows(model.get_submodule(layer))) for layer in group.layers]).mean(0)
        scores = scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
        return scores.view(group.blocks, -1, group.unit).mean(2).sort(1).values.mean(0)


def _rows(layer: nn.Module) -> Tensor:
    """The weights of each output channel; of attention those of its values, as when heads are chosen."""
    return value_rows(layer) if is_attention(layer) else layer.get_parameter("weight").flatten(1)
