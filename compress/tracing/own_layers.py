"""Layers whose subclass wrote its own forward pass, recognised by what they hand to torch's functions.

`class SamePad(nn.Conv2d)` pads and then calls `F.conv2d(x, self.weight, ...)`; a BatchNorm with its activation calls
`F.batch_norm` with its own statistics. Such a call is that layer: it becomes the call of a plain layer with the same
tensors, which can be pruned and quantized like any other.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.tracing.layers import as_layer, torch_base

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.conv2d: (nn.Conv2d, _CONV),
    F.linear: (nn.Linear, ("input", "weight", "bias")),
    F.batch_norm: (
        _BatchNorm,
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    F.layer_norm: (nn.LayerNorm, ("input", "normalized_shape", "weight", "bias", "eps")),
    F.group_norm: (nn.GroupNorm, ("input", "num_groups", "weight", "bias", "eps")),
}
_DEFAULTS: dict[Any, dict[str, Any]] = {
    F.conv2d: {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    F.linear: {"bias": None},
    F.batch_norm: {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    F.layer_norm: {"weight": None, "bias": None, "eps": 1e-5},
    F.group_norm: {"weight": None, "bias": None, "eps": 1e-5},
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class OwnLayers:
    """Which module's forward pass is being traced, and the plain layers recognised in it (`layers`), by the module's name."""

    def __init__(self) -> None:
        self._stack: list[tuple[nn.Module, str]] = []
        self.layers: dict[str, nn.Module] = {}

    @contextlib.contextmanager
    def inside(self, module: nn.Module, name: str) -> Iterator[None]:
        self._stack.append((module, name))
        try:
            yield
        finally:
            self._stack.pop()

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, Any] | None:
        """(name, input) of the layer that this call is; None for any other call."""
        if function not in _SIGNATURES or not self._stack:
            return None
        (module, name), (kind, names) = self._stack[-1], _SIGNATURES[function]
        base = torch_base(type(module))
        if not issubclass(base, kind) or base is type(module):
            return None
        arguments = _DEFAULTS[function] | dict(zip(names, args, strict=False)) | dict(kwargs)
        if not all(_is_own(arguments[key], module, name, key) for key in _TENSORS if key in arguments):
            return None
        settings = _settings(base, arguments)
        if settings is None or not isinstance(arguments.get("input"), fx.Proxy):
            return None
        if name in self.layers:
            same = all(getattr(self.layers[name], key) == value for key, value in settings.items())
            return (name, arguments["input"]) if same else None
        self.layers[name] = as_layer(module, base, **settings)
        return name, arguments["input"]


def _is_own(value: Any, module: nn.Module, name: str, key: str) -> bool:
    """Whether a tensor is the module's own one of that name, and not one computed from it."""
    own = module._parameters.get(key, module._buffers.get(key))
    if not isinstance(value, fx.Proxy):
        return value is own
    node = value.node
    return own is not None and node.op == "get_attr" and node.target == f"{name}.{key}".lstrip(".")


def _settings(base: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The attributes of a plain layer that calls the function as it was called; None where no layer would."""
    if issubclass(base, _BatchNorm):
        if arguments["training"] or arguments["running_mean"] is None:
            return None
        return {"eps": float(arguments["eps"]), "training": False}
    if base is nn.LayerNorm:
        return {"eps": arguments["eps"], "normalized_shape": tuple(arguments["normalized_shape"])}
    if base is nn.GroupNorm:
        return {"eps": arguments["eps"], "num_groups": arguments["num_groups"]}
    if base is nn.Linear:
        return {}
    settings = {key: _pair(arguments[key]) for key in ("stride", "padding", "dilation")} | {
        "groups": arguments["groups"]
    }
    if any(value is None for value in settings.values()):
        return None
    return settings | {"padding_mode": "zeros"}


def _pair(value: Any) -> Any:
    """Two whole numbers, or the word for a padding; None for a size that is only known while the model runs."""
    if isinstance(value, str):
        return value
    items = (value, value) if isinstance(value, int) else tuple(value)
    items = items * 2 if len(items) == 1 else items
    if any(isinstance(item, fx.Proxy) for item in items):
        return None
    return tuple(operator.index(item) for item in items)
