"""fx's tracer with example values: whatever Python reads from a tensor or a size while tracing is that of the example."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx import _symbolic_trace
from torch.utils import _pytree

from compress.tracing.layers import as_layer, buffers_kept, is_torch_layer
from compress.tracing.own_layers import OwnLayers
from compress.tracing.proxies import NumberProxy, PlainProxy, Sizes, TensorProxy
from compress.tracing.wording import Decision, Untraceable, current_place

BY_VALUES = "chooses its way by the values of its input"
_OF_VALUES = (
    "makes a tensor whose size depends on the values of its input, as nonzero() and masks do, so that no two images need "
    "take the same way"
)
_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros",
)  # fmt: skip
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_WITHOUT_EXAMPLE = (
    "decides in Python about what it computes from its input, and no example image was given to decide by"
)
_ONE_AT_A_TIME = threading.RLock()
"""torch.fx patches torch.nn.Module while it traces; two threads that undo it in another order leave the patch behind."""


class ValueTracer(fx.Tracer):
    """Traces a module for a batch of images; without one, a module that reads no sizes in Python.

    Attributes:
        decisions: what Python read from sizes, in order.
        own: modules to put in the place of the model's own, by name.
    """

    def __init__(self, images: Tensor | None) -> None:
        super().__init__()
        self._images = images
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._twins: dict[int, nn.Module] = {}
        self._memo: dict[int, Tensor] = {}
        self._evaluates, self._thread = False, threading.get_ident()
        self.values: dict[fx.Node, Any] = {}
        self.decisions: list[Decision] = []
        self.own = OwnLayers()

    @property
    def is_evaluating(self) -> bool:
        """Whether a call is none of the traced model's: an example is being computed, or another thread calls a module.

        While torch.fx traces, the calls of every module of the process arrive here.
        """
        return self._evaluates or threading.get_ident() != self._thread

    @is_evaluating.setter
    def is_evaluating(self, evaluates: bool) -> None:
        self._evaluates = evaluates

    def trace_root(self, root: nn.Module) -> fx.Graph:
        """Raises `Untraceable`, and what the model's own code raises."""
        if self._images is not None:
            self._memo = {id(tensor): self._as_fake(tensor) for tensor in chain(root.parameters(), root.buffers())}
        with _ONE_AT_A_TIME, buffers_kept(root), _factories_traced(self), _quiet():
            graph = self.trace(root)
        self._erase_unused(graph)
        return graph

    # -- the model's code ------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone: every other argument of the forward pass keeps its default. The root's hooks run, too."""
        names = [name for name in inspect.signature(self.root.forward).parameters if name.isidentifier()]
        node = self.create_node("placeholder", names[0] if names else "images", (), {})
        self.values[node] = None if self._images is None else self._as_fake(self._images)
        return _symbolic_trace._orig_module_call, [self.root, self.proxy(node)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self._images is None:
            return PlainProxy(node, self)
        value = self._value(node)
        return TensorProxy.of(value, node, self) if isinstance(value, Tensor) else NumberProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_torch_layer(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_evaluating:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}):
            if any(True for _ in chain(m.parameters(), m.buffers())):
                raise Untraceable(
                    f"calls a {type(m).__name__} that it keeps where torch does not find it (a plain list or dictionary, "
                    "or a module made while it runs), so that it would be neither trained nor saved; keep it in an "
                    "nn.ModuleList or an attribute of its own",
                    current_place(),
                )
            return forward(*args, **kwargs)
        with self.own.inside(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.is_evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    # -- recording -------------------------------------------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        return super().create_arg(tuple(a) if type(a) is Sizes else a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_function" and (call := self.own.call(target, args, kwargs)) is not None:
            kind, target, args, kwargs, rest, named = "call_module", call[0], (call[1],), {}, (), {}
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if self._images is None:
            return proxy
        return self._recorded(proxy, self.values[proxy.node])

    def _recorded(self, proxy: fx.Proxy, value: Any) -> Any:
        """A proxy for a tensor or a number, a tuple of them for several; what else there is needs no proxy."""
        target = proxy.node.target
        if target in _COMPARISONS and isinstance(value, bool):
            self._note(value)
        if isinstance(value, tuple | list):
            get = partial(self.create_proxy, "call_function", operator.getitem, kwargs={})
            return _like(value, [get(args=(proxy, index)) for index in range(len(value))])
        is_number = type(value) in (int, float) and not _asks_for_rank(proxy.node)
        return proxy if is_number or isinstance(value, Tensor | torch.device) else value

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        place = current_place() if kind in ("call_function", "call_method") else None
        if place is not None:
            node.meta["source"], node.meta["place"] = place.short, place
        return node

    # -- example values --------------------------------------------------------------------------------------------

    def answer(self, proxy: fx.Proxy, question: Callable[[Any], Any]) -> Any:
        """`question` of the example value; raises `Untraceable` where the answer depends on the values of a tensor."""
        if self._images is None:
            raise Untraceable(_WITHOUT_EXAMPLE, current_place())
        value = self.values[proxy.node]
        if isinstance(value, Tensor) and question is not len:
            raise Untraceable(BY_VALUES, current_place())
        answer = question(value)
        self._note(answer)
        return answer

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter(range(self.answer(obj, len)))

    def attribute(self, proxy: fx.Proxy, name: str) -> Any:
        """`proxy.name`, of a tensor never a method, of a number or a device perhaps."""
        attribute = self._attribute_of(self.values[proxy.node], name)
        if callable(attribute) and not isinstance(attribute, type):
            return fx.proxy.Attribute(proxy, name)
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def _attribute_of(self, value: Any, name: str) -> Any:
        with self._evaluation():
            return operator.attrgetter(name)(value)

    def _note(self, answer: object) -> None:
        place = current_place()
        if place is not None:
            self.decisions.append(Decision(place, answer))

    def _value(self, node: fx.Node) -> Any:
        """What `node` gives for the example; tensors without their values."""
        if node not in self.values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            self.values[node] = self._evaluated(node, args, kwargs)
        return self.values[node]

    def _evaluated(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr":
            value = self._attribute_of(self.root, str(node.target))
            return self._memo.get(id(value), self._as_fake(value)) if isinstance(value, Tensor) else value
        try:
            with self._evaluation():
                return self._called(node, self._twin)(*args, **kwargs)
        except DataDependentOutputException:
            raise Untraceable(BY_VALUES, current_place()) from None
        except DynamicOutputShapeException:
            raise Untraceable(_OF_VALUES, current_place()) from None
        except (UnsupportedFakeTensorException, UnsupportedOperatorException, NotImplementedError):
            return self._evaluated_for_real(node, args, kwargs)

    def _evaluated_for_real(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """An operation of which torch does not know the result's shape beforehand is run on zeros."""

        def real(value: Any) -> Any:
            if isinstance(value, FakeTensor):
                return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            return value

        args, kwargs = _pytree.tree_map(real, (args, dict(kwargs)))
        self.is_evaluating = True
        try:
            with torch.no_grad():
                result = self._called(node, lambda module: module)(*args, **kwargs)
        finally:
            self.is_evaluating = False
        return _pytree.tree_map(lambda one: self._as_fake(one) if isinstance(one, Tensor) else one, result)

    def _called(self, node: fx.Node, module: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
        if node.op == "call_module":
            name = str(node.target)
            return module(self.own.layers.get(name) or self.root.get_submodule(name))
        if node.op == "call_method":
            return lambda self_, *args, **kwargs: getattr(self_, str(node.target))(*args, **kwargs)
        return node.target  # type: ignore[return-value]

    def _twin(self, module: nn.Module) -> nn.Module:
        """A copy of a layer whose tensors have no values."""
        if id(module) not in self._twins:
            self._twins[id(module)] = twin = as_layer(module, type(module))
            stores: tuple[dict[str, Any], ...] = (twin._parameters, twin._buffers)
            for tensors in stores:
                for key, tensor in tensors.items():
                    tensors[key] = self._memo.get(id(tensor), tensor)
            twin._modules.update({key: self._twin(child) for key, child in twin._modules.items() if child is not None})
        return self._twins[id(module)]

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        before, self.is_evaluating = self.is_evaluating, True
        try:
            with self._fake, torch.no_grad():
                yield
        finally:
            self.is_evaluating = before

    def _erase_unused(self, graph: fx.Graph) -> None:
        """What only answered a question: numbers, attributes, parameters that became a layer's."""
        for node in reversed(graph.nodes):
            if node.users or node.op in ("placeholder", "output", "call_module"):
                continue
            if node.op == "get_attr" or node.target in (getattr, operator.getitem) or self._only_tells(node):
                graph.erase_node(node)

    def _only_tells(self, node: fx.Node) -> bool:
        """Whether it computes a number, and does nothing else."""
        value = self.values.get(node)
        leaves = _pytree.tree_leaves(value)
        if value is None or any(isinstance(leaf, Tensor) for leaf in leaves):
            return False
        return node.op == "call_method" or getattr(node.target, "__module__", "") in ("_operator", "math")


def _asks_for_rank(node: fx.Node) -> bool:
    """How many dimensions a tensor has is no matter of sizes."""
    return node.target in ("dim", "ndimension") or (node.target is getattr and str(node.args[1]) == "ndim")


def _like(value: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    if isinstance(value, torch.Size):
        return Sizes(items)
    if isinstance(value, list):
        return items
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return tuple(items) if type(value) is tuple else type(value)(items)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of sizes that do not fit: they are raised as well, and the caller reports them."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextlib.contextmanager
def _factories_traced(tracer: ValueTracer) -> Iterator[None]:
    """torch's makers of tensors, whose own parsing of arguments takes no proxies for sizes, and what fx.wrap names."""

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            leaves = _pytree.tree_leaves((args, kwargs))
            if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return make

    makers: dict[str, Any] = {name: traced(getattr(torch, name)) for name in _FACTORIES}
    with mock.patch.multiple(torch, **makers), mock.patch.object(_symbolic_trace, "_create_wrapped_func", traced):
        yield
