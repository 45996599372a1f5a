"""Mixed precision: which layers are most sensitive to few bits, and how many to widen until the loss is within a budget.

A layer's sensitivity is the noise that it alone puts on the logits when it is on its grid and all others stay in
floating point (SQNR of the logits; Wu et al. 2020, "Integer quantization for deep learning inference", section 5.2).
The most sensitive layers are widened first: fewer than 8 bits become 8, 8 bits become floating point.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.quantization.bits import FLOAT, BitPlan, LayerBits
from compress.quantization.convert import FakeQuantize
from compress.quantization.grids import Quantized
from compress.quantization.kinds import layer_at
from compress.quantization.prepare import readers_of

Quantize = Callable[[BitPlan], Quantized]
"""Post-training quantization of the model in question with a plan."""
Score = Callable[[Quantized], float]
"""Share of held-out images, 0..1, that the quantized model gets right."""


@dataclass(frozen=True)
class Step:
    """A point of the trade-off: so many of the most sensitive layers widened."""

    widened: tuple[str, ...]
    score: float
    weight_bits: float
    """Mean over all weights of the layers."""


@dataclass(frozen=True)
class BitSearch:
    plan: BitPlan
    sensitivity: dict[str, float]
    """Layer -> SQNR in decibels, the most sensitive (lowest) first."""
    steps: tuple[Step, ...]
    """In the order tried, each with more layers than the one before; the last is the chosen one."""
    within_budget: bool
    """Whether the last step keeps to the budget."""


def search_bits(plan: BitPlan, quantize: Quantize, score: Score, images: Tensor, target: float) -> BitSearch:
    """The plan that widens the fewest layers, in order of sensitivity, and scores at least `target`.

    Args:
        images: normalised float32 [N, 3, H, W] on which sensitivity is measured.
        target: share of right answers, 0..1.

    Layers are widened in growing steps (1, 2, 3, 5, 8, ...): each step costs a calibration and a pass over the images of
    `score`, and a model has up to hundreds of layers.
    """
    quantized = quantize(plan)
    noise = sensitivity(quantized, images)
    order = list(noise)
    steps = [Step((), score(quantized), _mean_bits(quantized))]
    chosen = plan
    for count in _growing(len(order)):
        if steps[-1].score >= target:
            break
        chosen = _widen(plan, order[:count])
        quantized = quantize(chosen)
        steps.append(Step(tuple(order[:count]), score(quantized), _mean_bits(quantized)))
    return BitSearch(chosen, noise, tuple(steps), steps[-1].score >= target)


def sensitivity(quantized: Quantized, images: Tensor) -> dict[str, float]:
    """SQNR of the logits in decibels for each layer when only it is quantized, lowest first.

    `images` are normalised, float32 [N, 3, H, W].
    """
    model = copy.deepcopy(quantized.model).eval().requires_grad_(False)
    with torch.inference_mode():
        expected = model(images)
        ratios = {
            name: _sqnr_db(expected, _with_layer(model, quantized, name)(images)) for name in quantized.grids.weights
        }
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


def _with_layer(model: fx.GraphModule, quantized: Quantized, layer: str) -> fx.GraphModule:
    """A copy of the float `model` in which one layer and what it reads are on their grids."""
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    module = layer_at(result, layer)
    moved = quantized.grids.weights[layer].dequantized(module.weight)
    module.weight = nn.Parameter(moved, requires_grad=False)
    for name, readers in readers_of(model).items():
        if layer in readers:
            grid = quantized.grids.activations[name]
            result.set_submodule(name, FakeQuantize(grid.scale, grid.qmin, grid.qmax))
    return result


def _widen(plan: BitPlan, names: Iterable[str]) -> BitPlan:
    def wider(bits: LayerBits) -> LayerBits:
        return LayerBits(8, 8) if min(bits.weights, bits.activations) < 8 else LayerBits(FLOAT, FLOAT)

    layers = {name: wider(bits) if name in names else bits for name, bits in plan.layers.items()}
    return BitPlan(plan.weight_bits, plan.activation_bits, layers)


def _growing(most: int) -> Iterable[int]:
    """1, 2, 3, 5, 8, ... below `most`: at least one layer stays on few bits."""
    step, following = 1, 2
    while step < most:
        yield step
        step, following = following, step + following


def _mean_bits(quantized: Quantized) -> float:
    sizes = {name: layer_at(quantized.model, name).weight.numel() for name in quantized.grids.weights}
    bits = sum(size * quantized.grids.weights[name].bits for name, size in sizes.items())
    kept = sum(layer_at(quantized.model, name).weight.numel() for name in quantized.grids.keep_float)
    return (bits + FLOAT * kept) / (sum(sizes.values()) + kept)


def _sqnr_db(expected: Tensor, got: Tensor) -> float:
    noise = (expected - got).double().square().mean().clamp_min(1e-30)
    return float(10 * torch.log10(expected.double().square().mean() / noise))
