"""Networks as people write them that behave in a way of their own while they train, each with four classes at 32 pixels."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Heads = namedtuple("Heads", "main auxiliary")


@dataclass
class Answer:
    features: Tensor
    logits: Tensor


CONTAINERS = {
    "tuple": lambda main, extra, features: (main, extra),
    "list": lambda main, extra, features: [main, extra],
    "dict": lambda main, extra, features: {"aux": extra, "out": main},
    "named tuple": lambda main, extra, features: Heads(main, extra),
    "nested": lambda main, extra, features: ((features, main), [extra]),
    "dataclass": lambda main, extra, features: Answer(features, main),
}


class DropPath(nn.Module):
    """Stochastic depth written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device)
        return x.div(0.8) * (0.8 + mask).floor()


class Auxiliary(nn.Module):
    """Answers with a container of several heads in training, and with its logits in evaluation."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.container = CONTAINERS[container]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.block, self.drop = nn.Conv2d(16, 16, 3, 1, 1), DropPath()
        self.last, self.head, self.extra = nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        x = x + self.drop(torch.relu(self.block(x)))
        features = torch.relu(self.last(x)).mean((2, 3))
        answer = self.head(features)
        return self.container(answer, self.extra(x.mean((2, 3))), features) if self.training else answer


class Viewing(nn.Module):
    """Flattens with `view`, which refuses tensors that lie channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 16, 5)
        self.hidden, self.head = nn.Linear(16 * 5 * 5, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


class Shortcut(nn.Module):
    """A 1x1 convolution with a stride beside the 3x3 one, on few channels; `functional` calls it by F.conv2d."""

    def __init__(self, channels: int = 3, stride: int = 2, groups: int = 1, functional: bool = False) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, channels, 1) if channels != 3 else nn.Identity()
        self.main = nn.Conv2d(channels, 16, 3, stride, 1)
        self.short = nn.Conv2d(channels, 16, 1, stride, groups=groups, bias=False)
        self.head, self.functional = nn.Linear(16, 4), functional

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        short = F.conv2d(x, self.short.weight, stride=self.short.stride) if self.functional else self.short(x)
        return self.head(torch.relu(self.main(x) + short).mean((2, 3)))


class Reordering(Shortcut):
    """Makes its image channels_last itself, before the convolution that must not meet it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


class Asserting(Viewing):
    """Stops in training with a sentence of its author's, and works in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            assert len(x) % 5 == 0, "batches must be multiples of 5"
        return super().forward(x)


class Overwriting(Viewing):
    """Overwrites what the backward pass needs."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(F.max_pool2d(self.first(x), 2))
        y = self.second(x)
        if self.training:
            x.mul_(2)
        return self.head(F.relu(self.hidden(F.max_pool2d(y, 2).flatten(1))))


class Forgetful(Viewing):
    """Answers with its features alone in training."""

    def forward(self, x: Tensor) -> object:
        return {"features": self.first(x)} if self.training else super().forward(x)


class PooledNorm(nn.Module):
    """A BatchNorm of one value per channel and image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(torch.relu(self.norm(self.squeeze(x.mean((2, 3), keepdim=True)))).flatten(1))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
