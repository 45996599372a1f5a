"""What a script gets to work with: the dense model, images, and a budget that is counted. Not part of any recipe.

Only numpy, torch, torchvision and safetensors are needed, so it runs in every peer's environment. A job of 0 images asks
for the structure alone, at another input size: nothing is trained, and the images are enlarged.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

BATCH_SIZE = 64
CALIBRATION_IMAGES = 256
CALIBRATION_IMAGES_ENLARGED = 32
"""For the structure alone, whose ranges do not matter."""


@dataclass
class Job:
    """One compression. The script leaves `model.onnx` in `folder`, and `model.xml` beside it if OpenVINO gets its own.

    The ONNX file has one input `images` (float32 [batch, 3, size, size], normalised, any batch) and one output `logits`.
    """

    model: str
    """Name in torchvision."""
    weights: Path
    """Safetensors."""
    images: Path
    """Npz of uint8 `pixels` [N, 1, 32, 32] and int64 `labels` [N]: training images only."""
    data: str
    """The same images as Espalier names them."""
    mean: float
    std: float
    """Of every channel."""
    input_size: int
    budget: int
    """Training images that all training after pruning may see, counted with repetitions."""
    int8_dot_product: bool
    """Whether this CPU multiplies int8 without the danger of an overflow (VNNI, AMX)."""
    seed: int
    options: dict[str, Any]
    """Of the row."""
    folder: Path
    used: int = 0
    """Training images handed out so far."""
    _pixels: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    _labels: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @classmethod
    def read(cls) -> Job:
        """The job whose file is the script's only argument."""
        path = Path(sys.argv[1])
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {key: Path(values[key]) for key in ("weights", "images")}
        job = cls(**values, folder=path.parent)
        torch.manual_seed(job.seed)
        with np.load(job.images) as arrays:
            job._pixels, job._labels = torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["labels"])
        atexit.register(lambda: (job.folder / "used.json").write_text(json.dumps(job.used), encoding="utf-8"))
        return job

    @property
    def example(self) -> Tensor:
        return self._inputs(torch.zeros(1, dtype=torch.int64))

    @property
    def train_images(self) -> int:
        """How many different training images there are."""
        return len(self._pixels)

    def dense(self) -> nn.Module:
        """The model to compress, in eval mode; a new copy at each call."""
        model = torchvision.models.get_model(self.model, weights=None, num_classes=10)
        model.load_state_dict(load_file(self.weights))
        return model.eval()

    def training(self, share: float = 1.0) -> Batches:
        """Shuffled training images worth `share` of the budget. Raises ValueError beyond the budget."""
        count = int(self.budget * share)
        self.spend(count)
        return Batches(self, count)

    def spend(self, images: int) -> None:
        """Counts training images that a script takes from elsewhere. Raises ValueError beyond the budget."""
        if self.used + images > self.budget:
            raise ValueError(f"{self.used + images} training images were taken; the budget is {self.budget}.")
        self.used += images

    def calibration(self) -> Tensor:
        """Training images without labels, the same for all: float32 [256, 3, size, size] (32 of them when enlarged)."""
        count = CALIBRATION_IMAGES if self.budget else CALIBRATION_IMAGES_ENLARGED
        order = torch.randperm(len(self._pixels), generator=torch.Generator().manual_seed(self.seed))
        return self._inputs(order[:count])

    def labelled(self, count: int) -> tuple[Tensor, Tensor]:
        """Training images with labels for choices that a peer's recipe makes by a score; not counted as training."""
        order = torch.randperm(len(self._pixels), generator=torch.Generator().manual_seed(self.seed + 1))
        return self._inputs(order[:count]), self._labels[order[:count]]

    def _inputs(self, chosen: Tensor) -> Tensor:
        images = ((self._pixels[chosen].float() / 255 - self.mean) / self.std).expand(-1, 3, -1, -1)
        if self.input_size != images.shape[-1]:
            images = functional.interpolate(images, size=(self.input_size, self.input_size))
        return images.contiguous()


class Batches:
    """(images, labels) in new random order in every pass; `len` is the number of batches."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count = job, count

    def __len__(self) -> int:
        return math.ceil(self._count / BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        job, total = self._job, self._job.train_images
        generator = torch.Generator().manual_seed(job.seed)
        passes = math.ceil(self._count / total)
        order = (
            torch.cat([torch.randperm(total, generator=generator) for _ in range(passes)]) if passes else torch.empty(0)
        )
        for chosen in order[: self._count].split(BATCH_SIZE) if self._count else ():
            yield job._inputs(chosen), job._labels[chosen]
