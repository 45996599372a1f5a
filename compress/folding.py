"""BatchNorm in eval mode folded into the layer before it, as deployed files hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from compress.errors import PruningError
from compress.pruning.trace import structure_copy, trace

_FOLDABLE = {nn.Conv2d: (nn.BatchNorm2d, fuse_conv_bn_eval), nn.Linear: (nn.BatchNorm1d, fuse_linear_bn_eval)}


def folded(model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode, with an identity in the place of each BatchNorm that could be folded.

    It shares what was not changed with `model` and runs the same code. A model that torch.fx cannot trace, where nobody
    can tell which layer a BatchNorm follows, is returned as it is: folding saves time and changes no answer.
    """
    try:
        copied = structure_copy(model).eval()
        graph_module = trace(copied)
    except PruningError:
        return model
    for layer, norm in _pairs(graph_module):
        copied.set_submodule(str(layer.target), _fused(graph_module, layer, norm))
        copied.set_submodule(str(norm.target), nn.Identity())
    return copied


def fold(graph_module: fx.GraphModule) -> None:
    """Fold in place, and take the calls of BatchNorm out of the graph."""
    for layer, norm in list(_pairs(graph_module)):
        graph_module.set_submodule(str(layer.target), _fused(graph_module, layer, norm))
        norm.replace_all_uses_with(layer)
        graph_module.graph.erase_node(norm)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _pairs(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(layer, BatchNorm) where the BatchNorm alone reads the layer, and both are called once."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    for norm in nodes:
        layer = norm.args[0] if norm.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) > 1:
            continue
        module, norm_module = (graph_module.get_submodule(str(node.target)) for node in (layer, norm))
        norm_class, _ = _FOLDABLE.get(type(module), (None, None))
        once = calls[layer.target] == 1 and calls[norm.target] == 1
        if norm_class is not None and type(norm_module) is norm_class and once and norm_module.running_var is not None:
            yield layer, norm


def _fused(graph_module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> nn.Module:
    module, norm_module = (graph_module.get_submodule(str(node.target)) for node in (layer, norm))
    _, fuse = _FOLDABLE[type(module)]
    return fuse(module, norm_module)
