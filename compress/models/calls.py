"""Calls of the user's model: what its own code raises becomes one sentence, and its logits are found in what it answers."""

from __future__ import annotations

import dataclasses
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import memory
from compress.errors import CompressError, ModelError
from compress.files import PACKAGE

MAIN_KEYS = ("logits", "out", "main", "output", "prediction")
"""Fields of a container that hold the main answer wherever they stand."""
_STANDARD_LIBRARY, _INSTALLED = (f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib"))
_TOOLS = (f"{Path(torch.__file__).parent}/", f"{_INSTALLED}nni/", f"{PACKAGE}/")
_ONE_VALUE = "Expected more than 1 value per channel"


@contextmanager
def own_errors(model: nn.Module, doing: str) -> Iterator[None]:
    """Around calls of `model`: an exception of its own code becomes a sentence with its file, line and code.

    Memory that ran out, and the end of another process that trains with this one, are not the model's fault and pass, as do
    refusals of ours.

    Args:
        doing: what the model was called for, such as "in training mode, with 16 images of 32 x 32 pixels".

    Raises:
        ModelError: the model's own code, or a layer that it calls, raised an exception.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        if memory.ran_out(error) or _is_of_a_partner(error):
            raise
        raise ModelError(_sentence(model, doing, error)) from error


def logits_of(answer: Any, classes: int | None = None) -> Tensor:
    """The logits [N, classes] in what a model answers: models with auxiliary heads give several tensors while they train.

    The answer itself, the field `logits` (or another of `MAIN_KEYS`), or else the first tensor of that shape in a tuple, list,
    dict or dataclass of any depth. What other heads answer takes no part in the loss, so that they get no gradient: they
    are never deployed, and the main head is trained as it will be asked.

    Args:
        classes: columns of the model's answer in eval mode, where known; features and others are passed over.

    Raises:
        ModelError: there is no such tensor.
    """
    for tensor in _tensors(answer):
        if tensor.ndim == 2 and tensor.is_floating_point() and classes in (None, tensor.shape[1]):
            return tensor
    columns = "classes" if classes is None else str(classes)
    raise ModelError(
        f"The model answers with {_described(answer)}, where scores of shape [images, {columns}] are "
        "expected, alone or in a tuple, list or dict: let it return them."
    )


def classes_of(model: nn.Module, images: Tensor) -> int:
    """How many classes `model` has, from its logits for one of `images`, float32 [N, C, H, W]; it is left in eval mode.

    Raises:
        ModelError: its own code stops, or its answer holds no logits.
    """
    with torch.no_grad(), own_errors(model, "in eval mode, with one image"):
        return logits_of(model.eval()(images[:1])).shape[1]


def _is_of_a_partner(error: Exception) -> bool:
    """Whether another of the training processes is gone; Gloo raises RuntimeError, which names its source file."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _tensors(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
        return
    if dataclasses.is_dataclass(answer) and not isinstance(answer, Mapping | type):
        answer = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    elif isinstance(answer, tuple) and hasattr(answer, "_asdict"):
        answer = answer._asdict()
    if isinstance(answer, Mapping):
        answer = [answer[key] for key in sorted(answer, key=lambda key: key not in MAIN_KEYS)]
    if isinstance(answer, tuple | list):
        for part in answer:
            yield from _tensors(part)


def _described(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor of shape {list(answer.shape)}"
    shapes = ", ".join(str(list(tensor.shape)) for tensor in _tensors(answer))
    return f"a {type(answer).__name__} of {f'tensors of shape {shapes}' if shapes else 'no tensors'}"


def raised(error: BaseException) -> str:
    """Type and first line of an exception: "KeyError: 'mask'"."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0].rstrip('.')}" if message else type(error).__name__


def own_line(error: BaseException) -> str | None:
    """Where in the model's own code an exception began: file, line, function and code."""
    own = [line for line in traceback.extract_tb(error.__traceback__) if _is_the_models(line.filename)]
    return (
        f"{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name} (`{own[-1].line}`)" if own else None
    )


def _sentence(model: nn.Module, doing: str, error: Exception) -> str:
    where = _layer(model, error)
    if _ONE_VALUE in str(error):
        norm = "A BatchNorm" if where is None else f"T{where[1:]}"
        return (
            f"{norm} gets one value per channel {doing}, of which no variance can be taken: raise --train-batch-size (of "
            "which each of --training-processes takes its part) or --input-size."
        )
    line = own_line(error)
    if line is None:
        return (
            f"The model stops {doing}{f', at {where}' if where else ''}: {raised(error)}. Call it yourself in the same way, and "
            "mend what stops it."
        )
    return (
        f"The model's own code stops {doing}: {line} raises {raised(error)}. Call it yourself in the same way, and mend that "
        "line."
    )


def _is_the_models(file: str) -> bool:
    """Not generated, not torch's, NNI's, Python's or ours; a package such as timm is the model's code as well."""
    if file.startswith(_INSTALLED):
        return not file.startswith(_TOOLS)
    return not file.startswith(("<", *_TOOLS, _STANDARD_LIBRARY))


def _layer(model: nn.Module, error: Exception) -> str | None:
    """The innermost module of `model` that was being called."""
    names = {id(module): name for name, module in model.named_modules() if name}
    called = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [module for module in called if isinstance(module, nn.Module) and id(module) in names]
    return f"the {type(inside[-1]).__name__} {names[id(inside[-1])]}" if inside else None
