"""Symbolic tracing of a user's module with example shapes: from ordinary Python code to a torch.fx graph.

The forward pass runs on proxies that record every operation. Each proxy knows an example tensor without values (a fake
tensor), so flags, optional arguments, shapes and types have the values that they have in a real call, while sizes that are
only passed on stay symbolic. `prove` compares the graph's outputs with the module's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, fx, nn

from compress.tracing.batches import Description, describe, replace_batch_sizes, with_batch
from compress.tracing.layers import as_layer, is_torch_layer, layer_type, torch_base, type_name
from compress.tracing.proof import prove
from compress.tracing.tracer import ValueTracer
from compress.tracing.wording import Decision, Untraceable, first_sentence, place_of

__all__ = [
    "Capture", "Decision", "Untraceable", "ValueTracer", "as_layer", "capture", "explain", "first_sentence", "is_torch_layer",
    "layer_type", "prove", "structure_copy", "torch_base",
    "type_name",
]  # fmt: skip


@dataclass(frozen=True)
class Capture:
    """A graph, the decisions that Python made by sizes while it was traced, and whether it holds for images of another size."""

    graph_module: fx.GraphModule
    decisions: tuple[Decision, ...]
    holds_for: Callable[[Tensor], bool]


def capture(
    model: nn.Module, example: Tensor | None, tracer: Callable[[Tensor | None], ValueTracer] = ValueTracer
) -> Capture:
    """The graph of `model`, in the mode it is in; it shares the model's modules and tensors.

    A layer that subclasses one of torch's is of that class in the graph, and has the same parameters and buffers.

    Args:
        example: the input of the forward pass, images [N, C, H, W] as a rule; only shape, dtype and device are used.
            Without it, a forward pass that reads sizes in Python cannot be traced.

    Raises:
        Untraceable: a graph cannot represent the forward pass; anything that the module's code raises is passed on.
    """
    if example is None:
        taken = tracer(None)
        return Capture(_graph_module(model, taken, taken.trace_root(model)), (), lambda images: True)
    reference = structure_copy(model)
    batch = max(2, len(example))
    taken = tracer(with_batch(example, batch))
    graph = taken.trace_root(model)
    here = describe(graph, model, taken.decisions, batch)

    def again(images: Tensor) -> Description:
        root = structure_copy(reference)
        other = tracer(images)
        return describe(other.trace_root(root), root, other.decisions, len(images))

    def holds_for(images: Tensor) -> bool:
        try:
            return again(with_batch(images, batch)) == here
        except Exception:  # noqa: BLE001 - what a model raises on a size that does not fit is its author's choice
            return False

    if taken.decisions:
        there = again(with_batch(example, batch + (batch + 1) // 2))
        if here != there:
            replace_batch_sizes(graph, here, there)
    return Capture(_graph_module(model, taken, graph), tuple(taken.decisions), holds_for)


def _graph_module(model: nn.Module, tracer: ValueTracer, graph: fx.Graph) -> fx.GraphModule:
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    layers = dict(tracer.own.layers)
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


def explain(error: Exception, model: nn.Module, example: Tensor | None) -> str:
    """A sentence for the user about an error that `capture` or `prove` raised for `example` [N, C, H, W]."""
    name, place = type(model).__name__, place_of(error)
    if isinstance(error, Untraceable):
        place = error.place or place
        return f"{name} cannot be traced: its forward pass {error.reason}{f', at {place}' if place else ''}."
    at = f", at {place}" if place else ""
    if isinstance(error, AssertionError):
        return f"{name} refuses its input: its own check failed ({first_sentence(error)}){at}."
    what = "this input" if example is None else " x ".join(map(str, example.shape[1:]))
    return f"{name} does not run on images of {what}: {first_sentence(error)}{at}. Give images of the size and channels it takes."
