"""Global ranking: groups of layers compete, and those whose channels matter least lose most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.errors import RequestError
from compress.models.attention import is_attention, value_rows


def _geometric_median(rows: Tensor) -> Tensor:
    return torch.cdist(rows.double(), rows.double()).sum(1).float()


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1-norm": lambda rows: rows.abs().sum(1),
    "l2-norm": lambda rows: rows.norm(dim=1),
    "fpgm": _geometric_median,
}
"""Pruner -> importance of each output channel [channels], from the layer's weight [channels, ...] laid flat."""


def require_metric(pruner: str) -> None:
    """Refuse a pruner whose importance of a channel is not a function of the weights."""
    if pruner not in METRICS:
        raise RequestError(
            "ranking", "global", f"per-group with {pruner}, because only {', '.join(METRICS)} rank by weights alone"
        )


def kept_counts(
    model: nn.Module,
    competitors: Sequence[tuple[tuple[str, ...], int, int, int, int]],
    *,
    sparsity: float,
    multiple: int,
    pruner: str,
) -> list[int]:
    """How many channels each group keeps, so that together they lose `sparsity` of their layers' output channels.

    A channel's importance is the mean over the layers of its group, as in NNI's dependency groups, divided by the mean
    over the group's channels: layers of different width and scale become comparable. This is the normalisation that
    DepGraph's pruner uses by default (Fang et al., CVPR 2023, arXiv:2301.12900). Multiples of channels then go in the
    order of their mean importance, until another one would lead away from what was asked.

    Args:
        competitors: (layers, channels, fewest to keep, unit, blocks) of each group; see `Group`.
        sparsity: fraction of the output channels of all layers of all groups that goes.

    Raises:
        RequestError: the pruner's importance is not known from weights.
    """
    require_metric(pruner)
    steps: list[tuple[float, int, int, int]] = []
    for index, (layers, channels, fewest, unit, blocks) in enumerate(competitors):
        curve = _ascending(model, layers, unit, blocks, METRICS[pruner])
        width = math.lcm(multiple, unit * blocks)
        kept = channels
        while kept > fewest:
            following = (kept - 1) // width * width
            removed = slice((channels - kept) // unit // blocks, (channels - following) // unit // blocks)
            steps.append((float(curve[removed].mean()), index, following, (kept - following) * len(layers)))
            kept = following
    counts = [channels for _, channels, *_ in competitors]
    left = sparsity * sum(len(layers) * channels for layers, channels, *_ in competitors)
    for _, index, following, cost in sorted(steps, key=lambda step: step[0]):
        if abs(left - cost) > abs(left):
            break
        counts[index], left = following, left - cost
    return counts


def _ascending(
    model: nn.Module, layers: Sequence[str], unit: int, blocks: int, metric: Callable[[Tensor], Tensor]
) -> Tensor:
    """Normalised importance of what goes first, second, ...: [channels / unit / blocks], ascending."""
    with torch.no_grad():
        scores = torch.stack([metric(_rows(model.get_submodule(layer))) for layer in layers]).mean(0)
        scores = scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
        return scores.view(blocks, -1, unit).mean(2).sort(1).values.mean(0)


def _rows(layer: nn.Module) -> Tensor:
    """The weights of each output channel; of attention those of its values, as when heads are chosen."""
    return value_rows(layer) if is_attention(layer) else layer.weight.flatten(1)
