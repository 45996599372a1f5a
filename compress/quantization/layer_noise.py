"""Which layer makes the noise: signal to noise at every quantization point, each from the other model's own inputs.

An error that one layer makes is in every tensor behind it, so two models compared tensor by tensor differ everywhere
downstream of the fault. Here the reference is led along the other model (the teacher forcing of Williams and Zipser,
"A learning algorithm for continually running fully recurrent neural networks", 1989): at every point it computes its
own value from the other model's values of the earlier points, is compared there, and goes on with the other's value.
What differs at a point was caused between the points before it and this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from compress.methods.runtimes import Flavour
from compress.quantization.convert import CALLS, fake_quantized
from compress.quantization.grids import Quantized

OUTPUT = "logits"
"""The point behind the last layer: what the model answers."""
CEILING_DB = 144.5
"""24 bits of a float32 at 6.02 dB each: equal tensors get this, and noise without any signal its negative."""
INHERITED_DB = 6.0
"""A point that reads an earlier stretch through a float sum is only blamed when it is worse than that one by this much."""

Record = Callable[[Tensor], Mapping[str, Tensor]]
"""Images float32 [N, 3, H, W] -> the value of each quantization point that the model has, and of `OUTPUT`."""


@dataclass(frozen=True)
class LayerSqnr:
    """What one stretch of the graph adds, from the points before it to this one."""

    point: str
    name: str
    """The layers; the operations where there are none, or `the input`."""
    layers: tuple[str, ...]
    """Layers with weights in this stretch and in no earlier one, in execution order."""
    inherits: tuple[str, ...]
    """Earlier points whose layers this stretch holds too: a sum in floating point carries their noise past them."""
    sqnr_db: float
    """Energy of the reference's value over the energy of the difference, all images together, in decibels."""


def quantization_noise(quantized: Quantized, batches: Iterable[Tensor]) -> list[LayerSqnr]:
    """The trained float model against the fake-quantized one: the noise of each layer's weight and output grid.

    `batches` are normalised images, float32 [N, 3, H, W].
    """
    points = quantized.grids.activations.keys()
    return layer_sqnr(quantized.model, _recorder(fake_quantized(quantized), points), points, batches)


def file_noise(quantized: Quantized, flavour: Flavour, record: Record, batches: Iterable[Tensor]) -> list[LayerSqnr]:
    """The fake-quantized model of a flavour against its file, whose tensors `record` hands out.

    They differ in the order of float additions only, so a faithful file keeps to rare roundings to a neighbouring code.
    `batches` are normalised images, float32 [N, 3, H, W].
    """
    return layer_sqnr(fake_quantized(quantized, flavour), record, quantized.grids.activations.keys(), batches)


def layer_sqnr(
    reference: fx.GraphModule, record: Record, points: Collection[str], batches: Iterable[Tensor]
) -> list[LayerSqnr]:
    """`reference` led along the model behind `record`: a row for every point that the latter has, in execution order.

    Holds the recorded points of one batch and one forward pass in memory; both models are in eval mode. `batches` are
    normalised images, float32 [N, 3, H, W].
    """
    energies: dict[str, _Energy] = {}
    with torch.inference_mode():
        for images in batches:
            recorded = record(images)

            def compare(point: str, own: Tensor, recorded: Mapping[str, Tensor] = recorded) -> Tensor:
                if point not in recorded:
                    return own
                energies.setdefault(point, _Energy()).add(own, recorded[point])
                return recorded[point]

            _AtPoints(reference, points, compare).run(images)
    return _located(reference, energies)


def sqnr_by_layer(noise: Sequence[LayerSqnr]) -> dict[str, float]:
    """Layer -> local SQNR of its output in decibels; the lowest where it is called more than once."""
    worst: dict[str, float] = {}
    for row in noise:
        for layer in row.layers:
            worst[layer] = min(row.sqnr_db, worst.get(layer, row.sqnr_db))
    return worst


def noisiest(noise: Sequence[LayerSqnr]) -> LayerSqnr:
    """The stretch that makes most noise, and not one that only passes it on; `noise` as `layer_sqnr` returns it."""
    rows = {row.point: row for row in noise}
    worst = min(noise, key=lambda row: row.sqnr_db)
    while makers := [p for p in worst.inherits if rows[p].sqnr_db <= worst.sqnr_db + INHERITED_DB]:
        worst = rows[makers[0]]
    return worst


@dataclass
class _Energy:
    signal: float = 0.0
    noise: float = 0.0

    def add(self, own: Tensor, other: Tensor) -> None:
        self.signal += float(own.square().sum(dtype=torch.float64))
        self.noise += float((own - other).square().sum(dtype=torch.float64))

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0:
            return CEILING_DB
        ratio = self.signal / self.noise
        return max(-CEILING_DB, min(CEILING_DB, 10 * math.log10(ratio))) if ratio > 0 else -CEILING_DB


class _AtPoints(fx.Interpreter):
    """Hands the value of each point and the answer to `visit`, and goes on with what that returns."""

    def __init__(self, model: fx.GraphModule, points: Collection[str], visit: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(model)
        self._points, self._visit = points, visit

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op == "output":
            return self._visit(OUTPUT, value)
        is_point = node.op == "call_module" and str(node.target) in self._points
        return self._visit(str(node.target), value) if is_point else value


def _recorder(model: fx.GraphModule, points: Collection[str]) -> Record:
    def record(images: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        _AtPoints(model, points, lambda point, value: values.setdefault(point, value)).run(images)
        return values

    return record


def _located(graph_module: fx.GraphModule, energies: Mapping[str, _Energy]) -> list[LayerSqnr]:
    """Each compared point with the layers between the compared points before it and itself."""
    graph = graph_module.graph
    layers_of = graph_module.meta.get(CALLS, {})
    names = {
        node: OUTPUT if node.op == "output" else layers_of.get(node.target, str(node.target)) for node in graph.nodes
    }
    stops = {node for node in graph.nodes if node.op in ("call_module", "output") and names[node] in energies}
    weighted = {node for node in graph.nodes if node.op == "call_module" and _has_weights(graph_module, node)}
    first_at: dict[fx.Node, str] = {}
    rows = []
    for stop in (node for node in graph.nodes if node in stops):
        point = names[stop]
        stretch = _stretch(stop, stops, graph)
        layers = [node for node in stretch if node in weighted]
        new = [node for node in layers if node not in first_at]
        inherits = tuple(dict.fromkeys(first_at[node] for node in layers if node in first_at))
        first_at |= dict.fromkeys(new, point)
        operations = [node.name for node in stretch if node not in weighted and node.op != "placeholder"]
        new_names = [names[node] for node in new]
        name = " and ".join(new_names or operations) or "the input"
        rows.append(LayerSqnr(point, name, tuple(new_names), inherits, energies[point].sqnr_db))
    return rows


def _has_weights(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return any(True for _ in graph_module.get_submodule(str(node.target)).parameters())


def _stretch(stop: fx.Node, stops: Collection[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """The nodes that `stop` depends on without passing through another stop, in execution order."""
    stretch: set[fx.Node] = set()
    queue = list(stop.all_input_nodes)
    while queue:
        node = queue.pop()
        if node not in stretch and node not in stops:
            stretch.add(node)
            queue.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in stretch]
