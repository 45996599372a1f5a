"""From a user's module to a torch.fx graph, with the user's own source line in every message."""

from __future__ import annotations

import copy
import os
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import fx, nn

from ..attention import PrunedMultiheadAttention, heads_of, is_attention
from ..errors import PruningError

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_LIBRARIES = tuple({f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")})
_SMALL_SIZES = (32, 64, 96, 128, 160, 192)
PROBE_BATCH = 2
"""Images in a probe: two are enough to tell a channel that varies from one that is constant."""


def trace(model: nn.Module, *, opens_attention: bool = True) -> fx.GraphModule:
    """Trace `model`, in the train/eval mode it is in, with torch.fx.

    Without `opens_attention` every attention is one node, so that graphs before and after it lost heads have the same.

    The graph module shares the modules of `model`. Each function or method call carries `meta["source"]`, the
    user's function, file and line; what is called inside an attention module carries its name as `meta["attention"]`,
    and the graph module's `meta["attentions"]` has the heads of each.

    Raises:
        PruningError: the forward pass cannot be traced; names the reason and the line.
    """
    tracer = _Tracer(opens_attention)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} cannot be traced by torch.fx: {_first_sentence(error)} at {_user_line(error)}. "
            "Rewrite that line without control flow on tensors, or wrap it with torch.fx.wrap."
        ) from error
    _unpack_named_tuple(graph)
    graph_module = fx.GraphModule(tracer.root, graph, type(model).__name__)
    attentions = {node.meta["attention"] for node in graph.nodes if "attention" in node.meta}
    graph_module.meta["attentions"] = {name: heads_of(tracer.root.get_submodule(name)) for name in attentions}
    return graph_module


def _unpack_named_tuple(graph: fx.Graph) -> None:
    """Let the graph give the fields themselves: auxiliary heads are usually answered in a named tuple."""
    output = next(node for node in graph.nodes if node.op == "output")
    answer = output.args[0]
    if isinstance(answer, fx.Node) and isinstance(answer.target, type) and issubclass(answer.target, tuple):
        output.args = (tuple(answer.args),)
        graph.erase_node(answer)


def structure_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but share its tensors: for reading, and for replacing layers one by one."""
    tensors = chain(model.parameters(), model.buffers())
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} cannot be copied: {_first_sentence(error)}. Pruning works on "
            "a copy, so copy.deepcopy(model) has to work."
        ) from error


def traced_copy(model: nn.Module) -> fx.GraphModule:
    """Trace a structure copy of `model` in eval mode, with auxiliary heads, which only training uses, as more outputs.

    Auxiliary heads read channels that may be pruned, so they have to be in the graph. A module asks its own `training`
    flag whether to call them: the graph is traced with that flag set in the modules around them, and in these alone, so
    that BatchNorm and dropout behave as in eval mode. `meta["training"]` holds their names; see `set_traced_mode`.

    Raises:
        PruningError: untraceable, or training takes another way through the network than evaluation.
    """
    graph_module = trace(structure_copy(model).eval())
    unused = unused_modules(graph_module, model)
    heads = unused - unused_modules(trace(structure_copy(model).train()), model) if unused else set()
    if not heads:
        return graph_module
    around = _modules_around(heads, model)
    graph_module = trace(set_traced_mode(structure_copy(model), around))
    graph_module.meta["training"] = around
    missing = unused_modules(graph_module, model) - (unused - heads)
    if missing:
        raise PruningError(
            f"{type(model).__name__} uses {min(heads)} in training only, and not beside the layers that evaluation uses "
            f"({min(missing)} is left out), so it would no longer fit the pruned ones. Build the model without it, or "
            "in the form in which it is deployed, and try again."
        )
    return graph_module


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
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        images = torch.rand(PROBE_BATCH, channels, *size, generator=generator).to(example.device)
        try:
            with torch.no_grad():
                _Shapes(graph_module).run(images)
        except Exception as error:  # what a network raises on a size that does not fit is its author's choice
            if size == sizes[-1]:
                raise PruningError(
                    f"The network does not run on two images of {channels} x {height} x {width}: "
                    f"{_first_sentence(error)}. Give an example of the size it was built for."
                ) from error
            continue
        return images
    raise AssertionError("the example's own size is always tried")


class _Tracer(fx.Tracer):
    """fx's tracer, remembering where in the user's code each operation stands, and in which attention module."""

    def __init__(self, opens_attention: bool) -> None:
        super().__init__()
        self._opens_attention = opens_attention

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not self._opens_attention and is_attention(m):
            return True
        return isinstance(m, PrunedMultiheadAttention) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):  # type: ignore[no-untyped-def]
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frame = frame.f_back
        if frame is not None and kind in ("call_function", "call_method"):
            code = frame.f_code
            node.meta["source"] = f"{code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"
        for path, _ in self.module_stack.values():
            if is_attention(self.root.get_submodule(path)):
                node.meta["attention"] = path
        return node


class _Shapes(fx.Interpreter):
    """Records the shape of every tensor; torch's ShapeProp would print a traceback for a size that does not fit."""

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        return result


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the tensor that `node` gave on the probe, or None when it is not one tensor."""
    return node.meta.get("shape")


def call_counts(graph_module: fx.GraphModule) -> Counter[str]:
    """How often the forward pass calls each module."""
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _user_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    callers = [frame for frame in frames if not frame.filename.startswith((_TORCH, __file__))]
    own = [frame for frame in callers if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or callers or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: `{frame.line}`"
