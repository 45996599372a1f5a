"""The training loop: fine-tuning, distillation and quantization-aware training all run through `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.errors import TrainingError
from compress.models.calls import classes_of, own_errors
from compress.training.config import Batch, Batches, Progress, TrainingConfig, device
from compress.training.distillation import Teacher
from compress.training.loss import batch_loss
from compress.training.memory_format import PLAIN, Format, allows_channels_last, fastest_format, in_training_mode
from compress.training.optimizer import build_optimizer, one_cycle
from compress.training.single_pixels import single_pixel_convs_as_matmul

WORTH_TRIALS = 8
"""Steps from which the memory formats are tried out."""
PROGRESS_STEPS = 10
"""Steps between two reports of progress."""
TOO_FEW_IMAGES = "There are too few training images for one batch. Add images or lower --train-batch-size."


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
    """Trains `model` in place, brings it back to the CPU in eval mode, and returns one record per epoch.

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
    total = max(1, round(config.epochs * steps_per_epoch))
    trainer = _Trainer(model, batches, total, config, teacher, keep_zeros)
    records = []
    with ExitStack() as stack:
        for network in (model, trainer.teacher.model if trainer.teacher is not None else None):
            stack.enter_context(single_pixel_convs_as_matmul(network))
        for epoch in range(math.ceil(total / steps_per_epoch)):
            start, before = time.perf_counter(), epoch * steps_per_epoch
            _train_mode(model)
            mean_loss = trainer.train(
                epoch,
                _first(batches(epoch), min(steps_per_epoch, total - before)),
                partial(_report, progress, before, total),
            )
            model.eval()
            records.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": mean_loss,
                    "learning_rate": trainer.learning_rate,
                    "seconds": time.perf_counter() - start,
                    "accuracy": score(model) if score else None,
                }
            )
    model.to("cpu")
    model.to(memory_format=torch.contiguous_format)
    return records


class _Trainer:
    """A model on its device with all that its training steps need."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        total: int,
        config: TrainingConfig,
        teacher: nn.Module | None,
        keep_zeros: bool,
    ) -> None:
        self._model, self._config, self._device = model, config, device()
        model.to(self._device)
        self.teacher = Teacher(teacher, self._device) if teacher is not None else None
        self._optimizer = build_optimizer(model, config)
        first = next(iter(batches(0)))[0].to(self._device)
        self._layout = _same_for_all(lambda: _format_for(model, first, total))
        self._classes = classes_of(model, first)
        model.to(memory_format=self._layout.memory_format)
        self._zeros = _zeros(model) if keep_zeros else []
        self._learner = _averaging(model)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: one_cycle(step / total))

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def train(self, epoch: int, batches: Iterable[Batch], progress: Callable[[int, str], None]) -> float:
        """Trains on `batches` and returns the mean loss."""
        loss_sum, steps = 0.0, 0
        for batch in batches:
            loss_sum += self._finite(self._step(*batch), epoch, steps)
            steps += 1
            if steps % PROGRESS_STEPS == 0:
                progress(steps, f"epoch {epoch + 1} of {self._config.epochs:g}, loss {loss_sum / steps:.3f}")
        return loss_sum / max(steps, 1)

    def _step(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        images = images.to(self._device).contiguous(memory_format=self._layout.memory_format)
        loss = batch_loss(
            self._learner, self.teacher, images, labels.to(self._device), self._config,
            layout=self._layout, indices=indices, classes=self._classes,
        )  # fmt: skip
        self._optimizer.zero_grad(set_to_none=True)
        with own_errors(self._model, f"{in_training_mode(images)}, in the backward pass"):
            loss.backward()
        self._optimizer.step()
        _clear(self._zeros)
        self._schedule.step()
        return loss.detach()

    def _finite(self, loss: Tensor, epoch: int, step: int) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise TrainingError(
                f"Training diverged: the loss became {value} in epoch {epoch + 1}, step {step + 1}, at a peak learning "
                f"rate of {self._config.learning_rate:g}. Try a tenth of that learning rate."
            )
        return value


def _report(progress: Progress, before: int, total: int, steps: int, message: str) -> None:
    progress((before + steps) / total, message)


def _averaging(model: nn.Module) -> nn.Module:
    """`model` itself, or a wrapper that averages its gradients with those of the other training processes."""
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


def _same_for_all(choose: Callable[[], Format]) -> Format:
    """What `choose` returns in the first of the training processes, because gradients of two layouts do not add up.

    The others wait, so that it measures alone; when it refuses the model, all of them are ended.
    """
    if not dist.is_initialized():
        return choose()
    agreed = [choose() if dist.get_rank() == 0 else None]
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


def _zeros(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of two dimensions or more that contain zeros, and where: bool of the parameter's shape."""
    masks = [(parameter, parameter.detach() == 0) for parameter in model.parameters() if parameter.ndim > 1]
    return [(parameter, mask) for parameter, mask in masks if mask.any()]


def _clear(zeros: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, mask in zeros:
            parameter.masked_fill_(mask, 0.0)


def _first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch
