"""The output of a user's module: where the logits are in it, whatever tuple, dictionary or dataclass they are packed into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import RequestError
from compress.own_modules import calling

TOLERANCE = 1e-5
"""Largest difference of two answers that count as equal, relative to the largest number in them."""
LOGITS = "logits"
_PASSED_ON = ("clone", "_to_copy", "contiguous", "squeeze", "view", "reshape", "unsqueeze", "alias", "detach")
_SHOWN = 5

Path = tuple[tuple[str, Any], ...]
"""Steps from an answer to a tensor in it: ("item", key or index) or ("attribute", name)."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Where the logits are in the answer."""

    path: Path
    flattens: bool
    """[N, classes, 1, 1] on the way to [N, classes]."""
    num_classes: int
    notes: list[str]


def choose(answer: object, model: nn.Module, images: Tensor) -> Chosen:
    """Find the logits in an output.

    Args:
        answer: output of `model` for `images`.
        images: float32 [N, 3, H, W].

    Raises:
        RequestError: there is no tensor of class scores [N, classes] in the answer, or more than one.
    """
    leaves = list(_leaves(answer, ()))
    rows = [(path, leaf) for path, leaf in leaves if _is_scores(leaf, len(images))]
    named = [row for row in rows if row[0] and row[0][-1][1] == LOGITS]
    flat = [row for row in rows if row[1].ndim == 2]
    candidates = named or flat or rows
    if len({id(leaf) for _, leaf in candidates}) != 1:
        raise _refused(model, _fault(answer, leaves, len(candidates), model, images))
    path, scores = candidates[0]
    if bool(scores.isnan().any()):
        raise _refused(model, "a classifier, and its scores for an image of random pixels are NaN: check its weights")
    if _ends_in_sigmoid(model, images, path, scores):
        raise _refused(
            model,
            f"scores of which the highest is the answer, and its forward ends in a sigmoid: return the {scores.shape[1]} logits, "
            "without the sigmoid (of a multi-label classifier, each class by itself, the accuracy means nothing here)",
        )
    notes = []
    if path:
        rest = ", and the rest is left out" if len(leaves) > 1 else ""
        notes.append(f"The module answers with a {_kind(answer)}: the logits are {_spoken(path)}{rest}.")
    if scores.ndim == 4:
        notes.append(f"The answers of shape [N, {scores.shape[1]}, 1, 1] are flattened.")
    return Chosen(path, scores.ndim == 4, scores.shape[1], notes)


def returning(model: nn.Module, chosen: Chosen) -> nn.Module:
    """`model` with a forward that returns the logits alone; in training mode an answer without them stays as it is."""
    if not chosen.path and not chosen.flattens:
        return model
    inner = calling.forward_of_class(model)

    def forward(self: nn.Module, images: Tensor) -> Any:
        answer = inner(self, images)
        try:
            logits = _at(answer, chosen.path)
        except (KeyError, IndexError, TypeError, AttributeError):
            if self.training:
                return answer
            raise
        return logits.flatten(1) if chosen.flattens else logits

    return calling.with_forward(model, forward)


def are_equal(one: object, other: object) -> bool:
    """Of two answers: the same tensors, but for rounding."""
    first, second = ([leaf for _, leaf in _leaves(answer, ())] for answer in (one, other))
    if [leaf.shape for leaf in first] != [leaf.shape for leaf in second]:
        return False
    scale = max((float(leaf.abs().max()) for leaf in first if leaf.is_floating_point() and leaf.numel()), default=0.0)
    return all(
        torch.allclose(a.double(), b.double(), rtol=0, atol=TOLERANCE * scale, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


def has_rows(answer: object, n: int) -> bool:
    """Whether a tensor in the answer has a row for each of n images; one that flattens too large maps has more of them."""
    batches = [leaf for _, leaf in _leaves(answer, ()) if leaf.ndim > 1]
    return not batches or any(leaf.shape[0] == n for leaf in batches)


def _leaves(value: object, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in an answer, and where they are."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        steps = [(("item", key), part) for key, part in value.items()]
    elif hasattr(value, "_fields"):  # a named tuple
        steps = [(("attribute", key), getattr(value, key)) for key in value._fields]
    elif isinstance(value, list | tuple):
        steps = [(("item", index), part) for index, part in enumerate(value)]
    elif dataclasses.is_dataclass(value) or type(value).__name__ == "SimpleNamespace":
        steps = [(("attribute", key), part) for key, part in vars(value).items()]
    else:
        return
    for step, part in steps:
        yield from _leaves(part, (*path, step))


def _at(answer: Any, path: Path) -> Tensor:
    for kind, key in path:
        answer = answer[key] if kind == "item" else getattr(answer, key)
    tensor: Tensor = answer
    return tensor


def _is_scores(leaf: Tensor, n: int) -> bool:
    """float [N, classes] or [N, classes, 1, 1] of two classes or more."""
    return leaf.is_floating_point() and leaf.ndim in (2, 4) and leaf.shape[0] == n and leaf.shape[1] > 1 and (
        leaf.ndim == 2 or leaf.shape[2:] == (1, 1)
    )  # fmt: skip


def _fault(answer: object, leaves: list[tuple[Path, Tensor]], candidates: int, model: nn.Module, images: Tensor) -> str:
    """Why there are no logits, or more than one, as the end of a sentence."""
    n = len(images)
    if candidates > 1:
        return (
            f"a classifier that answers with one tensor of class scores, and it answered {listed(answer, n)}; of "
            f"several answers, give a module that returns the one to compress, or name it {LOGITS!r} in a dictionary"
        )
    single = [leaf for _, leaf in leaves if leaf.is_floating_point() and leaf.numel() == n == leaf.shape[0]]
    if len(single) == 1:
        return f"a score for each class, and it answered one for each image ({_shape(single[0], n)}): {_two_of_one(model, images)}"
    if len(leaves) == 1 and not leaves[0][1].is_floating_point():
        return (
            f"a score for each class, and it answered {str(leaves[0][1].dtype).removeprefix('torch.')} numbers "
            f"({_shape(leaves[0][1], n)}): return the scores, before argmax or rounding"
        )
    return (
        "a classifier that answers an image batch with one row of class scores each, [N, classes], and it answered "
        f"{listed(answer, n)}"
    )


def _two_of_one(model: nn.Module, images: Tensor) -> str:
    """How a module with one logit z, of the second class, is given two with the same probabilities: 0 and z."""
    names: list[str] = []
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    handles = [one.register_forward_hook(lambda *_, name=name: names.append(name)) for name, one in layers.items()]
    calling.run(model, images)
    for handle in handles:
        handle.remove()
    same = "softmax then gives the second class, that of a high score, the probability that the sigmoid gave"
    if not names or layers[names[-1]].out_features != 1:
        return f"return two, 0 and the score z [N, 1] before its sigmoid: torch.cat([torch.zeros_like(z), z], dim=1); {same}"
    last = layers[names[-1]]
    bias = "; two.bias.data = pad(old.bias.data, (1, 0))" if last.bias is not None else ""
    return (
        f"give `{names[-1]}` two outputs, the first of them 0, and return both without a sigmoid. With old = the layer now and "
        f"pad = torch.nn.functional.pad: two = torch.nn.Linear({last.in_features}, 2{'' if bias else ', bias=False'}); "
        f"two.weight.data = pad(old.weight.data, (0, 0, 1, 0)){bias}; {same}"
    )


def listed(answer: object, n: int = 0) -> str:
    """An answer in words, with the shape of each tensor; a first dimension of `n` is spoken of as N."""
    leaves = list(_leaves(answer, ()))
    if isinstance(answer, Tensor):
        return f"a tensor of shape {_shape(answer, n)}"
    if not leaves:
        return f"a {_kind(answer)} without tensors" if answer is not None else "nothing (None)"
    shown = ", ".join(f"{_spoken(path)} of shape {_shape(leaf, n)}" for path, leaf in leaves[:_SHOWN])
    more = f" and {len(leaves) - _SHOWN} more" if len(leaves) > _SHOWN else ""
    return f"a {_kind(answer)}: {shown}{more}"


def _shape(tensor: Tensor, n: int) -> str:
    sizes = ["N" if place == 0 and size == n else str(size) for place, size in enumerate(tensor.shape)]
    return f"[{', '.join(sizes)}]"


def _spoken(path: Path) -> str:
    return "answer" + "".join(f"[{key!r}]" if kind == "item" else f".{key}" for kind, key in path)


def _kind(answer: object) -> str:
    return type(answer).__name__


def _ends_in_sigmoid(model: nn.Module, images: Tensor, path: Path, scores: Tensor) -> bool:
    if not (float(scores.min()) >= 0 and float(scores.max()) <= 1):
        return False
    makers = _Makers()
    with makers:
        again = calling.run(model, images)
    return makers.maker_of(_at(again, path)) in ("sigmoid", "sigmoid_", "hardsigmoid", "special_expit")


class _Makers(TorchDispatchMode):
    """Which operation wrote each storage last; reshapes and copies pass the name on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._made: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            name = func.overloadpacket.__name__
            copies = name in _PASSED_ON and args and isinstance(args[0], Tensor)
            self._made[_storage(result)] = (
                self._made.get(_storage(args[0]), "") if copies else self._name(name, result, args)
            )
        return result

    def _name(self, name: str, result: Tensor, args: Any) -> str:
        """A view keeps the name of what wrote its storage."""
        source = args[0] if args and isinstance(args[0], Tensor) else None
        is_view = source is not None and source is not result and _storage(source) == _storage(result)
        return self._made.get(_storage(result), "") if is_view else name

    def maker_of(self, tensor: Tensor) -> str:
        return self._made.get(_storage(tensor), "")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refused(model: nn.Module, allowed: str) -> RequestError:
    return RequestError("model", type(model).__name__, allowed)
