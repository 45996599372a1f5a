"""The grid of every quantized tensor: what NNI learned, as plain numbers, exact in JSON both ways.

Zero is always code 0, so a grid is a scale and two whole numbers. Scales are float32 values; JSON holds the shortest
decimal that reads back as the same double, so the float32 is the same bit for bit.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx

from compress.errors import QuantizationError
from compress.files import write_tensors, write_text

_VERSION = 1
RANGES_FILE, WEIGHTS_FILE = "quantization.json", "quantized.safetensors"


@dataclass(frozen=True)
class ActivationGrid:
    """Values `scale * code` for whole codes from `lowest` to `highest`."""

    scale: float
    lowest: int
    highest: int

    @property
    def bits(self) -> int:
        return (self.highest - self.lowest).bit_length()


@dataclass(frozen=True)
class WeightGrid:
    """One scale per output channel; codes from -`highest` to `highest`."""

    scales: tuple[float, ...]
    highest: int

    def codes(self, weight: Tensor) -> Tensor:
        """The integers of a float weight, int8, same shape; channels are the first dimension."""
        scale = torch.tensor(self.scales, dtype=torch.float32).reshape(-1, *[1] * (weight.dim() - 1))
        return torch.round(torch.clamp(weight.detach() / scale, -self.highest, self.highest)).to(torch.int8)

    def dequantized(self, weight: Tensor) -> Tensor:
        """The float weight moved onto the grid."""
        scale = torch.tensor(self.scales, dtype=torch.float32).reshape(-1, *[1] * (weight.dim() - 1))
        return self.codes(weight) * scale


@dataclass(frozen=True)
class Ranges:
    """Grids by name: `activations` by quantization point, `weights` by layer."""

    weight_bits: int
    activation_bits: int
    activations: dict[str, ActivationGrid]
    weights: dict[str, WeightGrid]

    def __post_init__(self) -> None:
        for name, activation in self.activations.items():
            _check_scale(name, activation.scale)
        for name, weight in self.weights.items():
            for scale in weight.scales:
                _check_scale(name, scale)

    @property
    def label(self) -> str:
        """How a file on these grids is called; fewer than 8 bits have no kernels of their own."""
        if self.weight_bits == self.activation_bits == 8:
            return "int8"
        return f"{self.weight_bits}-bit weights and {self.activation_bits}-bit activations in int8 containers"

    def to_json(self) -> str:
        activations = {name: [g.scale, g.lowest, g.highest] for name, g in self.activations.items()}
        weights = {name: {"highest": g.highest, "scales": list(g.scales)} for name, g in self.weights.items()}
        document = {
            "version": _VERSION,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "activations": activations,
            "weights": weights,
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ranges:
        """Raises `QuantizationError` when the text is not what `to_json` writes."""
        try:
            document = json.loads(text)
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']!r} instead of {_VERSION}")
            return cls(
                weight_bits=int(document["weight_bits"]),
                activation_bits=int(document["activation_bits"]),
                activations={name: ActivationGrid(float(s), int(low), int(high))
                             for name, (s, low, high) in document["activations"].items()},
                weights={name: WeightGrid(tuple(float(s) for s in grid["scales"]), int(grid["highest"]))
                         for name, grid in document["weights"].items()},
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizationError(f"The ranges cannot be read ({error}); quantize the model again.") from error


@dataclass(frozen=True)
class Quantized:
    """A prepared model with its trained float weights, and the grids that turn it into integers."""

    model: fx.GraphModule
    ranges: Ranges


def save(quantized: Quantized, folder: Path) -> tuple[Path, Path]:
    """Write the ranges (JSON) and the trained float weights (safetensors) into `folder`; returns both paths."""
    ranges, weights = folder / RANGES_FILE, folder / WEIGHTS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in quantized.model.state_dict().items()}
    write_tensors(weights, tensors)
    write_text(ranges, quantized.ranges.to_json())
    return ranges, weights


def restore(prepared: fx.GraphModule, folder: Path) -> Quantized:
    """What `save` wrote, for the graph that `prepare` makes of the same model; NNI is not needed.

    Raises `QuantizationError` when the files are missing, damaged or belong to another model.
    """
    model = copy.deepcopy(prepared)
    try:
        ranges = Ranges.from_json((folder / RANGES_FILE).read_text(encoding="utf-8"))
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (OSError, UnicodeDecodeError, SafetensorError, RuntimeError) as error:
        raise QuantizationError(f"{folder} has no readable quantized model ({error}); quantize it again.") from error
    return Quantized(model, ranges)


def _check_scale(name: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise QuantizationError(
            f"{name}: its quantization scale is {scale}, which is not a positive number; calibrate with images that "
            "reach this layer and check that its weights are finite."
        )
