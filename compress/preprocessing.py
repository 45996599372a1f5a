"""How an image becomes a model's input; light, because the server, the shell and the report say it, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.errors import RequestError

MAX_INPUT, MAX_RESIZE = 2048, 4096
"""Pixels of a side: of a model's input, and of the shorter side before the crop."""
INTERPOLATIONS = ("bilinear", "bicubic")
CROP_RATIO = 256 / 224
"""Shorter side before the crop over the input size, where no `resize_size` is given; torchvision's usual recipe."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input. One rule, also followed by `artifacts/infer.py`:

    1. The image is turned upright (EXIF) and made RGB; transparency is put on white.
    2. Size (`compress.data.images.fit`), by Pillow with `interpolation` and its antialiasing:
       - exactly `input_size` x `input_size`: used as it is;
       - both sides at most 32 pixels (MNIST-like, CIFAR): centred on a black 32 x 32 canvas (left and top margins
         rounded down), and the canvas resized to `input_size`;
       - anything else, as torchvision's published transforms do it: the shorter side resized to `resize_size`, the
         longer to int(resize_size * longer / shorter), then a centre crop whose left and top are
         round((side - input_size) / 2).
    3. Pixels / 255, minus `mean`, divided by `std`, per RGB channel; float32, channels first.
    """

    input_size: int
    """Height and width of the model's input, in pixels."""
    mean: tuple[float, ...]
    """Per RGB channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Per RGB channel, of pixels scaled to 0..1; above 0."""
    resize_size: int | None = None
    """Shorter side before the centre crop, in pixels; None: round(input_size * 256 / 224)."""
    interpolation: str = "bilinear"
    """`bilinear` or `bicubic`, Pillow's names."""

    def __post_init__(self) -> None:
        if type(self.input_size) is not int or not 1 <= self.input_size <= MAX_INPUT:
            raise RequestError("input_size", self.input_size, f"a whole number of pixels from 1 to {MAX_INPUT}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or not all(math.isfinite(value) for value in getattr(self, name)):
                raise RequestError(name, getattr(self, name), "three finite numbers, one per RGB channel")
        if min(self.std) <= 0:
            raise RequestError("std", self.std, "three numbers above 0")
        if self.resize_size is not None and (
            type(self.resize_size) is not int or not self.input_size <= self.resize_size <= MAX_RESIZE
        ):
            allowed = (
                f"a whole number of pixels of at least the input size, {self.input_size}, and at most {MAX_RESIZE}"
            )
            raise RequestError("resize_size", self.resize_size, allowed)
        if self.interpolation not in INTERPOLATIONS:
            raise RequestError("interpolation", self.interpolation, " or ".join(INTERPOLATIONS))

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side before the centre crop."""
        return self.resize_size or round(self.input_size * CROP_RATIO)

    def with_input_size(self, input_size: int) -> Preprocessing:
        """The same recipe at another size; the published `resize_size` only belongs to the published size."""
        resize = self.resize_size if input_size == self.input_size else None
        return Preprocessing(input_size, self.mean, self.std, resize, self.interpolation)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Raises TypeError on unknown or missing keys and RequestError on values out of range."""
        made = cls(**values)
        return cls(
            made.input_size,
            tuple(map(float, made.mean)),
            tuple(map(float, made.std)),
            made.resize_size,
            made.interpolation,
        )
