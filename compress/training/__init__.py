"""The one training loop: fine-tuning, distillation and quantization-aware training all run through `fit`.

    records = fit(model, batches, steps_per_epoch, TrainingConfig(epochs=2, learning_rate=1e-3, ...), teacher=dense)

`loss` says what is minimised, `optimizer` with which steps, `memory_format` in which memory layout and precision.
"""

from __future__ import annotations

from compress.training.config import Batch, Batches, Progress, TrainingConfig, device
from compress.training.loop import TOO_FEW_IMAGES, WORTH_TRIALS, fit
from compress.training.loss import loss_function
from compress.training.optimizer import MOMENTUM, WEIGHT_DECAY, build_optimizer, one_cycle, parameter_groups
from compress.training.single_pixels import single_pixel_convs_as_matmul

__all__ = [
    "Batch",
    "Batches",
    "MOMENTUM",
    "Progress",
    "TOO_FEW_IMAGES",
    "TrainingConfig",
    "WEIGHT_DECAY",
    "WORTH_TRIALS",
    "build_optimizer",
    "device",
    "fit",
    "loss_function",
    "one_cycle",
    "parameter_groups",
    "single_pixel_convs_as_matmul",
]
