"""The optimizer (AdamW, or SGD with Nesterov momentum) and its one-cycle learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from compress.errors import TrainingError
from compress.training.config import TrainingConfig

MOMENTUM = 0.9
"""Of SGD."""
WARM_UP = 0.15
"""Share of the steps in which the learning rate rises."""
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 5e-4}
"""By optimizer."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Raises `TrainingError` when every parameter of `model` is frozen."""
    groups = parameter_groups(model, WEIGHT_DECAY[config.optimizer])
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: decaying biases and normalisation layers costs accuracy.

    Raises `TrainingError` when every parameter of `model` is frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(
            "Every parameter of the model is frozen. Unfreeze some, or set --finetune-epochs and --qat-epochs to 0."
        )
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def one_cycle(done: float) -> float:
    """Factor of the peak learning rate after the fraction `done` of all steps: a linear rise, then a cosine to 0."""
    if done < WARM_UP:
        return 0.1 + 0.9 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))
