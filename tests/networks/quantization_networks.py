"""A small network with the structures that quantization has to get right, trained on a task that it can learn."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quantization import Quantized, assign_bits, prepare, quantize

CLASSES, SIZE = 6, 24


class Mixed(nn.Module):
    """One shared ReLU, a ReLU6, residual additions with and without a convolution, a concatenation, two poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.down, self.down_bn = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.bn4 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.left, self.right = nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 32, 1)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem_bn(self.stem(x))))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        x = self.relu(out)
        x = F.relu(self.bn3(self.conv3(x)) + self.down_bn(self.down(x)))
        x = self.relu6(self.bn4(self.depthwise(x)))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = F.adaptive_avg_pool2d(F.relu(self.last(x)), 1)
        return self.fc(self.dropout(torch.flatten(x, 1)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(float32 [count, 3, 24, 24], labels): a fixed random pattern per class under strong noise."""
    patterns = torch.randn(CLASSES, 3, 6, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    clean = F.interpolate(patterns[labels], size=SIZE, mode="bilinear")
    return clean + 0.7 * torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


def train(model: nn.Module, steps: int = 120, learning_rate: float = 0.05, seed: int = 1) -> nn.Module:
    """A plain training loop, which knows nothing of quantization."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    batch, labels = images(steps * 32, seed)
    for step in range(steps):
        part = slice(step * 32, step * 32 + 32)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[part]), labels[part]).backward()
        optimizer.step()
    return model.eval()


@functools.cache
def trained() -> Mixed:
    torch.manual_seed(0)
    return train(Mixed())


def calibration() -> tuple[Tensor, ...]:
    return images(128, seed=2)[0].split(32)


def quantized_at(
    model: nn.Module, weight_bits: int = 8, activation_bits: int = 8, *, batches=None, train=None, **options
) -> Quantized:
    """`model` quantized with the same bits in every layer; by default without training."""
    images = calibration() if batches is None else batches
    prepared = prepare(model, batches[0] if batches else None)
    plan = assign_bits(prepared, weight_bits, activation_bits)
    return quantize(prepared, plan, calibration=images, train=train, **options)


@functools.cache
def calibrated(weight_bits: int = 8, activation_bits: int = 8) -> Quantized:
    """The trained network, quantized by calibration alone."""
    return quantized_at(trained(), weight_bits, activation_bits)


def scratch_folder() -> Path:
    """A folder for files that several tests share; removed when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="espalier-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def answers(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


def accuracy(model: nn.Module) -> float:
    batch, labels = images(512, seed=3)
    return float((answers(model, batch).argmax(1) == labels).float().mean())
