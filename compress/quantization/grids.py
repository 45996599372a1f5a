"""The grid of every quantized tensor: what NNI learned, as plain numbers, exact in JSON both ways.

Zero is always code 0, so a grid is a scale and two whole numbers. Scales are float32 values; JSON holds the shortest
decimal that reads back as the same double, so the float32 is the same bit for bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from compress.errors import QuantizationError
from compress.files import write_tensors, write_text
from compress.methods.runtimes import Flavour
from compress.quantization.prepare import prepare

_VERSION = 2
_SAFE_BITS = 6
GRIDS_FILE, WEIGHTS_FILE = "quantization.json", "quantized.safetensors"


@dataclass(frozen=True)
class ActivationGrid:
    """Values `scale * code` for whole codes from `qmin` to `qmax`."""

    scale: float
    qmin: int
    qmax: int

    @property
    def bits(self) -> int:
        return (self.qmax - self.qmin).bit_length()


@dataclass(frozen=True)
class WeightGrid:
    """One scale per output channel; codes from -`qmax` to `qmax`, at most 127."""

    scales: tuple[float, ...]
    qmax: int
    bits: int
    """That the codes carry; some quantizers leave codes out (DoReFa's are odd, binary ones are never 0)."""

    def codes(self, weight: Tensor) -> Tensor:
        """The integers of a float weight, int8, same shape; channels are the first dimension."""
        scale = torch.tensor(self.scales, dtype=torch.float32).reshape(-1, *[1] * (weight.dim() - 1))
        return torch.round(torch.clamp(weight.detach() / scale, -self.qmax, self.qmax)).to(torch.int8)

    def in_container(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes int8 of the shape of `weight`, scales float32 [channels]) that a file stores.

        They stand for the same values, on a finer scale below 7 bits.

        Runtimes round a bias to whole multiples of input scale times weight scale; of a coarse grid that would be a
        large part of an output code. The finer scale is smaller by a power of two, so that nothing else is rounded, and the
        codes stay within 63, where 8-bit kernels without a dot product cannot overflow.
        """
        factor = 2 ** max(0, _SAFE_BITS - self.qmax.bit_length())
        return self.codes(weight) * factor, torch.tensor(self.scales, dtype=torch.float32) / factor

    def dequantized(self, weight: Tensor) -> Tensor:
        """`weight`, float32 [channels, ...], rounded to the grid: the same shape and type."""
        scale = torch.tensor(self.scales, dtype=torch.float32).reshape(-1, *[1] * (weight.dim() - 1))
        return self.codes(weight) * scale


@dataclass(frozen=True)
class Grids:
    """Grids by name: `activations` by quantization point, `weights` by layer."""

    weight_bits: int
    activation_bits: int
    """Of layers without bits of their own."""
    activations: dict[str, ActivationGrid]
    weights: dict[str, WeightGrid]
    keep_float: tuple[str, ...] = ()
    """Layers that were kept out of quantization."""

    def __post_init__(self) -> None:
        for name, activation in self.activations.items():
            _check_scale(name, activation.scale)
        for name, weight in self.weights.items():
            for scale in weight.scales:
                _check_scale(name, scale)

    @property
    def label(self) -> str:
        """How a file on these grids is called; fewer than 8 bits have no kernels of their own."""
        if self.weight_bits == self.activation_bits == 8 and not self._odd_layers:
            return "int8"
        general = f"{self.weight_bits}-bit weights and {self.activation_bits}-bit activations in int8 containers"
        odd = ", ".join(f"{name} {bits}" for name, bits in self._odd_layers.items())
        return f"{general}, except the weights of {odd}" if odd else general

    @property
    def _odd_layers(self) -> dict[str, str]:
        """Layers with other weight bits than the general ones, and what they have."""
        odd = {name: f"({grid.bits} bits)" for name, grid in self.weights.items() if grid.bits != self.weight_bits}
        return odd | dict.fromkeys(self.keep_float, "(float)")

    @property
    def flavours(self) -> tuple[Flavour, ...]:
        """Those that can hold the grids: TensorRT reads int8 with zero at code 0, so no code above 127."""
        fits = all(-128 <= grid.qmin and grid.qmax <= 127 for grid in self.activations.values())
        return ("tensorrt", "onnxruntime") if fits else ("onnxruntime",)

    def to_json(self) -> str:
        activations = {name: [g.scale, g.qmin, g.qmax] for name, g in self.activations.items()}
        weights = {
            name: {"bits": g.bits, "highest": g.qmax, "scales": list(g.scales)} for name, g in self.weights.items()
        }
        document = {
            "version": _VERSION,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "stays_float": list(self.keep_float),
            "activations": activations,
            "weights": weights,
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Grids:
        """Raises `QuantizationError` when the text is not what `to_json` writes."""
        try:
            document = json.loads(text)
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']!r} instead of {_VERSION}")
            return cls(
                weight_bits=int(document["weight_bits"]),
                activation_bits=int(document["activation_bits"]),
                keep_float=tuple(str(name) for name in document["stays_float"]),
                activations={name: ActivationGrid(float(s), int(low), int(high))
                             for name, (s, low, high) in document["activations"].items()},
                weights={name: WeightGrid(tuple(float(s) for s in grid["scales"]), int(grid["highest"]),
                                          int(grid["bits"]))
                         for name, grid in document["weights"].items()},
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizationError(
                f"The quantization grids cannot be read ({error}); quantize the model again."
            ) from error


@dataclass(frozen=True)
class Quantized:
    """A prepared model with its trained float weights, and the grids that turn it into integers."""

    model: fx.GraphModule
    grids: Grids


def save(quantized: Quantized, folder: Path) -> tuple[Path, Path]:
    """Write the grids (JSON) and the trained float weights (safetensors) into `folder`; returns both paths."""
    grids, weights = folder / GRIDS_FILE, folder / WEIGHTS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in quantized.model.state_dict().items()}
    write_tensors(weights, tensors)
    write_text(grids, quantized.grids.to_json())
    return grids, weights


def restore(model: nn.Module, folder: Path, images: Tensor | None = None) -> Quantized:
    """What `save` wrote, for the float model that was quantized; NNI is not needed.

    `images`, float32 [N, 3, H, W] and normalised, are those of `prepare`.

    Raises `QuantizationError` when the files are missing, damaged or belong to another model.
    """
    try:
        grids = Grids.from_json((folder / GRIDS_FILE).read_text(encoding="utf-8"))
        model = prepare(model, images, keep_float=frozenset(grids.keep_float))
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (OSError, UnicodeDecodeError, SafetensorError, RuntimeError) as error:
        raise QuantizationError(f"{folder} has no readable quantized model ({error}); quantize it again.") from error
    return Quantized(model, grids)


def _check_scale(name: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise QuantizationError(
            f"{name}: its quantization scale is {scale}, which is not a positive number; calibrate with images that "
            "reach this layer and check that its weights are finite."
        )
