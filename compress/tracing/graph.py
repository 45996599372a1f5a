"""The graph that pruning and quantization work on, with the user's own source line in every message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from compress import tracing
from compress.errors import PruningError
from compress.models.attention import PrunedMultiheadAttention, heads_of, is_attention

_SMALL_SIZES = (32, 64, 96, 128, 160, 192)
PROBE_BATCH = 2
"""Images in a probe: two are enough to tell a channel that varies from one that is constant."""


def trace(
    model: nn.Module,
    example: torch.Tensor | None = None,
    *,
    opens_attention: bool = True,
    follows_buffers: bool = False,
) -> fx.GraphModule:
    """Trace `model`, in the train/eval mode it is in; see `compress.tracing` for how and with what.

    Without `opens_attention` every attention is one node, so that graphs before and after it lost heads have the same.
    With `follows_buffers` what is computed from buffers is part of the graph; else it is a constant in it.

    The graph module shares the modules of `model`. Each function or method call carries `meta["source"]`, the
    user's function, file and line; what is called inside an attention module carries its name as `meta["attention"]`,
    and the graph module's `meta["attentions"]` has the heads of each. `meta["decisions"]` has what the forward pass decided
    by sizes; the graph then holds for images of the example's size and those for which `meta["holds_for"]` says so.
    `meta["root"]` is `model`, whose layers may be called as functions of their weights.

    Args:
        example: images [N, C, H, W] of the size that the model is used with, of which only shape, type and device are
            used; without it, a forward pass that asks about sizes in Python cannot be traced.

    Raises:
        PruningError: the forward pass cannot be traced; names the reason and the line.
    """
    tracer = partial(_Tracer, opens_attention=opens_attention, follows_buffers=follows_buffers)
    try:
        captured = tracing.capture(model, example, tracer)
    except Exception as error:
        raise PruningError(tracing.explain(error, model, example)) from error
    graph_module = captured.graph_module
    _unpack_record(graph_module.graph)
    graph_module.recompile()
    graph_module.meta["root"] = model
    attentions = {node.meta["attention"] for node in graph_module.graph.nodes if "attention" in node.meta}
    graph_module.meta["attentions"] = {name: heads_of(model.get_submodule(name)) for name in attentions}
    graph_module.meta["decisions"], graph_module.meta["holds_for"] = captured.decisions, captured.holds_for
    return graph_module


def _unpack_record(graph: fx.Graph) -> None:
    """Let the graph give the fields themselves: auxiliary heads are usually answered in a named tuple."""
    output = next(node for node in graph.nodes if node.op == "output")
    answer = output.args[0]
    if isinstance(answer, fx.Node) and answer.op == "call_function" and isinstance(answer.target, type):
        output.args = (dict(answer.kwargs) if answer.kwargs else tuple(answer.args),)
        graph.erase_node(answer)


def structure_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but share its tensors: for reading, and for replacing layers one by one."""
    try:
        return tracing.structure_copy(model)
    except tracing.Untraceable as error:
        raise PruningError(
            f"{type(model).__name__} {error.reason}. Pruning works on a copy, so copy.deepcopy(model) has to work."
        ) from error


def traced_copy(model: nn.Module, example: torch.Tensor | None = None) -> fx.GraphModule:
    """Trace a structure copy of `model` in eval mode, with auxiliary heads, which only training uses, as more outputs.

    Auxiliary heads read channels that may be pruned, so they have to be in the graph. A module asks its own `training`
    flag whether to call them: the graph is traced with that flag set in the modules around them, and in these alone, so
    that BatchNorm and dropout behave as in eval mode. `meta["training"]` holds their names; see `set_traced_mode`.

    With an `example` [N, C, H, W], the graph's outputs in eval mode are checked against the model's.

    Raises:
        PruningError: untraceable, random, or training takes another way through the network than evaluation.
    """
    graph_module = _with_buffers(structure_copy(model).eval(), example)
    if example is not None:
        _prove(graph_module, model, example)
    unused = unused_modules(graph_module, model)
    heads = unused - unused_modules(_with_buffers(structure_copy(model).train(), example), model) if unused else set()
    if not heads:
        return graph_module
    around = _modules_around(heads, model)
    graph_module = _with_buffers(set_traced_mode(structure_copy(model), around), example)
    graph_module.meta["training"] = around
    missing = unused_modules(graph_module, model) - (unused - heads)
    if missing:
        raise PruningError(
            f"{type(model).__name__} uses {min(heads)} in training only, and not beside the layers that evaluation uses "
            f"({min(missing)} is left out), so it would no longer fit the pruned ones. Build the model without it, or "
            "in the form in which it is deployed, and try again."
        )
    return graph_module


