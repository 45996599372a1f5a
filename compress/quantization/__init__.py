"""Quantization: prepare a float model, learn its ranges with NNI, convert it to explicit Q/DQ.

    prepared = prepare(model)
    quantized = quantize(prepared, weight_bits=8, activation_bits=8, calibration=batches, train=None)
    reference, exportable = fake_quantized(quantized), convert(quantized)

`prepare` and everything after `quantize` run without NNI, so a saved result can be restored where NNI is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from compress.errors import QuantizationError
from compress.quantization.convert import convert, fake_quantized, weight_sqnr_db
from compress.quantization.flavours import FLAVOURS, Flavour
from compress.quantization.local_noise import LocalNoise, by_layer, file_noise, noisiest, quantization_noise
from compress.quantization.prepare import left_float, prepare, quantization_points, quantized_layers
from compress.quantization.ranges import Quantized, Ranges, restore, save

__all__ = [
    "FLAVOURS",
    "Flavour",
    "LocalNoise",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "Ranges",
    "TrainFn",
    "by_layer",
    "convert",
    "fake_quantized",
    "file_noise",
    "left_float",
    "noisiest",
    "prepare",
    "quantization_noise",
    "quantization_points",
    "quantize",
    "quantized_layers",
    "restore",
    "save",
    "weight_sqnr_db",
]

TrainFn = Callable[[nn.Module], object]
"""Trains the model it is given, in place. To it the model is a plain nn.Module: images in, logits out, parameters()
as usual; quantization is simulated inside forward(), and ranges are followed while the model is in training mode."""


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize, as the shell and the web form list it."""

    name: str
    title: str
    summary: str
    needs_data: bool
    bits: tuple[int, ...]
    integer_runtimes: tuple[str, ...]
    """Runtimes that execute its 8-bit result with integer kernels; fewer bits run in int8 containers."""
    paper: str


QUANTIZERS: dict[str, Quantizer] = {
    "qat": Quantizer(
        name="qat",
        title="Quantization-aware training",
        summary="Trains with simulated quantization, or only calibrates when it is given no epochs.",
        needs_data=False,
        bits=(2, 3, 4, 5, 6, 7, 8),
        integer_runtimes=("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"),
        paper="https://arxiv.org/abs/1712.05877",
    ),
}


def quantize(
    prepared: fx.GraphModule,
    *,
    weight_bits: int,
    activation_bits: int,
    calibration: Iterable[Tensor],
    train: TrainFn | None,
) -> Quantized:
    """Learn the grid of every weight and every quantization point; `prepared` is not changed.

    `calibration` yields normalised float32 images (N, 3, H, W) that set the first ranges; with `train` they are then
    followed while it trains, without it (post-training quantization) they stay. Raises `QuantizationError`.
    """
    from compress.quantization.nni_backend import quantize_with_nni

    for field, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits not in QUANTIZERS["qat"].bits:
            raise QuantizationError(f"{field}: got {bits!r}, expected a whole number from 2 to 8.")
    state, ranges = quantize_with_nni(
        prepared, weight_bits=weight_bits, activation_bits=activation_bits, calibration=calibration, train=train
    )
    model = copy.deepcopy(prepared).eval()
    model.load_state_dict(state)
    return Quantized(model, ranges)
