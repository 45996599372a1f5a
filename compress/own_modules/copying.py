"""A copy of the user's module to work on: the original is never changed, and the user's hooks do not run with the copy."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compress.errors import RequestError

REPARAMETRIZATIONS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks of torch's own that compute a weight before each forward pass."""
_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_OTHERS = (
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
_DEPTH = 4
"""How deep tensors are looked for in lists, dictionaries and objects that a module holds."""


def copied(model: nn.Module, *, hooks: bool) -> nn.Module:
    """A deep copy without gradients; without `hooks` only those of torch's reparametrizations are kept.

    Raises:
        RequestError: something that the module holds cannot be copied; names it.
    """
    memo = _detached(model)
    if not hooks:
        memo |= _hooks_left_out(model)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # noqa: BLE001 - what a user's own module raises is its author's choice
        held = _uncopyable(model, hooks)
        raise RequestError(
            "model",
            type(model).__name__,
            f"a module that copy.deepcopy can copy, because a run works on a copy; {held or 'this one'} cannot be copied "
            f"({_first_line(error)}): take it off, or make it in forward",
        ) from error


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of the modules with forward hooks other than those of torch's reparametrizations; "" is the module itself."""
    return [
        name for name, module in model.named_modules() if any(len(_foreign(getattr(module, kind))) for kind in _FORWARD)
    ]


def drop_hooks(module: nn.Module) -> None:
    """Take off the hooks that `hooked_modules` finds."""
    for kind in _FORWARD:
        for key in _foreign(getattr(module, kind)):
            del getattr(module, kind)[key]


def _foreign(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if not isinstance(hook, REPARAMETRIZATIONS)]


def _hooks_left_out(model: nn.Module) -> dict[int, Any]:
    """For deepcopy's memo: what the copy has in place of each dictionary of hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for kind in (*_FORWARD, *_OTHERS):
            if isinstance(hooks := vars(module).get(kind), dict):
                own = {key: hook for key, hook in hooks.items() if isinstance(hook, REPARAMETRIZATIONS)}
                memo[id(hooks)] = OrderedDict(copy.deepcopy(own))
    return memo


def _detached(model: nn.Module) -> dict[int, Any]:
    """For deepcopy's memo: tensors with a history, such as kept feature maps, which torch refuses to copy."""
    copies = {}
    for module in model.modules():
        for tensor in _tensors(vars(module), _DEPTH, set()):
            if not tensor.is_leaf:
                copies[id(tensor)] = tensor.detach().clone()
    return copies


def _tensors(value: object, depth: int, visited: set[int]) -> Iterator[Tensor]:
    """Tensors in lists, dictionaries and objects, those of modules excepted."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or id(value) in visited or isinstance(value, nn.Module | str | bytes | type):
        return
    visited.add(id(value))
    if isinstance(value, MethodType):
        value = value.__self__
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else None
    for part in list(getattr(value, "__dict__", {}).values() if parts is None else parts):
        yield from _tensors(part, depth - 1, visited)


def _uncopyable(model: nn.Module, hooks: bool) -> str | None:
    """The attribute that cannot be copied, in words."""
    for name, module in model.named_modules():
        memo = _detached(model) | ({} if hooks else _hooks_left_out(model))
        memo |= {id(part): part for part in model.modules()}
        for key, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001
                if key in (*_FORWARD, *_OTHERS):
                    return f"a hook of `{name or type(model).__name__}`"
                return f"`{f'{name}.{key}'.lstrip('.')}`, a {type(value).__name__},"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
