"""Checks of a module's tensors (real, finite, floating point) and their conversion to float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compress.errors import RequestError

_FLOAT_ALSO = ("FloatFunctional", "QuantStub", "DeQuantStub", "QuantWrapper")
"""Classes of torch.ao that do nothing in a float model."""
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_plain(model: nn.Module) -> None:
    """Refuse a module whose tensors are not plain, real and finite.

    Raises:
        RequestError: quantized layers, tensors without values, whole or complex numbers, NaN or infinity; names the first.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.ao.", "torchao.")) and kind.__name__ not in _FLOAT_ALSO:
            raise _refused(
                model,
                f"a module in floating point, and its `{name}` is a {kind.__name__} of {kind.__module__.split('.')[0]}'s "
                "quantization: give the module as it was before that, for Espalier quantizes by itself",
            )
    parameters = {id(tensor) for tensor in model.parameters()}
    for name, tensor in _named_tensors(model):
        if fault := _fault(tensor, id(tensor) in parameters):
            raise _refused(model, fault.format(name=f"`{name}`"))


def to_float32(model: nn.Module) -> list[str]:
    """Convert every floating-point tensor of `model`, plain attributes too, and move it to the CPU; returns notes on what that changed."""
    tensors = [tensor for _, tensor in _named_tensors(model)] + [value for _, _, value in _attributes(model)]
    formats = sorted(
        {str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()} - {"float32"}
    )
    devices = sorted({str(one.device) for one in tensors} - {"cpu"})
    model.to("cpu").float()
    for module, key, value in list(_attributes(model)):
        vars(module)[key] = value.to("cpu").float() if value.is_floating_point() else value.to("cpu")
    notes = [f"The module was on {' and '.join(devices)}; a copy on the CPU is used."] if devices else []
    if formats:
        notes.append(f"The module has {' and '.join(formats)} tensors; everything is computed in float32.")
    return notes


def _fault(tensor: Tensor, is_parameter: bool) -> str | None:
    """What is wrong with a tensor, as the end of a sentence with a place for its {name}."""
    if is_lazy(tensor):
        return (
            "a module whose layers have their sizes, and {name} is not initialised yet: call the module once on images "
            "[1, 3, size, size], load its weights, and give it then"
        )
    if tensor.is_meta:
        return (
            "a module with values in its tensors, and {name} is on the meta device: load its weights on the CPU first"
        )
    if is_traceable_wrapper_subclass(tensor):
        return (
            f"a module of plain tensors, and {{name}} is a {type(tensor).__name__}: give the module as it was before it was "
            "split or quantized"
        )
    if tensor.is_quantized or tensor.layout != torch.strided:
        kind = "quantized" if tensor.is_quantized else "sparse"
        return f"a module of plain tensors, and {{name}} is {kind}: give the module as it was before that"
    if tensor.is_complex():
        return "a module of real numbers, and {name} holds complex ones, which no runtime here takes: write it with real pairs"
    if tensor.is_floating_point() and tensor.dtype not in _WIDE or is_parameter and not tensor.is_floating_point():
        return (
            f"parameters in floating point of 16 bits or more, and {{name}} is {str(tensor.dtype).removeprefix('torch.')}: "
            "give the module as it was before it was quantized"
        )
    return _not_finite(tensor, is_parameter)


def _not_finite(tensor: Tensor, is_parameter: bool) -> str | None:
    """A buffer may hold infinity: an attention mask does."""
    if not tensor.is_floating_point():
        return None
    count = int((~tensor.detach().isfinite() if is_parameter else tensor.isnan()).sum())
    if not count:
        return None
    return f"a module of finite numbers, and {{name}} holds {count} NaN or Inf values: use weights from before training diverged"


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that modules hold as plain attributes, which Module.to and Module.float pass over."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield module, key, value


def _refused(model: nn.Module, allowed: str) -> RequestError:
    return RequestError("model", type(model).__name__, allowed)
