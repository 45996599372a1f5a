"""Turn a float classifier into a graph that says where an integer kernel reads a tensor.

The result is an `fx.GraphModule` that computes what the model computed in eval mode, and is proved to: nothing works in
place, BatchNorm is folded into the layer before it, dropout is gone, and a `QPoint` (an identity) stands on every tensor
that integer kernels exchange. Points are set per tensor, not per module, so that one ReLU module called ten times gets
ten of them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from compress import equality, tracing
from compress.errors import CompressError, QuantizationError
from compress.quantization import attention
from compress.quantization.kinds import FLOAT_LAYERS, LAYERS, OWN_READS, SHAPE, QPoint, first_operand, kind, makes_list
from compress.quantization.placement import insert_points
from compress.tracing.folding import fold

PROOFS = "proofs"
"""Key of the graph module's meta: the comparisons with the model that `prepare` made, as `compress.equality` keeps them."""
_USUAL_SIZES = (64, 32, 96, 128, 160, 192, 224, 256, 299, 384, 512, *range(16, 256, 4))


def prepare(
    model: nn.Module, images: Tensor | None = None, *, keep_float: frozenset[str] = frozenset()
) -> fx.GraphModule:
    """A copy of `model`, folded and with its quantization points; eval mode, input and output unchanged.

    Layers named in `keep_float` are no integer kernels: no point stands on what only they read or write.

    Args:
        images: float32 [N, C, H, W], normalised; the first few prove that the graph is the model. Without them random ones
            of a size that the model takes do.

    Raises:
        QuantizationError: the model cannot be traced or has nothing to quantize.
        HandoffError: a form of it answers differently from the one before it, by more than 1e-4 of the largest logit.
    """
    original = copy.deepcopy(model).eval()
    shown = _usual_images(original) if images is None else equality.few(images)
    proof = equality.Proof(original, shown)
    graph_module = _trace(copy.deepcopy(original), shown)
    proof.compare("traced graph, torch", graph_module)
    _drop_dropout(graph_module)
    fold(graph_module)  # Jacob et al. 2018, section 3.2: weights are quantized as the deployed file holds them
    proof.compare("folded graph, torch", graph_module)
    graph_module.meta[FLOAT_LAYERS] = keep_float
    graph_module.meta[OWN_READS] = frozenset(_own_reads(graph_module))
    _record_shapes(graph_module, shown)
    if images is not None:
        _drop_idle_slices(graph_module)
    insert_points(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    if not quantization_points(graph_module):
        raise QuantizationError(
            f"{type(model).__name__} has no Conv2d or Linear layer that it calls as a module, so there is nothing to "
            "quantize; choose 16 or 32 bits instead."
        )
    proof.compare("prepared graph, torch", graph_module)
    graph_module.meta[PROOFS] = tuple(proof.rows)
    return graph_module


def quantized_layers(prepared: fx.GraphModule) -> tuple[str, ...]:
    """Names of the Conv2d and Linear layers whose weights become integers, in execution order."""
    names = (str(node.target) for node in prepared.graph.nodes if kind(node, prepared) in LAYERS)
    return tuple(dict.fromkeys(names))


def quantization_points(prepared: nn.Module) -> dict[str, QPoint]:
    """Every `QPoint` by its name in the graph."""
    return {name: module for name, module in prepared.named_modules() if isinstance(module, QPoint)}


def left_float(prepared: fx.GraphModule) -> list[dict[str, str]]:
    """The parts with weights, and the attention, that stay in floating point: `layer`, `type`, and `reason` in a user's
    words."""
    integer, products = set(quantized_layers(prepared)), attention.products(prepared)
    parts = [{"layer": name, "type": of, "reason": _PRODUCT} for name, of in products.items()]
    for name, module in prepared.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        inside = any(name.startswith(parent + ".") and isinstance(prepared.get_submodule(parent), nn.MultiheadAttention)
                     for parent in _parents(name))  # fmt: skip
        if not own or name in integer or name in products or inside:
            continue
        if type(module) is nn.Module or module is prepared:  # what tracing leaves of a module: its learned constants
            parts += [
                {"layer": f"{name}.{key}".lstrip("."), "type": "Parameter", "reason": _LEARNED_CONSTANT} for key in own
            ]
        else:
            parts.append({"layer": name, "type": type(module).__name__, "reason": _why_float(name, prepared)})
    return parts


_PRODUCT = "attention multiplies activations with each other, which stays in floating point"
_LEARNED_CONSTANT = "a learned constant is added or multiplied in floating point"


def readers_of(prepared: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """The layers that read each quantization point's integers, directly or through pools and reshapes."""
    readers = {}
    for node in prepared.graph.nodes:
        if kind(node, prepared) == "point":
            readers[str(node.target)] = tuple(dict.fromkeys(_layers_behind(node, prepared)))
    return readers


def _layers_behind(node: fx.Node, prepared: fx.GraphModule) -> Iterator[str]:
    for user in node.users:
        operation = kind(user, prepared)
        if operation in LAYERS:
            yield str(user.target)
        elif operation in ("maxpool", "shape"):
            yield from _layers_behind(user, prepared)


def _parents(name: str) -> Iterator[str]:
    pieces = name.split(".")
    return (".".join(pieces[:i]) for i in range(1, len(pieces)))


def _why_float(name: str, prepared: fx.GraphModule) -> str:
    module = prepared.get_submodule(name)
    if name in prepared.meta.get(FLOAT_LAYERS, ()):
        return "it is kept in floating point, as asked"
    if isinstance(module, nn.MultiheadAttention):
        return _PRODUCT
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "this BatchNorm does not follow a convolution directly, so it cannot be folded into one"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return "normalisation computes its statistics from each image and needs floating point"
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return "the model reads this layer's weights itself, so they cannot be integers that only the layer knows"
    return f"there is no integer kernel for {type(module).__name__}"


def _trace(model: nn.Module, images: Tensor) -> fx.GraphModule:
    try:
        return attention.trace(model, images)
    except CompressError as error:
        raise QuantizationError(f"{type(model).__name__} cannot be quantized: {error}") from error
    except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
        raise QuantizationError(tracing.explain(error, model, images)) from error


def _usual_images(model: nn.Module) -> Tensor:
    """Two random images of the first usual size that `model`, in eval mode, takes; or two rows of numbers."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    convolution = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else 3
    shapes: list[tuple[int, ...]] = [(channels, size, size) for size in _USUAL_SIZES]
    shapes += [(layer.in_features,) for layer in layers[:1] if isinstance(layer, nn.Linear)]
    tried, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for shape in shapes:
        images = torch.randn(2, *shape, generator=generator)
        try:
            equality.answers(tried, images)
        except Exception:  # noqa: BLE001, S112 - what a network raises on a size that does not fit is its author's choice
            continue
        return images
    raise QuantizationError(
        f"{type(model).__name__} does not run on images of a usual size (16 to 512 pixels, {channels} channels); "
        "give some of its own with `prepare(model, images)`."
    )


def _drop_dropout(graph_module: fx.GraphModule) -> None:
    """Take out what does nothing in eval mode."""
    for node in list(graph_module.graph.nodes):
        if kind(node, graph_module) == "dropped":
            _pass_through(graph_module, node, node.all_input_nodes[0])


def _pass_through(graph_module: fx.GraphModule, node: fx.Node, value: fx.Node) -> None:
    node.replace_all_uses_with(value)
    graph_module.graph.erase_node(node)


def _own_reads(graph_module: fx.GraphModule) -> Iterator[str]:
    """Layers of which the model also reads a tensor itself."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            yield str(node.target).rpartition(".")[0]


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        n.meta[SHAPE] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


def _record_shapes(graph_module: fx.GraphModule, images: Tensor) -> None:
    with torch.no_grad():
        _Shapes(graph_module).run(images[:2])


def _drop_idle_slices(graph_module: fx.GraphModule) -> None:
    """Take out slices that keep everything, such as the first 64 of 64 channels: OpenVINO ends the process when one
    follows a concatenation of integers."""
    for node in list(graph_module.graph.nodes):
        source = _sliced(node)
        if source is not None and source.meta[SHAPE] is not None and source.meta[SHAPE] == node.meta[SHAPE]:
            _pass_through(graph_module, node, source)
    for node in reversed(list(graph_module.graph.nodes)):
        if makes_list(node) and not node.users:
            graph_module.graph.erase_node(node)


def _sliced(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` takes a part of, along any axis but the batch's, whose length is not known."""
    if node.target in (torch.narrow, "narrow"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return node.args[0] if dim != 0 and isinstance(node.args[0], fx.Node) else None
    if node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if makes_list(source):
        dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
        return first_operand(source) if dim != 0 and source.args else None
    parts = index if isinstance(index, tuple) else (index,)
    slices = all(part is ... or isinstance(part, slice) for part in parts)
    return source if slices and parts and parts[0] in (..., slice(None)) else None
