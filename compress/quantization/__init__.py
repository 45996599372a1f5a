"""Quantization: prepare a float model, learn its quantization grids with NNI, convert it to explicit Q/DQ.

    prepared = prepare(model)
    quantized = quantize(prepared, assign_bits(prepared, 8, 8), calibration=batches, train=None)
    reference, exportable = fake_quantized(quantized), convert(quantized)

`prepare` and everything after `quantize` run without NNI, so a saved result can be restored where NNI is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from compress import equality
from compress.errors import QuantizationError
from compress.methods.quantizers import NO_TENSORRT_FILE, QUANTIZERS, Quantizer
from compress.methods.runtimes import FLAVOURS, Flavour
from compress.quantization.bits import BitPlan, LayerBits, assign_bits
from compress.quantization.calibration import ESTIMATORS, Estimator
from compress.quantization.config_list import translate as bits_of_config_list
from compress.quantization.convert import convert, fake_quantized, weight_sqnr_db
from compress.quantization.exclusion import exclude_layers
from compress.quantization.grids import Grids, Quantized, restore, save
from compress.quantization.layer_noise import LayerSqnr, file_noise, noisiest, quantization_noise, sqnr_by_layer
from compress.quantization.mixed_precision import BitSearch, search_bits
from compress.quantization.mixed_precision import sensitivity as layer_sensitivity
from compress.quantization.prepare import PROOFS, left_float, prepare, quantization_points, quantized_layers

__all__ = [
    "BitPlan",
    "BitSearch",
    "ESTIMATORS",
    "Estimator",
    "FLAVOURS",
    "Flavour",
    "Grids",
    "LayerBits",
    "LayerSqnr",
    "NO_TENSORRT_FILE",
    "PROOFS",
    "QUANTIZERS",
    "Quantized",
    "Quantizer",
    "TrainFn",
    "assign_bits",
    "bits_of_config_list",
    "convert",
    "exclude_layers",
    "fake_quantized",
    "file_noise",
    "layer_sensitivity",
    "left_float",
    "noisiest",
    "prepare",
    "quantization_noise",
    "quantization_points",
    "quantize",
    "quantized_layers",
    "restore",
    "save",
    "search_bits",
    "sqnr_by_layer",
    "weight_sqnr_db",
]

TrainFn = Callable[[nn.Module], object]
"""Trains the model it is given, in place. To it the model is a plain nn.Module: images in, logits out, parameters()
as usual; quantization is simulated inside forward(), and ranges are followed while the model is in training mode."""


def quantize(
    prepared: fx.GraphModule,
    plan: BitPlan,
    *,
    quantizer: str = "qat",
    estimator: Estimator = "average",
    calibration: Iterable[Tensor],
    train: TrainFn | None,
) -> Quantized:
    """Learn the grid of every weight and every quantization point; `prepared` is not changed.

    Args:
        prepared: what `prepare` made with the plan's `keep_float`.
        quantizer: a name of `QUANTIZERS`.
        estimator: how calibration turns what it sees into a range, see `compress.quantization.calibration`.
        calibration: batches of normalised images, float32 [N, 3, H, W], that set the first ranges.
        train: with it, ranges are followed or learnt while it trains; without (post-training quantization) they stay.

    Raises:
        QuantizationError: the quantizer does not take these bits, or a layer has no range.
        HandoffError: the model on the learnt grids answers differently from NNI's simulation of them.
    """
    from compress.quantization.nni.backend import quantize_with_nni

    entry = QUANTIZERS[quantizer]
    allowed = {"weight_bits": entry.weight_bits, "activation_bits": entry.activation_bits}
    for field, bits in (("weight_bits", plan.weight_bits), ("activation_bits", plan.activation_bits)):
        if bits not in allowed[field]:
            numbers = allowed[field]
            expected = f"a whole number from {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
            raise QuantizationError(f"{field}: got {bits!r}, expected {expected} with {quantizer}.")
    batches = list(calibration)
    shown = equality.few(batches[0]) if batches else torch.empty(0)
    state, grids, simulated = quantize_with_nni(
        prepared,
        plan,
        quantizer=quantizer,
        estimator=estimator,
        calibration=batches,
        train=train if entry.trains else None,
        shown=shown,
    )
    model = copy.deepcopy(prepared).eval()
    model.load_state_dict(state)
    quantized = Quantized(model, grids)
    answers = equality.answers(fake_quantized(quantized), shown)
    row = equality.judge_grids("trained on the grid by NNI", "fake-quantized, torch", simulated, answers)
    model.meta[PROOFS] = (*model.meta[PROOFS], equality.checked(row))
    return quantized
