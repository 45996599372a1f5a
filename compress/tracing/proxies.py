"""fx proxies of tensors and sizes that know an example.

They record operations as fx's proxies do, and answer what Python reads from them: of a tensor its shape, dtype and device, but
never its values; of a number that comes from a shape its value, and the tracer records that it was read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from compress.tracing.wording import Unhashable, Untraceable, current_place

if TYPE_CHECKING:
    from compress.tracing.tracer import ValueTracer

_COMPILED = "hands its input to compiled code that cannot be followed"
_SETS = "sets an attribute of a tensor"


class Sizes(tuple[Any, ...]):
    """A tensor's shape, each size a proxy of its own; torch's own class holds whole numbers only."""

    @property  # type: ignore[misc]  # typeshed has it writable, and isinstance only reads it
    def __class__(self) -> type:
        return torch.Size

    def numel(self) -> Any:
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return Sizes(item) if isinstance(index, slice) else item


class _AnsweringProxy(fx.Proxy):
    """A proxy whose tracer, which has the example values, answers what Python asks."""

    tracer: ValueTracer

    def __len__(self) -> int:
        return int(self.tracer.answer(self, len))

    def __iter__(self) -> Iterator[Any]:
        proxy: Any = self
        return (proxy[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.tracer.answer(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.answer(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, int))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, float))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.answer(self, lambda value: round(value, digits))

    def __contains__(self, item: object) -> bool:
        return bool(self.tracer.answer(self, lambda value: item in value))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return operator.floordiv(self, other), operator.mod(self, other)

    def __repr__(self) -> str:
        return f"<{self.node.name}>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class NumberProxy(_AnsweringProxy):
    """A size, or what was computed from sizes; also a device, which is another one when the model has moved."""

    @property
    def value(self) -> Any:
        return self.tracer.values[self.node]

    @property  # type: ignore[misc]  # typeshed has it writable, and isinstance only reads it
    def __class__(self) -> type:
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)

    def __hash__(self) -> int:
        """A number in a cache would be found again by another graph, or by the model itself."""
        raise Unhashable("looks something up by a size of its input, as a dictionary or a cache does", current_place())

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class TensorProxy(_AnsweringProxy, Tensor):  # type: ignore[misc]
    """A tensor without memory, so that torch's own code takes it for the tensor that it stands for."""

    node: fx.Node

    @staticmethod
    def of(value: Tensor, node: fx.Node, tracer: ValueTracer) -> TensorProxy:
        """A proxy with the shape, dtype and device of `value`, a fake tensor of any shape."""
        proxy: TensorProxy = Tensor._make_wrapper_subclass(
            TensorProxy, value.shape, dtype=value.dtype, device=value.device, requires_grad=False
        )
        proxy.node, proxy.tracer = node, tracer
        if isinstance(value, torch.nn.Parameter):
            proxy._is_param = True
        return proxy

    __hash__ = Tensor.__hash__

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("'Tensor' object is not callable")

    def __setitem__(self, index: object, item: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        name = getattr(orig_method, "__name__", "")
        if name == "__get__":
            return args[0].tracer.attribute(args[0], orig_method.__self__.__name__)
        if name in ("__set__", "__delete__"):
            raise Untraceable(_SETS, current_place())
        return super().__torch_function__(orig_method, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch declares it static
        raise Untraceable(_COMPILED, current_place())

    keys = None  # type: ignore[assignment]


def _in_place(name: str) -> Callable[[TensorProxy, Any], Any]:
    """`x += y` changes the tensor for everyone who holds it, and so it does in the graph."""
    function = getattr(operator, f"__i{name}__")

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {}, name)  # called as `x + y` is

    return method


def _recorded(name: str) -> Callable[..., Any]:
    """A method of tensors; torch's own parsing of its arguments would ask each size for its number."""

    def method(self: TensorProxy, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    return method


for _name in dir(Tensor):
    if not _name.startswith("_") and callable(getattr(Tensor, _name)):
        setattr(TensorProxy, _name, _recorded(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(TensorProxy, f"__i{_name}__", _in_place(_name))


class PlainProxy(fx.Proxy):
    """Without an example nothing can be answered."""

    tracer: ValueTracer

    def __len__(self) -> int:
        return int(self.tracer.answer(self, len))