def _prove(graph_module: fx.GraphModule, model: nn.Module, example: torch.Tensor) -> None:
    try:
        tracing.prove(graph_module, structure_copy(model).eval(), probe(graph_module, example))
    except tracing.Untraceable as error:
        raise PruningError(tracing.explain(error, model, example)) from error


def _with_buffers(model: nn.Module, example: torch.Tensor | None) -> fx.GraphModule:
    """The graph with what is computed from buffers, unless the forward pass decides by them."""
    try:
        return trace(model, example, follows_buffers=True)
    except PruningError:
        return trace(model, example)


def set_traced_mode(model: nn.Module, training: Iterable[str]) -> nn.Module:
    """Put `model` into eval mode, the modules named by `training` excepted (they alone, not what is in them)."""
    model.eval()
    for name in training:
        model.get_submodule(name).training = True
    return model


def _modules_around(heads: set[str], model: nn.Module) -> tuple[str, ...]:
    """The modules that contain a head and more: "aux1.fc1" of a network gives "", the network itself."""
    owners = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    around = {""}
    for head in heads:
        parent = head.rpartition(".")[0]
        while parent:
            if any(owner.startswith(f"{parent}.") and owner not in heads for owner in owners):
                around.add(parent)
            parent = parent.rpartition(".")[0]
    return tuple(sorted(around))


def unused_modules(graph_module: fx.GraphModule, model: nn.Module) -> set[str]:
    """Names of modules of `model` which own parameters that the graph never reads."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    unused = set()
    for name, module in model.named_modules():
        inside = any(name == target or name.startswith(f"{target}.") for target in called)
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        if own and not inside and not read.intersection(own):
            unused.add(name)
    return unused


def probe(graph_module: fx.GraphModule, example: torch.Tensor) -> torch.Tensor:
    """Find the smallest batch on which the graph runs and record every shape in the graph.

    Args:
        example: float32 images [N, C, H, W]; its values are not used.

    Returns: random images [2, C, h, w] with h = w out of 32, 64, ... or, failing these, H and W.

    Raises:
        PruningError: the network does not run on an image of the example's own size either.
    """
    channels, height, width = example.shape[1:]
    sizes = [(size, size) for size in _SMALL_SIZES if size < min(height, width)] + [(height, width)]
    if "probe_size" in graph_module.meta:
        sizes = [graph_module.meta["probe_size"]]
    holds_for = graph_module.meta["holds_for"] if graph_module.meta.get("decisions") else lambda images: True
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.rand(PROBE_BATCH, channels, *size, generator=generator).to(example.device)
        if size not in (sizes[-1], (height, width)) and not holds_for(images):
            continue
        try:
            with torch.no_grad():
                _Shapes(graph_module).run(images)
        except Exception as error:  # what a network raises on a size that does not fit is its author's choice
            if size == sizes[-1]:
                raise PruningError(
                    f"The network does not run on two images of {channels} x {height} x {width}: "
                    f"{tracing.first_sentence(error)}. Give an example of the size it was built for."
                ) from error
            continue
        graph_module.meta["probe_size"] = size
        return images
    raise AssertionError("the example's own size is always tried")


class _Tracer(tracing.ValueTracer):
    """Remembers in which attention module each operation stands."""

    def __init__(self, images: torch.Tensor | None, opens_attention: bool, follows_buffers: bool) -> None:
        super().__init__(images)
        self.proxy_buffer_attributes = follows_buffers
        self._opens_attention = opens_attention

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not self._opens_attention and is_attention(m):
            return True
        return isinstance(m, PrunedMultiheadAttention) or super().is_leaf_module(m, module_qualified_name)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        for path, _ in self.module_stack.values():
            if is_attention(self.root.get_submodule(path)):
                node.meta["attention"] = path
        return node


class _Shapes(fx.Interpreter):
    """Records the shape of every tensor; torch's ShapeProp would print a traceback for a size that does not fit."""

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        n.meta["number"] = result if isinstance(result, int) else None
        return result


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that `node` gave on the probe, or None when it is not one tensor."""
    return node.meta.get("shape")


def number_of(value: object) -> int | None:
    """A whole number written down, or the one that a node gave on the probe; None for anything else."""
    if isinstance(value, fx.Node):
        return value.meta.get("number")
    return value if isinstance(value, int) else None


def call_counts(graph_module: fx.GraphModule) -> Counter[str]:
    """How often the forward pass calls each module."""
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
