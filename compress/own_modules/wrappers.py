"""Wrappers around a module (DataParallel, torch.compile, ...), and objects that are no module."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from compress.errors import RequestError

_INSIDE = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
"""Class of a wrapper -> the attribute that holds the module. By name: torch._dynamo takes a second to import."""
_SPOKEN = {"OptimizedModule": "torch.compile"}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def require_module(model: object) -> nn.Module:
    """`model`, if it is a module.

    Raises:
        RequestError: a class, a function, a state dict, a path, ...; says what to give instead.
    """
    if isinstance(model, nn.Module):
        return model
    raise RequestError(
        "model", _shown(model), f"an instance of torch.nn.Module with its weights loaded; {_advice(model)}"
    )


def unwrap(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside all wrappers, and a note that names them.

    Raises:
        RequestError: TorchScript, torch.export, FSDP.
    """
    taken = []
    while (attribute := _inside(model)) is not None:
        _refuse_hooks(model)
        taken.append(_spoken(model))
        model = getattr(model, attribute)
    _refuse_fixed_code(model)
    return model, [f"{' and '.join(taken)} around the module was taken off."] if taken else []


def unwrap_children(model: nn.Module) -> list[str]:
    """Put the module inside each wrapper within `model` (a compiled backbone) into the wrapper's place."""
    taken = []
    for name, parent in list(model.named_modules()):
        for key, child in parent._modules.items():
            while child is not None and (attribute := _inside(child)) is not None:
                _refuse_hooks(child)
                taken.append(f"{_spoken(child)} around `{f'{name}.{key}'.lstrip('.')}`")
                child = parent._modules[key] = getattr(child, attribute)
    return [f"{note} was taken off." for note in taken]


def _inside(model: nn.Module) -> str | None:
    return next((_INSIDE[name] for name in _class_names(model) if name in _INSIDE), None)


def _refuse_hooks(wrapper: nn.Module) -> None:
    if vars(wrapper).get("_forward_hooks") or vars(wrapper).get("_forward_pre_hooks"):
        raise RequestError(
            "model",
            _spoken(wrapper),
            "a wrapper without hooks, for it is taken off: put the hook on the module inside it",
        )


def _class_names(model: nn.Module) -> list[str]:
    return [f"{one.__module__}.{one.__qualname__}" for one in type(model).__mro__]


def _spoken(model: nn.Module) -> str:
    name = type(model).__name__
    return _SPOKEN.get(name, name)


def _refuse_fixed_code(model: nn.Module) -> None:
    """TorchScript and torch.export hold a program in place of layers; a shard holds a part of the weights."""
    for name, module in model.named_modules():
        where = f" (its `{name}`)" if name else ""
        kind = _fixed_code(module)
        if kind is not None:
            raise RequestError(
                "model",
                type(model).__name__,
                f"the Python module itself, and this one was made by {kind}{where}, which left no layers that could be made "
                "smaller: give the module that it was made from, with its weights loaded",
            )
        if any(one.__name__ in _SHARDED for one in type(module).__mro__):
            raise RequestError(
                "model",
                type(model).__name__,
                f"a whole module, and this one is split by FSDP{where}: gather its full state dict, load that into a fresh "
                "instance of the module, and give the instance",
            )


def _fixed_code(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit"
    graph = module.graph if isinstance(module, fx.GraphModule) else None
    exported = graph is not None and any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)
    return "torch.export" if exported or type(module).__module__.startswith("torch.export") else None


def _shown(model: object) -> str:
    return model.__name__ if isinstance(model, type) else type(model).__name__


def _advice(model: object) -> str:
    """What to give in place of something that is no module."""
    if isinstance(model, type):
        return f"this is the class: give model={model.__name__}(...)"
    if isinstance(model, enum.Enum) and hasattr(model, "get_state_dict"):
        return (
            'these are published weights: name the architecture instead, Request(model="...", checkpoint="published")'
        )
    if isinstance(model, str | os.PathLike):
        return (
            "this is a path or a name: weights of a torchvision classifier go into the request, "
            'Request(model="resnet18", checkpoint=...), those of your own class into an instance of it'
        )
    if isinstance(model, Mapping):
        return _advice_on_mapping(model)
    if type(model).__module__.startswith(("torch.export", "torch.jit")) or isinstance(model, torch._C.ScriptFunction):
        return "this is a finished program without layers: give the Python module that it was made from"
    if callable(model):
        return "this is a function: give the module that it makes"
    return f"a {type(model).__name__} is none"


def _advice_on_mapping(values: Mapping[Any, Any]) -> str:
    for key, value in values.items():
        if isinstance(value, nn.Module):
            return f"this is a dictionary that holds one: give model=...[{key!r}]"
    return "this is a dictionary of weights: build the module, call its load_state_dict with them, and give the module"
