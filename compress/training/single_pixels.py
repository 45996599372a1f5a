"""Convolutions of 1 x 1 feature maps as matrix products, which a CPU computes much faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def single_pixel_convs_as_matmul(model: nn.Module | None) -> Iterator[None]:
    """Within the block, convolutions of 1 x 1 maps in `model` are a matrix product with the centre of their kernel.

    The other taps only meet the padding, so the answers are the same. Small images make such maps in the last stage of a
    residual network, where most weights are, and a CPU spends 40 % of resnet18's training step at 32 pixels in them.
    """
    layers: list[nn.Conv2d] = []
    for module in model.modules() if model is not None else ():
        if type(module) is nn.Conv2d and "forward" not in vars(module) and _keeps_size(module):
            layers.append(module)
    for layer in layers:
        vars(layer)["forward"] = MethodType(_convolve_or_multiply, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _keeps_size(layer: nn.Conv2d) -> bool:
    if isinstance(layer.padding, str):
        return False
    centred = all(2 * p == k - 1 for p, k in zip(layer.padding, layer.kernel_size, strict=True))
    return (
        layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.kernel_size != (1, 1)
        and centred
    )


def _convolve_or_multiply(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    if maps.shape[-2:] != (1, 1):
        convolved: Tensor = layer._conv_forward(maps, layer.weight, layer.bias)
        return convolved
    row, column = (size // 2 for size in layer.kernel_size)
    return F.linear(maps.flatten(1), layer.weight[:, :, row, column], layer.bias)[:, :, None, None]
