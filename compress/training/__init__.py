"""The one training loop: fine-tuning, distillation and quantization-aware training all run through `fit`.

AdamW, or SGD with Nesterov momentum, under one cosine cycle. With a teacher, the loss is

    (1 - w) * cross-entropy(labels) + w * T^2 * KL(teacher / T || student / T)          (Hinton et al. 2015)

With augmentation teacher and student see the same augmented image, so the student matches the teacher's function rather
than a fixed table of answers (Beyer et al. 2022, "A good teacher is patient and consistent"). Without it that table is
all there is to match, and each answer is asked for once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import TrainingError
from compress.models.calls import classes_of, logits_of, own_errors
from compress.training.distillation import Teacher
from compress.training.memory_format import PLAIN, Format, allows_channels_last, fastest_format, in_training_mode

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Batches = Callable[[int], Iterable[Batch]]
"""Epoch number -> batches of (images float32 [N, 3, H, W] normalised, labels int64 [N]; -1 where unknown), and where
images are not augmented, their numbers int64 [N]: the same number always comes with the same pixels."""
Progress = Callable[[float, str], None]

WARM_UP = 0.15
"""Share of the steps in which the learning rate rises."""
MOMENTUM = 0.9
WORTH_TRIALS = 8
"""Steps from which formats are tried out."""
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 5e-4}
TOO_FEW_IMAGES = "There are too few training images for one batch. Add images or lower --train-batch-size."


@dataclass(frozen=True)
class TrainingConfig:
    """How to train."""

    epochs: float
    """Passes over the training images; a fraction ends within an epoch."""
    learning_rate: float
    """Peak of the cycle."""
    distillation_weight: float
    """w of the module's formula, 0..1; ignored without a teacher."""
    temperature: float
    label_smoothing: float = 0.0
    optimizer: str = "adamw"
    """Or "sgd"."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    model: nn.Module,
    batches: Batches,
    steps_per_epoch: int,
    config: TrainingConfig,
    *,
    teacher: nn.Module | None = None,
    keep_zeros: bool = False,
    score: Callable[[nn.Module], float] | None = None,
    progress: Progress = lambda fraction, message: None,
) -> list[dict[str, Any]]:
    """Trains `model` in place, on the device it ends up on, and returns one record per epoch.

    Where torch.distributed is initialised, the processes average their gradients; each gives its own part of every batch.

    Args:
        keep_zeros: weights of convolutions and linear layers that are zero at the start are zero after every step.
        score: called in eval mode after each epoch; its value is recorded, nothing is chosen by it.

    Raises:
        TrainingError: the loss is not finite, there are no batches, every parameter is frozen, or no memory layout is right.
        ModelError: the model's own code stops in training mode, or its answer holds no logits.
    """
    if config.epochs == 0:
        return []
    if steps_per_epoch == 0:
        raise TrainingError(TOO_FEW_IMAGES)
    place = device()
    model.to(place)
    asked = Teacher(teacher, place) if teacher is not None else None
    optimizer = _optimizer(model, config)
    first = next(iter(batches(0)))[0].to(place)
    total = max(1, round(config.epochs * steps_per_epoch))
    layout = _same_for_all(lambda: _format_for(model, first, total))
    classes = classes_of(model, first)
    model.to(memory_format=layout.memory_format)
    zeros = _zeros(model) if keep_zeros else []
    learner = _averaging(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / total))

    def step(images: Tensor, labels: Tensor, numbers: Tensor | None = None) -> Tensor:
        images = images.to(place).contiguous(memory_format=layout.memory_format)
        loss = _loss(learner, asked, images, labels.to(place), config, layout, numbers, classes)
        optimizer.zero_grad(set_to_none=True)
        with own_errors(model, f"{in_training_mode(images)}, in the backward pass"):
            loss.backward()
        optimizer.step()
        _clear(zeros)
        schedule.step()
        return loss.detach()

    records = []
    with single_pixels_multiplied(model), single_pixels_multiplied(asked and asked.model):
        for epoch in range(math.ceil(total / steps_per_epoch)):
            start, before = time.perf_counter(), epoch * steps_per_epoch
            _train_mode(model)
            mean_loss = _epoch(
                epoch,
                _first(batches(epoch), min(steps_per_epoch, total - before)),
                step,
                config,
                lambda seen, text, before=before: progress((before + seen) / total, text),
            )
            model.eval()
            records.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": mean_loss,
                    "learning_rate": schedule.get_last_lr()[0],
                    "seconds": time.perf_counter() - start,
                    "accuracy": score(model) if score else None,
                }
            )
    model.to("cpu", memory_format=torch.contiguous_format)
    return records


def _averaging(model: nn.Module) -> nn.Module:
    """`model` itself, or what averages its gradients with those of the other processes that train with this one."""
    if not dist.is_initialized():
        return model
    # an auxiliary head takes no part in the loss: see `logits_of`
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def _format_for(model: nn.Module, images: Tensor, steps: int) -> Format:
    """The fastest, where it is worth finding: the trials are some ten steps themselves."""
    if steps >= WORTH_TRIALS:
        return fastest_format(model, images)
    allows_channels_last(model, images)  # which refuses a model that no layout is right for
    return PLAIN


def _same_for_all(find: Callable[[], Format]) -> Format:
    """What the first of the processes that train together finds, because gradients of two layouts do not add up.

    The others wait, so that it measures alone; when it refuses the model, all of them are ended.
    """
    if not dist.is_initialized():
        return find()
    agreed = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(agreed)
    assert agreed[0] is not None
    return agreed[0]


def _train_mode(model: nn.Module) -> None:
    """Frozen BatchNorms keep their statistics too: a backbone that is frozen has to stay what it is."""
    model.train()
    for module in model.modules():
        frozen = [not parameter.requires_grad for parameter in module.parameters(recurse=False)]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen and all(frozen):
            module.eval()


def loss_function(
    config: TrainingConfig, teacher: nn.Module | None, classes: int | None = None
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """loss(model, images, labels) of the module's formula, in fp32; `teacher` is copied.

    For training loops other than `fit`, which bring model, images and labels to `device()` themselves.

    Args:
        classes: columns of the logits, see `logits_of`.
    """
    asked = Teacher(teacher, device()) if teacher is not None else None

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with single_pixels_multiplied(asked and asked.model):
            return _loss(model, asked, images, labels, config, PLAIN, classes=classes)

    return loss


def _zeros(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of two dimensions or more that contain zeros, and where: bool of the parameter's shape."""
    found = [(parameter, parameter.detach() == 0) for parameter in model.parameters() if parameter.ndim > 1]
    return [(parameter, zero) for parameter, zero in found if zero.any()]


