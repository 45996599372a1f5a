"""A task that any classifier learns in seconds, so that its answers have the clear margins of a trained network's.

Deep networks of random weights amplify every rounding until another class wins: that two executions of one disagree
would say little about either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CLASSES, NOISE = 10, 0.3
STEPS, BATCH, WARM_UP = 100, 16, 10
RATE, RATE_WITHOUT_NORMS = 4e-3, 1e-3
STATISTICS_IMAGES = 128


def images(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten smooth colour patterns under normal noise: float32 [count, 3, size, size], and labels [count]."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    clean = F.interpolate(patterns, size=size, mode="bilinear")[labels]
    return clean + NOISE * torch.randn(clean.shape, generator=generator), labels


def learn(model: nn.Module, size: int, seed: int = 0) -> None:
    """Train `model` on the patterns, in place: Adam, new images in each of 100 steps; eval mode afterwards.

    What has no BatchNorm is first scaled to its images, and BatchNorm's statistics are taken anew in the end.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    shown, _ = images(STATISTICS_IMAGES, size, seed)
    if not norms:
        _scale(model, shown)
    rate = RATE if norms else RATE_WITHOUT_NORMS
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)
    )
    model.train()
    for step in range(STEPS):
        batch, labels = images(BATCH, size, seed + 1 + step)
        answer = model(batch)
        logits = answer if isinstance(answer, Tensor) else answer.logits
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with _hooked(lambda norm: norm.register_forward_pre_hook(_take_statistics), norms), torch.no_grad():
        model(shown)


@contextmanager
def _hooked(register: Callable[[nn.Module], RemovableHandle], modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, every one of `modules` has the hook that `register` gives it."""
    handles = [register(module) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scale(model: nn.Module, shown: Tensor) -> None:
    """Give every channel mean 0 and variance 1 over images (Salimans and Kingma, arXiv:1602.07868, section 3)."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with _hooked(lambda layer: layer.register_forward_hook(_scale_layer), layers), torch.no_grad():
        model.eval()(shown)


def _scale_layer(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    channels = output.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)
    mean, spread = channels.mean(1), channels.std(1)
    spread = torch.where(spread > 1e-3 * spread.max(), spread, 1.0)  # a channel that is always the same stays so
    layer.weight.div_(spread.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.sub_(mean).div_(spread)
    return layer.forward(*inputs)


def _take_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
    channels = inputs[0].movedim(1, 0).flatten(1)
    norm.running_mean.copy_(channels.mean(1))
    norm.running_var.copy_(channels.var(1))
