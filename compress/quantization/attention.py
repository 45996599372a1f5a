"""The graph that quantization starts from, with the projections of attention as Linear layers that it calls.

`nn.MultiheadAttention` and torchvision's window attention hand their weights to a function that multiplies by them, so
a graph sees no layer there and the larger part of a transformer's arithmetic would stay in floating point. Here they
are traced as projection, attention, projection; what lies between the projections multiplies activations with each
other and stays float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from compress import tracing
from compress.models import attention
from compress.models.attention import (
    PrunedMultiheadAttention,
    PrunedShiftedWindowAttention,
    PrunedShiftedWindowAttentionV2,
)
from compress.tracing.functional import make_functional
from compress.tracing.names import free_name

_PRODUCTS = (
    F.scaled_dot_product_attention, attention.attend_in_windows, operator.matmul, torch.einsum, torch.matmul, torch.bmm,
    "matmul", "bmm",
)  # fmt: skip


def trace(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of `model`, which is left with other attributes than before; every answer stays the same.

    Torch's attention is opened where it is called as `attention(x, x, x, need_weights=False)`; elsewhere it stays one
    module. Nothing in the graph works in place, as seen on `images`, [N, C, H, W] with at least two. Raises what
    `tracing.capture` raises, and `InPlaceError`.
    """
    projections: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if _is_packed(module):
            projections[name] = _add_projections(module)
        elif isinstance(module, ShiftedWindowAttentionV2) and module.qkv.bias is not None:
            module.qkv.bias.data = attention.without_key_bias(module.qkv.bias.data)
    graph_module = tracing.capture(model, images, partial(_Tracer, projections=projections)).graph_module
    called = {str(node.target) for node in graph_module.graph.nodes}
    for name, projection in projections.items():
        if f"{name}.{projection}".lstrip(".") not in called:
            delattr(model.get_submodule(name), projection)
    make_functional(graph_module, images[:2])
    _fold_constants(graph_module)
    return fx.GraphModule(graph_module, graph_module.graph, type(model).__name__)  # without what is no longer used


def products(graph_module: fx.GraphModule) -> dict[str, str]:
    """Name and type of each module that multiplies activations with each other; of the operation outside of any."""
    images = _computed_from_images(graph_module)
    kinds: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.target in _PRODUCTS and len(images.intersection(node.all_input_nodes)) > 1:
            stack: list[tuple[str, Any]] = list(node.meta.get("nn_module_stack", {}).values())
            name, kind = stack[-1] if stack else (node.name, "operation")
            kinds[name] = getattr(kind, "__name__", kind)
    return kinds


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Compute once what is the same for every image, such as position biases; not every runtime does.

    A result becomes a parameter of the module that computes it, so that training goes on with the result itself.
    """
    images, modules = _computed_from_images(graph_module), dict(graph_module.named_modules())
    constants = [node for node in graph_module.graph.nodes if node not in images]
    interpreter = fx.Interpreter(graph_module)
    with torch.no_grad():
        for node in constants:
            interpreter.env[node] = interpreter.run_node(node)
    for node in constants:
        value = interpreter.env[node]
        if node.op == "get_attr" or not isinstance(value, Tensor) or images.isdisjoint(node.users):
            continue
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        owner = next((path for path in reversed(paths) if path in modules), "")
        folded = nn.Parameter(value.clone(), requires_grad=value.is_floating_point())
        name = free_name(modules[owner], f"constant_{node.name}")
        modules[owner].register_parameter(name, folded)
        with graph_module.graph.inserting_before(node):
            constant = graph_module.graph.get_attr(f"{owner}.{name}".lstrip("."))
        node.replace_all_uses_with(constant)
    for node in reversed(constants):
        if not node.users and not node.is_impure():
            graph_module.graph.erase_node(node)


def _computed_from_images(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose result is another for other images."""
    computed: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output") or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
    return computed


class _Tracer(tracing.ValueTracer):
    """Opens attention; what cannot be opened stays one module, whether it has lost heads or not."""

    def __init__(self, images: Tensor | None, projections: Mapping[str, str]) -> None:
        super().__init__(images)
        self._projections = projections
        self._open: set[nn.Module] = set()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        opened = _OPENED.get(type(m))
        if isinstance(m, nn.MultiheadAttention):
            name = self._projections.get((self.submodule_paths or {}).get(m, ""))
            opened = partial(_open_multihead, name) if name and _is_self_attention(args, kwargs) else None
        if opened is None or self.is_evaluating:
            return super().call_module(m, forward, args, kwargs)
        self._open.add(m)
        answer = super().call_module(m, lambda x, *_, **__: opened(m, x), args, kwargs)
        self._open.remove(m)
        return answer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._open:
            return False
        return isinstance(m, PrunedMultiheadAttention) or super().is_leaf_module(m, module_qualified_name)


def _is_packed(module: nn.Module) -> bool:
    multihead = isinstance(module, nn.MultiheadAttention) and attention.is_attention(module)
    return multihead and attention.heads_of(module).refusal is None


def _is_self_attention(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    return len(args) == 3 and args[0] is args[1] is args[2] and kwargs == {"need_weights": False}


def _add_projections(module: nn.MultiheadAttention) -> str:
    """Plain Linear layers of the same parameters, and the first one's name; torch's `out_proj` is of a class of its own."""
    name = free_name(module, "in_proj")
    module.add_module(name, _linear(module.in_proj_weight, module.in_proj_bias))
    module.add_module("out_proj", _linear(module.out_proj.weight, module.out_proj.bias))
    return name


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, parameter in (("weight", weight), ("bias", bias)):
        setattr(linear, name, parameter)
    return linear.eval()


def _open_multihead(projection: str, module: nn.MultiheadAttention, query: Tensor) -> tuple[Tensor, None]:
    tokens = query if module.batch_first else query.transpose(0, 1)
    q, k, v = module.get_submodule(projection)(tokens).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    answer = module.out_proj(attended.transpose(1, 2).flatten(2))
    return answer if module.batch_first else answer.transpose(0, 1), None


def _open_window(module: ShiftedWindowAttention, x: Tensor) -> Tensor:
    place = module.window_size, module.shift_size
    packed = module.qkv(attention.window_tokens(x, *place))
    bias, logit_scale = module.get_relative_position_bias(), getattr(module, "logit_scale", None)
    attended = attention.attend_in_windows(x, packed, bias, logit_scale, place[0], module.num_heads, place[1])
    return attention.maps_of_windows(x, module.proj(attended), *place)


_OPENED: dict[type[nn.Module], Callable[[Any, Tensor], Any]] = {
    ShiftedWindowAttention: _open_window,
    ShiftedWindowAttentionV2: _open_window,
    PrunedShiftedWindowAttention: _open_window,
    PrunedShiftedWindowAttentionV2: _open_window,
}
