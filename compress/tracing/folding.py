"""BatchNorm in eval mode folded into the layer before it, as deployed files hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from compress import equality
from compress.errors import PruningError
from compress.report import Handoff
from compress.tracing import layer_type
from compress.tracing.graph import structure_copy, trace

_FOLDABLE: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    nn.Conv2d: (nn.BatchNorm2d, fuse_conv_bn_eval),
    nn.Linear: (nn.BatchNorm1d, fuse_linear_bn_eval),
}


def folded(model: nn.Module, images: Tensor) -> tuple[nn.Module, Handoff | None]:
    """A copy of `model`, in eval mode, with an identity in the place of each BatchNorm that could be folded, and its proof.

    It shares what was not changed with `model` and runs the same code. A model of which nobody can tell which layer a
    BatchNorm follows, and one whose code asks its BatchNorm for more than an answer, is returned as it is, without a row:
    folding saves time and changes no answer.

    Args:
        images: float32 [N, 3, H, W], normalised; the first few prove that the answers stay.

    Raises:
        HandoffError: the answers differ by more than 1e-4 of the largest logit.
    """
    try:
        copied = structure_copy(model).eval()
        graph_module = trace(structure_copy(model).eval(), images)  # the code that is traced may leave things behind
    except PruningError:
        return model, None
    pairs = [
        (layer, norm)
        for layer, norm in _pairs(graph_module)
        if not _has_other_name(copied, layer, norm) and _is_all(copied, graph_module, layer, norm)
    ]
    for layer, norm in pairs:
        copied.set_submodule(str(layer.target), _fused(graph_module, layer, norm))
        copied.set_submodule(str(norm.target), nn.Identity())
    shown = equality.few(images)
    expected = equality.answers(structure_copy(model).eval(), shown)
    try:
        got = equality.answers(copied, shown)
    except Exception:  # noqa: BLE001 - the model's own code, which looks for the BatchNorm that is gone
        return model, None
    return copied, equality.same_function("model, torch", "BatchNorm folded, torch", expected, got)


def fold(graph_module: fx.GraphModule) -> None:
    """Fold in place, and take the calls of BatchNorm out of the graph."""
    for layer, norm in list(_pairs(graph_module)):
        graph_module.set_submodule(str(layer.target), _fused(graph_module, layer, norm))
        norm.replace_all_uses_with(layer)
        graph_module.graph.erase_node(norm)
        holder = nn.Module()  # some hold their activation, which is called on
        holder._modules.update(graph_module.get_submodule(str(norm.target))._modules)
        graph_module.set_submodule(str(norm.target), holder)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _is_all(model: nn.Module, graph_module: fx.GraphModule, *nodes: fx.Node) -> bool:
    """Whether the modules do nothing but what the layers do that the graph has in their places, such as padding."""
    names = [str(node.target) for node in nodes]
    return all(layer_type(model.get_submodule(name)) is type(graph_module.get_submodule(name)) for name in names)


def _has_other_name(model: nn.Module, *nodes: fx.Node) -> bool:
    """Whether the model has one of these modules in two places: its code may call it by either name."""
    modules = [model.get_submodule(str(node.target)) for node in nodes]
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return any(names[id(module)] > 1 for module in modules)


def _pairs(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(layer, BatchNorm) where the BatchNorm alone reads the layer, and both are called once, and the model neither reads
    their tensors itself nor hooks anything to them."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in graph_module.graph.nodes if node.op == "get_attr"}
    calls = Counter(node.target for node in nodes)
    for norm in nodes:
        layer = norm.args[0] if norm.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) > 1:
            continue
        module, norm_module = (graph_module.get_submodule(str(node.target)) for node in (layer, norm))
        hooked = any(one._forward_hooks or one._forward_pre_hooks for one in (module, norm_module))
        if hooked or not read.isdisjoint((layer.target, norm.target)):
            continue
        norm_class, _ = _FOLDABLE.get(type(module), (None, None))
        once = calls[layer.target] == 1 and calls[norm.target] == 1
        if norm_class is not None and type(norm_module) is norm_class and once and norm_module.running_var is not None:
            yield layer, norm


def _fused(graph_module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> nn.Module:
    module, norm_module = (graph_module.get_submodule(str(node.target)) for node in (layer, norm))
    _, fuse = _FOLDABLE[type(module)]
    fused: nn.Module = fuse(module, norm_module)
    return fused
