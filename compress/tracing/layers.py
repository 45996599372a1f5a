"""Which of torch's layers a module computes: people subclass Conv2d and BatchNorm2d, often without changing anything."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_FREE = frozenset({
    "__init__", "__repr__", "__str__", "__doc__", "__module__", "__qualname__", "__annotations__", "__constants__",
    "__dict__", "__weakref__", "__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__",
    "__jit_unused_properties__", "extra_repr", "reset_parameters", "reset_running_stats", "_load_from_state_dict",
    "_save_to_state_dict", "_version", "_get_name", "__setstate__", "__getstate__", "train", "eval",
})  # fmt: skip
"""What a subclass may redefine and still compute the same."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def torch_base(kind: type[nn.Module]) -> type[nn.Module]:
    """The nearest class of torch that `kind` is or inherits from; `nn.Module` for a module of the user's own."""
    return next(base for base in kind.__mro__ if base.__module__.startswith(("torch.nn", "torch.ao.nn")))


def type_name(module: nn.Module) -> str:
    """What a config list calls a module: torch's name for its own layers and what inherits from them."""
    base = torch_base(type(module))
    return (type(module) if base is nn.Module else base).__name__


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The class of torch whose arithmetic `module` does, though its own class may be a subclass; else its own class.

    `class Conv(nn.Conv2d): pass` computes a Conv2d. A subclass with a forward pass of its own does not.
    """
    kind: type[nn.Module] = type(module)
    return kind if "forward" in vars(module) else _layer_type(kind)  # type: ignore[arg-type]  # mypy takes __hash__ of instances


@functools.cache
def _layer_type(kind: type[nn.Module]) -> type[nn.Module]:
    base = torch_base(kind)
    theirs = {name for parent in base.__mro__ if parent is not object for name in (*vars(parent), *_annotated(parent))}
    theirs |= {"weight", "bias", "running_mean", "running_var"}
    for subclass in kind.__mro__[: kind.__mro__.index(base)]:
        if (theirs & set(vars(subclass))) - _FREE:
            return kind
    return base


def _annotated(kind: type) -> dict[str, Any]:
    """A subclass may compute its `weight` in a property, where torch's class only declares that it has one."""
    annotations: dict[str, Any] = kind.__dict__.get("__annotations__", {})
    return annotations


def is_torch_layer(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own layers, with nothing changed: what a graph calls as a whole."""
    kind = layer_type(module)
    return kind is not nn.Module and torch_base(kind) is kind and not issubclass(kind, _CONTAINERS)


def as_layer(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> nn.Module:
    """A `kind` with the very parameters, buffers, modules and hooks of `module`, and some attributes of its own."""
    twin = kind.__new__(kind)
    twin.__dict__ = {
        key: value.copy() if key in ("_parameters", "_buffers", "_modules") else value
        for key, value in module.__dict__.items()
    }
    twin.__dict__.update(attributes)
    return twin


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` may run and count its calls, as some do; then its buffers are as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
