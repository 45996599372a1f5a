"""The training loop as NNI's TorchEvaluator, which its pruners call and patch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress import nni_bridge
from compress.errors import TrainingError
from compress.models.calls import logits_of, own_errors
from compress.pruning.interface import PruningTraining
from compress.tasks import CLASSIFICATION
from compress.training import MOMENTUM, TOO_FEW_IMAGES, WEIGHT_DECAY, device, one_cycle, parameter_groups
from compress.training.memory_format import allows_channels_last


def training_evaluator(model: nn.Module, training: PruningTraining) -> Any:
    """An evaluator that trains for as many steps as NNI sets, in one cycle of the learning rate.

    Args:
        model: the module before NNI wraps it; its frozen parameters stay frozen.

    Raises (while training):
        TrainingError: the loss is not finite, or there is not one batch.
    """
    before = 0

    def train(wrapped: nn.Module, optimizer: Any, step: Any, schedule: None, max_steps: int, epochs: None) -> None:
        nonlocal before
        wrapped.train()
        for done, batch in enumerate(first_batches(training, max_steps, before)):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * one_cycle(done / max_steps)
            where = f"step {done + 1} at a peak learning rate of {training.learning_rate:g}"
            _step(step, batch, wrapped, optimizer, where)
        before += max_steps

    def loss(batch: tuple[Tensor, Tensor], wrapped: nn.Module) -> Tensor:
        return training.loss(wrapped, *batch)

    _require_memory_format(model, training)
    return _evaluator(train, loss, model, training.learning_rate)


def gradient_evaluator(model: nn.Module, training: PruningTraining) -> Any:
    """An evaluator that computes gradients of the cross-entropy in eval mode; its learning rate is 0, so no weight changes.

    Where a label is unknown, the model's own class stands in. Distillation would not do: a model that is its own teacher
    has no gradient.
    """

    def backward(wrapped: nn.Module, optimizer: Any, step: Any, schedule: None, max_steps: int, epochs: None) -> None:
        wrapped.eval()
        for done, batch in enumerate(first_batches(training, max_steps)):
            _step(step, batch, wrapped, optimizer, f"batch {done + 1}, before anything was trained")

    def loss(batch: tuple[Tensor, Tensor], wrapped: nn.Module) -> Tensor:
        images, labels = batch
        with own_errors(wrapped, "in eval mode, for its gradients"):
            logits = logits_of(wrapped(images))
        return CLASSIFICATION.loss(logits, CLASSIFICATION.with_own_predictions(logits, labels))

    _require_memory_format(model, training)
    return _evaluator(backward, loss, model, 0.0)


def first_batches(training: PruningTraining, count: int, before: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches on the device that trains, epoch after epoch; progress counts from `before`.

    Returns: (images float32 [N, C, H, W], labels int64 [N], -1 where unknown).

    Raises:
        TrainingError: an epoch has no batch.
    """
    target, batches = device(), 0
    for epoch in itertools.count():
        batches_before = batches
        for images, labels in training.batches(epoch):
            if batches % 10 == 0:
                number = before + batches
                training.progress(number / training.steps, f"batch {number + 1} of {training.steps} for the pruner")
            batches += 1
            yield images.to(target), labels.to(target)
            if batches == count:
                return
        if batches == batches_before:
            raise TrainingError(TOO_FEW_IMAGES)


def _require_memory_format(model: nn.Module, training: PruningTraining) -> None:
    """Converts `model` to the contiguous memory format; raises what `allows_channels_last` raises."""
    model.to(memory_format=torch.contiguous_format)
    target = next(model.parameters()).device
    for images, _ in training.batches(0):
        allows_channels_last(model, images[:2].to(target))
        return


def _evaluator(loop: Callable[..., None], loss: Callable[..., Tensor], model: nn.Module, learning_rate: float) -> Any:
    nni = nni_bridge.import_nni()
    optimizer = nni.trace(torch.optim.SGD)(
        parameter_groups(model, WEIGHT_DECAY["sgd"]),
        lr=learning_rate,
        momentum=MOMENTUM,
        nesterov=True,
    )
    return nni_bridge.load("nni.compression.utils").TorchEvaluator(loop, optimizer, loss)


def _step(step: Any, batch: tuple[Tensor, Tensor], wrapped: nn.Module, optimizer: Any, where: str) -> None:
    loss = step(batch, wrapped)
    if not math.isfinite(float(loss)):
        raise TrainingError(
            f"Training diverged while pruning: the loss became {float(loss)} in {where}. Try a tenth of the learning rate."
        )
    optimizer.zero_grad()
    with own_errors(wrapped, "in the backward pass, while pruning"):
        loss.backward()
    optimizer.step()
