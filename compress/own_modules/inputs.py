"""The images that a user's module takes, and what to tell the user when it does not take those of the request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

from compress.errors import RequestError
from compress.own_modules import answers, calling

SIZES = (16, 28, 32, 48, 56, 64, 84, 96, 112, 128, 160, 192, 224, 227, 240, 256, 288, 299, 320, 384, 448, 512)
SIDES = (32, 48, 64, 96, 128, 192, 224, 256, 320, 384)
"""Of images that are not square."""
T = TypeVar("T")
PATIENCE_S = 10
"""Seconds for which other sizes and numbers of channels are tried."""


def example(size: int, channels: int = 3, width: int | None = None) -> Tensor:
    """Two images [2, channels, size, width or size] of random pixels, 0..1, the same each time."""
    return torch.rand(2, channels, size, width or size, generator=torch.Generator().manual_seed(0))


def takes(model: nn.Module, images: Tensor) -> bool:
    """Whether `model` runs on images float32 [N, C, H, W] and returns a row for each; one that flattens larger maps gives more."""
    try:
        return answers.has_rows(calling.run(model, images), len(images))
    except Exception:  # noqa: BLE001 - what a user's own module raises is its author's choice
        return False


def refusal(model: nn.Module, images: Tensor, problem: str) -> RequestError:
    """The error for a `model` that does not take `images` float32 [N, 3, H, W]: it names others that it takes, or the problem."""
    size, until = images.shape[2], time.monotonic() + PATIENCE_S
    if takes(model, images[:1]):
        return _refused(
            model, "a module for any number of images, and it takes one at a time: write x.shape[0] in place of 1"
        )
    channels = _channels(model)
    for count in channels:  # the requested size first, then others
        if takes(model, example(size, count)):
            return _other_channels(model, count)
    squares = [one for one in _within(SIZES, until) if takes(model, example(one))]
    if squares:
        return RequestError(
            "input_size",
            size,
            f"a size that the module takes: of {SIZES[0]} to {SIZES[-1]} pixels it takes {_joined(squares)}",
        )
    for count, one in _within(product(channels, SIZES), until):
        if takes(model, example(one, count)):
            return _other_channels(model, count, one)
    oblong = [
        (count, height, width)
        for count, height, width in _within(product((3, *channels), SIDES, SIDES), until)
        if height != width and takes(model, example(height, count, width))
    ]
    if oblong:
        return _not_square(model, oblong)
    return _refused(
        model,
        f"a module that takes images [N, 3, {size}, {size}], and {problem}; no other size that was tried does either. Mend "
        f"that, or try the module on torch.rand(2, 3, {size}, {size}) with the size it was made for",
    )


def _channels(model: nn.Module) -> list[int]:
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 1)
    return [count for count in dict.fromkeys((first, 1, 4, 2)) if count != 3]


def _within(values: Iterable[T], until: float) -> Iterator[T]:
    for value in values:
        if time.monotonic() > until:
            return
        yield value


def _other_channels(model: nn.Module, count: int, size: int | None = None) -> RequestError:
    at = f", of {size} pixels (input_size={size})" if size else ""
    if count == 1:
        return _refused(
            model,
            f"a classifier of RGB images, and it takes grey ones, of 1 channel{at}: images are read as RGB, so let a module "
            "around it take the mean first, `def forward(self, x): return self.model(x.mean(1, keepdim=True))`, with equal "
            "mean and std for the three channels",
        )
    return _refused(
        model,
        f"a classifier of RGB images, and it takes {count} channels{at}: images are read as RGB, so give a module around it "
        f"whose forward makes the {count} channels of three",
    )


def _not_square(model: nn.Module, sizes: list[tuple[int, int, int]]) -> RequestError:
    """A layer that flattens its maps takes every height and width of the same product."""
    count, height, width = sizes[0]
    such = ", ".join(f"{height} x {width}" for one, height, width in sizes[:4] if one == count)
    grey = f" and {count} channel{'s' if count > 1 else ''}" if count != 3 else ""
    mean = ".mean(1, keepdim=True)" if count == 1 else ""
    return _refused(
        model,
        f"a classifier of square RGB images, and it takes other ones: height x width such as {such}{grey}. Let a module around "
        "it resize to those of its training first, `def forward(self, x): return "
        f"self.model(torch.nn.functional.interpolate(x{mean}, ({height}, {width})))`",
    )


def _refused(model: nn.Module, allowed: str) -> RequestError:
    return RequestError("model", type(model).__name__, allowed)


def _joined(sizes: list[int]) -> str:
    shown = [str(size) for size in sizes[:4]]
    return f"{', '.join(shown)} and others" if len(sizes) > 4 else " and ".join(shown)
