"""How a module of the user's own is called: with images alone, whatever else its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.errors import RequestError

_IMAGE_NAMES = ("pixel_values", "images", "image", "inputs", "input", "imgs", "img", "x")
"""Of a forward whose inputs all have defaults, the one that gets the images if it is there; else the first."""
_SHOWN = 3
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def run(model: nn.Module, images: Tensor) -> Any:
    """The output of `model`, in the mode it is in, for images float32 [N, C, H, W]; random numbers are the same each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model(images)


def taking_images(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """`model` with a forward of one input, and which inputs keep their defaults.

    Raises:
        RequestError: it has no forward, or one that needs more than images.
    """
    inner = _forward_of(model)
    try:
        inputs = list(inspect.signature(inner).parameters.values())[1:]
    except (TypeError, ValueError):  # a builtin's, which Python does not know
        return model, []
    if [one.kind for one in inputs] in [[kind] for kind in _BY_PLACE] and inner is type(model).forward:
        return model, []
    keyword = _image_input(model, inputs)
    others = [one for one in inputs if one.default is not one.empty and one.name != (keyword or inputs[0].name)]

    def forward(self: nn.Module, images: Tensor) -> Any:
        return inner(self, images) if keyword is None else inner(self, **{keyword: images})

    return with_forward(model, forward), [_defaults_note(others)] if others else []


def with_forward(model: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> nn.Module:
    """`model` itself as an instance of a subclass with this forward, under the old name, so that its layers keep theirs.

    Args:
        forward: called with (model, images float32 [N, C, H, W]).
    """
    vars(model).pop("forward", None)
    return _subclassed(model, forward=forward)


def returning_itself(model: nn.Module) -> nn.Module:
    """`model` in eval mode; a train() of its own that returns nothing returns the module as torch's does."""
    if model.eval() is model:
        return model
    inner = type(model).train

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        inner(self, mode)
        return self

    return _subclassed(model, train=train).eval()


def _subclassed(model: nn.Module, **methods: Callable[..., Any]) -> nn.Module:
    kind: type[nn.Module] = type(model)
    # A GraphModule regenerates its own forward, so it becomes a plain module.
    base = nn.Module if issubclass(kind, fx.GraphModule) else kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    metaclass: type[type] = type(kind)
    model.__class__ = metaclass(kind.__name__, (base,), names | methods)
    return model


def forward_of_class(model: nn.Module) -> Callable[..., Any]:
    return type(model).forward


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    """The function behind `model.forward`, self first."""
    if (own := vars(model).get("forward")) is not None:
        if isinstance(own, MethodType) and own.__self__ is model:
            return own.__func__
        raise RequestError(
            "model",
            type(model).__name__,
            "a module whose class says what forward does, and here a function was put in its place: write a subclass with "
            "this forward",
        )
    if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise RequestError(
            "model",
            type(model).__name__,
            "a module whose forward computes the answers, and its class also has a __call__ of its own: write what that does "
            "into forward",
        )
    if type(model).forward is nn.Module.forward:
        children = [
            f"model={name}" for name, child in model.named_children() if type(child).forward is not nn.Module.forward
        ]
        inside = ", ".join(f"`.{child.removeprefix('model=')}`" for child in children[:_SHOWN])
        raise RequestError(
            "model",
            type(model).__name__,
            "a module with a forward that turns images into class scores, and its class has none; give the network itself"
            + (f", if it is one of {inside}" if inside else ""),
        )
    return type(model).forward


def _image_input(model: nn.Module, inputs: list[inspect.Parameter]) -> str | None:
    """The keyword by which the images are passed; None for the first position."""
    named = [one for one in inputs if one.kind in (*_BY_PLACE, inspect.Parameter.KEYWORD_ONLY)]
    needed = [one for one in named if one.default is one.empty]
    if len(needed) > 1:
        extra = _names(needed[1:])
        raise RequestError(
            "model",
            type(model).__name__,
            f"a module whose forward needs images alone, and this one also needs {extra}: give {extra} a default value, or a "
            "module around it that fills it in",
        )
    if needed:
        image = needed[0]
    elif named:
        image = next((one for name in _IMAGE_NAMES for one in named if one.name == name), named[0])
    elif any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in inputs):
        return None
    else:
        raise RequestError(
            "model",
            type(model).__name__,
            "a module whose forward takes images as its first input, and this one takes "
            f"{'keywords that it does not name' if inputs else 'nothing'}: write `def forward(self, images)` around it",
        )
    by_place = image is inputs[0] and image.kind in _BY_PLACE
    return None if by_place else image.name


def _defaults_note(others: list[inspect.Parameter]) -> str:
    shown = [f"{one.name}={one.default!r}" if _is_short(one.default) else one.name for one in others[:_SHOWN]]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f"forward is called with images alone; its other inputs keep their defaults: {', '.join(shown)}{more}."


def _is_short(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str) and len(repr(value)) <= 20


def _names(inputs: list[inspect.Parameter]) -> str:
    return " and ".join(f"`{one.name}`" for one in inputs)
