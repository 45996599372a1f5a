"""Batches of a split for training, scoring and calibration: normalised float32 images in a reproducible order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.data.dataset import Dataset, Split
from compress.preprocessing import Preprocessing

SHIFT = 1 / 16
"""Largest random shift of the augmentation, as a fraction of the image's side."""


def iter_batches(split: Split, batch_size: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """`iter_numbered_batches` without the numbers: (images float32 [n, 3, size, size], labels int64 [n])."""
    return (batch[:2] for batch in iter_numbered_batches(split, batch_size, **options))


def iter_numbered_batches(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    augment: bool = False,
    preprocessing: Preprocessing,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images float32 [n, 3, size, size] normalised, labels int64 [n], numbers in the split int64 [n]).

    Args:
        augment: random shifts of up to 1/16 of the image, edges repeated, and horizontal flips.
        part: of each batch, what is taken.

    The last batch may be smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator) if shuffle else torch.arange(len(split))
    for batch in order.split(batch_size) if len(order) else ():
        chosen = batch[part]
        pixels = split.take(chosen, preprocessing)
        if augment:
            pixels = shift_and_flip(pixels, generator)
        yield normalise(pixels, preprocessing), split.labels[chosen], chosen


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [N, 1 or 3, H, W] to float32 [N, 3, H, W]: (pixels / 255 - mean) / std."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.float().div_(255) - mean).div_(std)


def shift_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [N, C, H, W]: each image shifted by up to 1/16 of its sides, and flipped left to right with probability 1/2.

    Shape and type stay; at the edges the outermost pixels are repeated.
    """
    count, _, height, width = pixels.shape

    def moved(length: int) -> Tensor:
        reach = max(1, int(length * SHIFT))
        offsets = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
        return (torch.arange(length) + offsets).clamp_(0, length - 1)

    rows, columns = moved(height), moved(width)
    flips = torch.rand((count, 1), generator=generator) < 0.5
    columns = torch.where(flips, columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    return pixels.flatten(2).gather(2, flat.expand(-1, pixels.shape[1], -1)).view_as(pixels)


def split_held_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """`count` random images to score training by, and the rest to train on."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[:count].sort().values), split.subset(order[count:].sort().values)


def calibration_images(dataset: Dataset, n: int, preprocessing: Preprocessing, seed: int) -> Tensor:
    """float32 [m, 3, size, size], normalised: `n` random training images (fewer if there are fewer), never test images.

    Without data, `n` synthetic ones: smooth random colours with a little noise, in the range of real pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    if not dataset.has_images:
        size = preprocessing.input_size
        coarse = torch.rand((n, 3, max(2, size // 16), max(2, size // 16)), generator=generator)
        smooth = functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
        noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
        return normalise((noisy.clamp(0, 1) * 255).round().to(torch.uint8), preprocessing)
    chosen = torch.randperm(len(dataset.train), generator=generator)[:n]
    return normalise(dataset.train.take(chosen, preprocessing), preprocessing)
