"""How large a model is and how much it computes: parameters, multiply-accumulates, and both per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerShape:
    """One Conv2d or Linear as it ran."""

    name: str
    type: str
    channels: int
    """Output channels or features."""
    parameters: int
    macs: int
    """Multiply-accumulates for one image."""


def count_parameters(model: nn.Module) -> int:
    """Numbers in the parameters, shared ones once; buffers such as BatchNorm statistics are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_by_module(model: nn.Module, input_size: int) -> dict[str, int]:
    """Name of each module -> what `count_macs` counts inside it."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, _running_one_image(model, input_size) as run:
        run()
    prefix = f"{type(model).__name__}."
    counts = counter.get_flop_counts().items()
    return {name.removeprefix(prefix): sum(flops.values()) // 2 for name, flops in counts if name.startswith(prefix)}


def count_macs(model: nn.Module, input_size: int) -> int:
    """Multiply-accumulates for one image of `input_size` x `input_size`.

    Counted by torch in convolutions and matrix products, attention included, as torchvision's published figures are
    (there in units of 10^9); additions, activations and normalisation are not counted.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, _running_one_image(model, input_size) as run:
        run()
    return counter.get_total_flops() // 2


def layer_shapes(model: nn.Module, input_size: int) -> tuple[LayerShape, ...]:
    """Every Conv2d and Linear in the order in which it first ran; one that runs twice has both runs in `macs`."""
    macs: dict[str, int] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    handles = []
    for name, layer in layers.items():

        def record(module: nn.Conv2d | nn.Linear, inputs: Any, output: Tensor, name: str = name) -> None:
            macs[name] = macs.get(name, 0) + _macs(module, output)

        handles.append(layer.register_forward_hook(record))
    try:
        with torch.no_grad(), _running_one_image(model, input_size) as run:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_shape_of(name, layers[name], count) for name, count in macs.items())


@contextmanager
def _running_one_image(model: nn.Module, input_size: int) -> Iterator[Callable[[], Any]]:
    """A call of `model` on one black image in eval mode, which is undone afterwards."""
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, input_size, input_size, device=parameter.device, dtype=parameter.dtype)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield lambda: model(image)
    finally:
        for module in was_training:
            module.training = True


def _macs(layer: nn.Conv2d | nn.Linear, output: Tensor) -> int:
    per_output = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
    return output[0].numel() * per_output


def _shape_of(name: str, layer: nn.Conv2d | nn.Linear, macs: int) -> LayerShape:
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Linear):
        return LayerShape(name, "Linear", layer.out_features, parameters, macs)
    return LayerShape(name, "Conv2d", layer.out_channels, parameters, macs)
