"""From a user's module to a graph: ordinary Python code, opened with an example of what it will be given.

A graph is taken by running the forward pass on stand-ins (`proxies`) that record what is done with them. They carry
example tensors without values, so that flags, optional arguments, shapes and types are answered as they will be, while
sizes that are only handed on stay sizes. Nothing is taken on trust: `prove` compares the graph with the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, fx, nn

from compress.tracing.batches import described, release, with_batch
from compress.tracing.layers import as_layer, is_torch_layer, layer_type, torch_base, type_name
from compress.tracing.proof import prove
from compress.tracing.tracer import ValueTracer
from compress.tracing.wording import Decision, Untraceable, first_sentence, place_of

__all__ = [
    "Captured", "Decision", "Untraceable", "ValueTracer", "as_layer", "capture", "explained", "first_sentence", "is_torch_layer",
    "layer_type", "prove", "structure_copy", "torch_base",
    "type_name",
]  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """A graph, what Python asked about sizes when it was taken, and whether it is the same for images of another size."""

    graph_module: fx.GraphModule
    decisions: tuple[Decision, ...]
    holds_for: Callable[[Tensor], bool]


def capture(
    model: nn.Module, example: Tensor | None, tracer: Callable[[Tensor | None], ValueTracer] = ValueTracer
) -> Captured:
    """The graph of `model`, in the mode it is in; it shares the model's modules and tensors.

    A layer that subclasses one of torch's is of that class in the graph, and has the same parameters and buffers.

    Args:
        example: what the forward pass is called with, images [N, C, H, W] as a rule; only shape, type and device are
            used. Without it, what asks in Python about sizes cannot be opened.

    Raises:
        Untraceable: the forward pass does what no graph can hold; anything else that it raises itself comes as it is.
    """
    if example is None:
        taken = tracer(None)
        return Captured(_graph_module(model, taken, taken.trace_root(model)), (), lambda images: True)
    reference = structure_copy(model)
    batch = max(2, len(example))
    taken = tracer(with_batch(example, batch))
    graph = taken.trace_root(model)
    here = described(graph, model, taken.decisions, batch)

    def again(images: Tensor) -> object:
        root = structure_copy(reference)
        other = tracer(images)
        return described(other.trace_root(root), root, other.decisions, len(images))

    def holds_for(images: Tensor) -> bool:
        try:
            return again(with_batch(images, batch)) == here
        except Exception:  # noqa: BLE001 - what a model raises on a size that does not fit is its author's choice
            return False

    if taken.decisions:
        there = again(with_batch(example, batch + (batch + 1) // 2))
        if here != there:
            release(graph, here, there)
    return Captured(_graph_module(model, taken, graph), tuple(taken.decisions), holds_for)


def _graph_module(model: nn.Module, tracer: ValueTracer, graph: fx.Graph) -> fx.GraphModule:
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    layers = dict(tracer.own.found)
    for name in {str(node.target) for node in graph.nodes if node.op == "call_module"} - set(layers):
        module = graph_module.get_submodule(name)
        if layer_type(module) is not type(module):
            layers[name] = as_layer(module, layer_type(module))
    for name in sorted(layers, key=lambda name: name.count(".")):
        graph_module.set_submodule(name, layers[name])
    return graph_module


def structure_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but share its tensors: for reading, and for replacing layers one by one.

    Raises `Untraceable` when the model cannot be copied.
    """
    tensors = chain(model.parameters(), model.buffers())
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise Untraceable(f"cannot be copied: {first_sentence(error)}") from error


def explained(error: Exception, model: nn.Module, example: Tensor | None) -> str:
    """In words about the model, why `capture` or `prove` raised `error`."""
    name, place = type(model).__name__, place_of(error)
    if isinstance(error, Untraceable):
        place = error.place or place
        return f"{name} cannot be traced: its forward pass {error.reason}{f', at {place}' if place else ''}."
    at = f", at {place}" if place else ""
    if isinstance(error, AssertionError):
        return f"{name} refuses its input: its own check failed ({first_sentence(error)}){at}."
    what = "this input" if example is None else " x ".join(map(str, example.shape[1:]))
    return f"{name} does not run on images of {what}: {first_sentence(error)}{at}. Give images of the size and channels it takes."
