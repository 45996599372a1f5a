"""What pruning is given to train with, and the models that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from compress.errors import RequestError
from compress.pruning.plan import Plan


@dataclass(frozen=True)
class PruningTraining:
    """How a pruner looks at images and trains.

    Attributes:
        batches: epoch number -> batches of (images float32 [N, C, H, W], labels int64 [N]; -1 where unknown), all of
            one size; never test images.
        loss: loss(model, images, labels) -> scalar to train by.
        steps: batches to look at, or optimizer steps to make, over all rounds; at least `rounds`.
        learning_rate: peak of the cycle (SGD).
        rounds: of gradual pruning: train, prune, train again.
        progress: called with the fraction done and a text.
    """

    batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    steps: int
    learning_rate: float
    rounds: int = 5
    progress: Callable[[float, str], None] = lambda fraction, text: None

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.steps:
            raise RequestError("rounds", self.rounds, f"a whole number from 1 to the {self.steps} training steps")


@dataclass(frozen=True)
class PrunedModel:
    """A really smaller model, and how far its answers are from the masked model's.

    Attributes:
        model: of the original class, its layers replaced; modes and requires_grad as in the input model.
        plan: what was removed.
        max_abs_diff: largest absolute difference to the masked model, over the outputs on the example images.
        reference_scale: largest absolute output of the masked model.
        kept_channels: layer -> which of its output channels stay, bool [channels before].
        seconds: wall time of choosing, shrinking and checking.
    """

    model: nn.Module
    plan: Plan
    max_abs_diff: float
    reference_scale: float
    kept_channels: Mapping[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class SparseModel:
    """A model of the original shape with single weights at zero.

    Attributes:
        model: a copy of the original; modes and requires_grad as there.
        zeros: layer -> share of its weights that are zero.
    """

    model: nn.Module
    zeros: Mapping[str, float]
