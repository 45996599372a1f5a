"""What the training loop is given: hyperparameters, batches, and where to report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.tasks import CLASSIFICATION, Task

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""(images float32 [N, 3, H, W] normalised, labels int64 [N], -1 where unknown), and without augmentation the images'
indices int64 [N]: the same index always comes with the same pixels."""
Batches = Callable[[int], Iterable[Batch]]
"""Epoch number -> its batches."""
Progress = Callable[[float, str], None]
"""Called with the fraction done, 0..1, and a message."""


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters of one training."""

    epochs: float
    """Passes over the training images; a fraction ends within an epoch."""
    learning_rate: float
    """Peak of the one-cycle schedule."""
    distillation_weight: float
    """w of the loss, 0..1, see `compress.training.loss`; ignored without a teacher."""
    temperature: float
    """T of the distillation loss, above 0."""
    label_smoothing: float = 0.0
    """Of the cross-entropy, 0..1."""
    optimizer: str = "adamw"
    """`adamw` or `sgd`."""
    task: Task = CLASSIFICATION
    """Whose losses are taken."""


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
