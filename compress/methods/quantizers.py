"""The quantizers on offer: plain facts, read by the request, the shell and the web form alike."""

from __future__ import annotations

from dataclasses import dataclass

from compress.methods.runtimes import RUNTIMES

_INTEGER_RUNTIMES = tuple(runtime.name for runtime in RUNTIMES.values() if runtime.integer_kernels)
NO_TENSORRT_FILE = (
    "TensorRT reads 8-bit integers whose zero is code 0, and learnt offsets of 8 bits need others; take lsq, or lsq-plus "
    "with at most 7 activation bits."
)


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize, as the shell and the web form list it."""

    name: str
    title: str
    summary: str
    trains: bool
    """Goes on training with `qat_epochs`; with none of them, or without images, it only calibrates."""
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    integer_runtimes: tuple[str, ...]
    """Runtimes that execute its result with 8-bit integer kernels; fewer bits run in int8 containers."""
    note: str
    """What else a user must know, or nothing."""
    paper: str


_BITS = tuple(range(2, 9))

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (
        Quantizer(
            "qat", "Quantization-aware training", "Trains with simulated rounding; ranges follow the tensors.",
            True, _BITS, _BITS, _INTEGER_RUNTIMES, "", "https://arxiv.org/abs/1712.05877",
        ),
        Quantizer(
            "ptq", "Post-training quantization", "Only looks at images, in seconds; --calibration says how.",
            False, _BITS, _BITS, _INTEGER_RUNTIMES, "NNI 2.x calls it naive and observer, and these names lead here.",
            "https://arxiv.org/abs/1806.08342",
        ),
        Quantizer(
            "lsq", "Learned step size", "Trains the scales as well, from the least squared error on; good below 8 bits.",
            True, _BITS, _BITS, _INTEGER_RUNTIMES, "", "https://arxiv.org/abs/1902.08153",
        ),
        Quantizer(
            "lsq-plus", "Learned step size and offset", "LSQ whose signed activations learn an offset, too.",
            True, _BITS, _BITS, _INTEGER_RUNTIMES,
            "With 8-bit activations there is no TensorRT file: its zero must be code 0. With 7 and fewer there is, and "
            "tensors that keep 8 bits have no offset.",
            "https://arxiv.org/abs/2004.09576",
        ),
        Quantizer(
            "dorefa", "DoReFa", "Trains weights through tanh onto evenly spaced odd levels.",
            True, tuple(range(2, 8)), _BITS, _INTEGER_RUNTIMES, "8 bits of its levels do not fit an int8: take 7.",
            "https://arxiv.org/abs/1606.06160",
        ),
        Quantizer(
            "bnn", "Binary weights", "Weights are +a or -a with one a for each channel; needs long training.",
            True, (1,), _BITS, _INTEGER_RUNTIMES,
            "Activations keep 2 to 8 bits: behind a ReLU all signs are equal.", "https://arxiv.org/abs/1602.02830",
        ),
    )
}  # fmt: skip

FORMER_NAMES = {"naive": "ptq", "observer": "ptq"}
"""Of NNI 2.x: NaiveQuantizer and ObserverQuantizer, which calibrate without training."""
