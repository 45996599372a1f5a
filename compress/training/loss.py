"""The loss: cross-entropy with the labels, distillation from a teacher, or both.

    (1 - w) * cross-entropy(labels) + w * T^2 * KL(teacher / T || student / T)          (Hinton et al. 2015)

With augmentation teacher and student see the same augmented image, so the student matches the teacher's function rather
than a fixed table of answers (Beyer et al. 2022, "A good teacher is patient and consistent"). Without it that table is
all there is to match, and `Teacher` computes each answer once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.models.calls import logits_of, own_errors
from compress.training.config import TrainingConfig, device
from compress.training.distillation import Teacher
from compress.training.memory_format import PLAIN, Format, in_training_mode
from compress.training.single_pixels import single_pixel_convs_as_matmul


def loss_function(
    config: TrainingConfig, teacher: nn.Module | None, classes: int | None = None
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss as a function of (model, images, labels), for training loops other than `fit`.

    The function takes images float32 [N, 3, H, W] and labels int64 [N], both on `device()` as the model is, and returns a
    float32 scalar.

    Args:
        teacher: is copied.
        classes: columns of the logits, see `logits_of`.
    """
    frozen = Teacher(teacher, device()) if teacher is not None else None

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with single_pixel_convs_as_matmul(frozen.model if frozen is not None else None):
            return batch_loss(model, frozen, images, labels, config, classes=classes)

    return loss


def batch_loss(
    model: nn.Module,
    teacher: Teacher | None,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    *,
    layout: Format = PLAIN,
    indices: Tensor | None = None,
    classes: int | None = None,
) -> Tensor:
    """The loss of one batch, a float32 scalar.

    Args:
        images: float32 [N, 3, H, W], normalised, in the memory format of `layout`.
        labels: int64 [N]; not read where the weight of distillation is 1.
        indices: int64 [N], see `Teacher`.
        classes: columns of the logits, see `logits_of`.
    """
    with layout.computing(images.device):
        with own_errors(model, in_training_mode(images)):
            logits = logits_of(model(images), classes).float()
        target = teacher(images, indices) if teacher is not None else None
    weight = config.distillation_weight if target is not None else 0.0
    loss = torch.zeros((), device=logits.device)
    if weight < 1:
        loss = (1 - weight) * config.task.loss(logits, labels, config.label_smoothing)
    if target is not None and weight > 0:
        loss = loss + weight * config.task.distillation_loss(logits, target, config.temperature)
    return loss
