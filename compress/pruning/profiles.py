"""Parameters and MACs of an architecture pruned at every whole percent, as one small JSON object for the web page."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.models import architectures, counting
from compress.pruning import shortfall
from compress.pruning.estimate import Estimate, estimates

PERCENTS = range(1, 100)
NEED_NUMBERS = "swin_v2"
"""Family that computes a table of positions, so that it cannot be counted without numbers in its weights."""


def profile(model: str, classes: int, input_size: int | None, multiple: int) -> dict[str, Any]:
    """Parameters, MACs and plan of a torchvision classifier at each sparsity of `PERCENTS`; no weights are needed.

    Args:
        input_size: pixels; None is the published recipe's.
        multiple: kept channels are a multiple of this.

    Returns:
        model, classes, input_size, multiple, parameters, macs; words: texts that are referred to by index; and rows,
        by percent: parameters, macs, groups [words index of the layers, channels, kept, words index of the reason],
        left_out [words index of the layer, words index of the reason] and short, the words index of the text for a plan
        that removes far less than the sparsity, else null.

    Raises:
        RequestError: torchvision has no such classifier.
        PruningError: it cannot be traced.
    """
    published = architectures.published(model)
    size = input_size or published.preprocessing.input_size
    build = architectures.build if model.startswith(NEED_NUMBERS) else architectures.build_empty
    network = build(architectures.fresh(model, classes, size))
    words: dict[str, int] = {}
    example = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    counts = estimates(network, example, [percent / 100 for percent in PERCENTS], multiple=multiple)
    return {
        "model": model,
        "classes": classes,
        "input_size": size,
        "multiple": multiple,
        "parameters": counting.count_parameters(network),
        "macs": counting.count_macs(network, size),
        "rows": {
            str(percent): _row(network, multiple, one, words) for percent, one in zip(PERCENTS, counts, strict=True)
        },
        "words": list(words),
    }


def _row(network: nn.Module, multiple: int, estimate: Estimate, words: dict[str, int]) -> dict[str, Any]:
    def index(text: str) -> int:
        return words.setdefault(text, len(words))

    short = shortfall(network, estimate.plan, estimate.sparsity, multiple, estimate.parameters)
    return {
        "short": None if short is None else index(short),
        "parameters": estimate.parameters,
        "macs": estimate.macs,
        "groups": [
            [index(" ".join(group.layers)), group.channels_before, group.channels_after, index(group.reason)]
            for group in estimate.plan.groups
        ],
        "left_out": [[index(layer.layer), index(layer.reason)] for layer in estimate.plan.unpruned],
    }
