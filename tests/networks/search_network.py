"""A network that is small enough to be searched in seconds, and images that it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from compress.request import Request

SIZE = 16


def network() -> nn.Module:
    """Three groups of layers that can lose channels: 16, 16 and 32."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 2),
    ).eval()


def images(folder: Path, count: int = 60) -> Path:
    """Two classes, dark and bright, without a test folder."""
    generator = np.random.default_rng(0)
    for name, low in (("bright", 128), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(low, low + 128, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def trained(folder: Path) -> nn.Module:
    """The network, with a last layer that tells the classes apart by the mean of what it reads."""
    from compress.workload import open_workload

    model = network()
    source = open_workload(request(folder), model)
    pixels = source.dataset.train.take(torch.arange(len(source.dataset.train))).float() / 255
    with torch.no_grad():
        read = model[:-1]((pixels - 0.5) / 0.5)
        wanted = nn.functional.one_hot(source.dataset.train.labels, 2).float()
        ones = torch.cat([read, torch.ones(len(read), 1)], 1)
        solved = torch.linalg.lstsq(ones, wanted).solution
        model[-1].weight.copy_(solved[:-1].T)
        model[-1].bias.copy_(solved[-1])
    return model


def request(folder: Path, **changes) -> Request:
    values = {
        "model": "custom",
        "data": str(folder),
        "input_size": SIZE,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "runtime": "onnxruntime",
        "finetune_epochs": 1,
        "qat_epochs": 0,
        "train_batch_size": 16,
        "batch_size": 4,
    }
    return Request(**(values | changes))