def _clear(zeros: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, zero in zeros:
            parameter.masked_fill_(zero, 0.0)


def _epoch(
    epoch: int,
    batches: Iterable[Batch],
    step: Callable[..., Tensor],
    config: TrainingConfig,
    progress: Callable[[int, str], None],
) -> float:
    """Trains on `batches` and returns the mean loss."""
    loss_sum, seen = 0.0, 0
    for batch in batches:
        loss_sum += _finite(step(*batch), epoch, seen, config)
        seen += 1
        if seen % 10 == 0:
            progress(seen, f"epoch {epoch + 1} of {config.epochs:g}, loss {loss_sum / seen:.3f}")
    return loss_sum / max(seen, 1)


@contextmanager
def single_pixels_multiplied(model: nn.Module | None) -> Iterator[None]:
    """While it lasts, convolutions of 1 x 1 maps are computed as a matrix product with the centre of their kernel.

    The other taps only meet the padding, so the answers are the same. Small images make such maps in the last stage of a
    residual network, where most weights are, and a CPU spends 40 % of resnet18's training step at 32 pixels in them.
    """
    layers = (
        [m for m in model.modules() if type(m) is nn.Conv2d and "forward" not in vars(m) and _keeps_size(m)]
        if model
        else []
    )
    for layer in layers:
        layer.forward = MethodType(_convolve_or_multiply, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _keeps_size(layer: nn.Conv2d) -> bool:
    if isinstance(layer.padding, str):
        return False
    centred = all(2 * p == k - 1 for p, k in zip(layer.padding, layer.kernel_size, strict=True))
    return (
        layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.kernel_size != (1, 1)
        and centred
    )


def _convolve_or_multiply(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    if maps.shape[-2:] != (1, 1):
        return layer._conv_forward(maps, layer.weight, layer.bias)
    row, column = (size // 2 for size in layer.kernel_size)
    return F.linear(maps.flatten(1), layer.weight[:, :, row, column], layer.bias)[:, :, None, None]


def one_cycle(done: float) -> float:
    """Factor of the peak learning rate when the fraction `done` of all steps is behind: a rise, then a cosine to 0."""
    if done < WARM_UP:
        return 0.1 + 0.9 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def _loss(
    model: nn.Module,
    teacher: Teacher | None,
    images: Tensor,
    labels: Tensor,
    config: TrainingConfig,
    layout: Format,
    numbers: Tensor | None = None,
    classes: int | None = None,
) -> Tensor:
    with layout.computing(images.device):
        with own_errors(model, in_training_mode(images)):
            logits = logits_of(model(images), classes).float()
        target = teacher(images, numbers) if teacher is not None else None
    weight = config.distillation_weight if target is not None else 0.0
    loss = torch.zeros((), device=logits.device)
    if weight < 1:
        loss = (1 - weight) * F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if target is not None and weight > 0:
        t = config.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="batchmean", log_target=True
        )
        loss = loss + weight * t * t * divergence
    return loss


def _finite(loss: Tensor, epoch: int, step: int, config: TrainingConfig) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"Training diverged: the loss became {value} in epoch {epoch + 1}, step {step + 1}, at a peak learning "
            f"rate of {config.learning_rate:g}. Try a tenth of that learning rate."
        )
    return value


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay is for the weights of convolutions and linear layers; decaying biases and norms costs accuracy."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(
            "Every parameter of the model is frozen. Unfreeze some, or set --finetune-epochs and --qat-epochs to 0."
        )
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, WEIGHT_DECAY[config.optimizer])
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch
