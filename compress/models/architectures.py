"""Torchvision's classifiers: what is published of them, how they are built, and recognised from a checkpoint's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import CheckpointError, RequestError
from compress.preprocessing import Preprocessing

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Prefixes of the extra outputs that only training from scratch uses; weights are accepted with and without them."""
_HEADS = (
    "heads.head", "head", "fc", "classifier",
    "classifier.6", "classifier.5", "classifier.3", "classifier.2", "classifier.1",
)  # fmt: skip
"""Names of last layers, the later ones of a family first."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "relative_coords_table")
_POSITIONS = "encoder.pos_embedding"
_INPUT_RESCALED = ("googlenet", "inception_v3")
"""Their published weights run with `transform_input=True`, which turns ImageNet's normalisation into mean 0.5 and
standard deviation 0.5. Given that normalisation directly, the model needs no such step."""
_OLD_DENSENET_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


@dataclass(frozen=True)
class Architecture:
    """A torchvision classifier, enough to build it again."""

    name: str
    num_classes: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of torchvision's builder, such as a vision transformer's `image_size`."""


def build(architecture: Architecture) -> nn.Module:
    """A classifier with random weights, in eval mode; googlenet and inception_v3 without their auxiliary outputs.

    Raises CheckpointError when torchvision does not know the architecture.
    """
    arguments = dict(architecture.kwargs)
    if architecture.name in _AUXILIARY:
        arguments = {"aux_logits": False, "init_weights": False} | arguments
    try:
        model = torchvision.models.get_model(architecture.name, num_classes=architecture.num_classes, **arguments)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"torchvision cannot build {architecture.name} with {arguments}: {error}.") from error
    assert isinstance(model, nn.Module)
    return model.eval()


def fresh(name: str, num_classes: int, input_size: int) -> Architecture:
    """Architecture `name` for images of `input_size`; a vision transformer's position embeddings depend on it."""
    return Architecture(name, num_classes, {"image_size": input_size} if name.startswith("vit_") else {})


def build_empty(architecture: Architecture) -> nn.Module:
    """The structure alone, its parameters without memory (device "meta"): fast, for comparing shapes."""
    with _empty_parameters():
        return build(architecture)


class _MetaFactories(TorchFunctionMode):
    """Parameters are made by these factories; numbers that decide the structure (torch.arange, ...) stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    with _MetaFactories():
        yield


def load(architecture: Architecture, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build `architecture` and load `tensors`, name -> tensor of the shape that `recognise` matched; eval mode.

    Auxiliary outputs of googlenet and inception_v3 are left out: only training from scratch uses them.
    """
    model = build(architecture)
    load_weights(model, without_auxiliary(architecture.name, tensors))
    return model


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load exactly these tensors, name -> tensor of the parameter's or buffer's shape, into `model`.

    They go in with the model's own version marks, which a file of bare tensors lacks and mnasnet insists on.
    """
    state = model.state_dict()
    if set(state) != set(tensors):
        raise CheckpointError(
            f"The weights do not belong to this model: they differ in {min(set(state) ^ set(tensors))}."
        )
    state.update(tensors)
    model.load_state_dict(state)


def without_auxiliary(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of any shape, without those of the auxiliary outputs."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(_AUXILIARY.get(name, ("\0",)))}


# ---- what torchvision publishes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What torchvision's default weights of one classifier need and are; read without a download."""

    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    parameters: int
    accuracy: float
    """Top-1 on ImageNet, 0..1, as torchvision reports it."""


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """All torchvision image classifiers, sorted."""
    return tuple(sorted(torchvision.models.list_models(module=torchvision.models)))


@lru_cache(maxsize=128)
def published(name: str) -> Published:
    """Raises RequestError when torchvision has no classifier of this name."""
    if name not in names():
        raise RequestError("model", name, "a torchvision classifier; `python -m compress models` lists them")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    recipe = weights.transforms()
    mean, std = ([0.5] * 3, [0.5] * 3) if name in _INPUT_RESCALED else (recipe.mean, recipe.std)
    preprocessing = Preprocessing(
        recipe.crop_size[0], tuple(mean), tuple(std), recipe.resize_size[0], recipe.interpolation.value
    )
    accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    return Published(preprocessing, tuple(weights.meta["categories"]), weights.meta["num_params"], accuracy)


def published_weights(name: str) -> dict[str, Tensor]:
    """Torchvision's default weights, tensors of the published shapes by name.

    They are downloaded once into torchvision's own cache and checked against their hash.

    Raises CheckpointError when they cannot be downloaded.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"torchvision's published weights of {name} cannot be downloaded here ({reason}): connect to a network, or "
            "give weights of your own with --checkpoint."
        ) from error
    return {_OLD_DENSENET_NAME.sub(r"\1\2", key): tensor for key, tensor in tensors.items()}


# ---- recognise ----------------------------------------------------------------------------------------------------


def recognise(tensors: Mapping[str, Tensor], expected: str | None) -> Architecture:
    """The torchvision classifier whose tensors have exactly these names and shapes.

    The number of classes is read from the last layer, a vision transformer's image size from its position embeddings.

    Args:
        expected: the architecture that the user named; None looks through all.

    Raises:
        CheckpointError: it is another one; the sentence names a layer, both shapes, and the architecture it does match.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected is not None:
        architecture, published = _fitted(expected, shapes)
        if published == shapes:
            return architecture
    match = _search(shapes)
    if expected is None and match is not None:
        return match
    if match is not None:
        advice = f"It matches {match.name} with {match.num_classes} outputs: choose that model."
    else:
        advice = "It matches no torchvision classifier: give your own module from Python, compress.run(model=...)."
    if expected is None:
        example = ", ".join(f"{name} {_times(shape)}" for name, shape in list(shapes.items())[:2])
        raise CheckpointError(f"The checkpoint ({len(shapes)} tensors: {example}, ...) is not a known model. {advice}")
    raise CheckpointError(
        f"The checkpoint is not a {expected}: {_first_difference(expected, published, shapes)}. {advice}"
    )


@lru_cache(maxsize=128)
def _published_shapes(name: str, auxiliary: bool) -> dict[str, tuple[int, ...]]:
    """Shapes with the published number of classes."""
    kwargs = {"aux_logits": True} if auxiliary else {}
    model = build_empty(Architecture(name, len(published(name).class_names), kwargs))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _fitted(name: str, shapes: Shapes) -> tuple[Architecture, dict[str, tuple[int, ...]]]:
    """Architecture `name` with the number of classes and the image size of `shapes`, and the shapes it then has."""
    prefixes = _AUXILIARY.get(name, ())
    fitted = dict(_published_shapes(name, any(key.startswith(prefix) for key in shapes for prefix in prefixes)))
    head = _head(fitted)
    classes = default_classes = fitted[f"{head}.weight"][0]
    if len(shapes.get(f"{head}.weight", ())) == len(fitted[f"{head}.weight"]):
        classes = shapes[f"{head}.weight"][0]
    for key, shape in fitted.items():
        if key.startswith((f"{head}.", *prefixes)) and shape[:1] == (default_classes,):
            fitted[key] = (classes, *shape[1:])
    kwargs: dict[str, Any] = {}
    if _POSITIONS in fitted and len(shapes.get(_POSITIONS, ())) == 3:
        patches = shapes[_POSITIONS][1] - 1
        side = math.isqrt(max(patches, 0))
        if side > 0 and side * side == patches:
            if fitted[_POSITIONS][1] != patches + 1:
                kwargs["image_size"] = side * fitted["conv_proj.weight"][-1]
            fitted[_POSITIONS] = (1, patches + 1, fitted[_POSITIONS][2])
    return Architecture(name, classes, kwargs), fitted


def _head(shapes: Shapes) -> str | None:
    return next((head for head in _HEADS if f"{head}.weight" in shapes), None)


def _search(shapes: Shapes) -> Architecture | None:
    """Compare with the architectures whose published number of parameters agrees, so that few have to be built."""
    head = _head(shapes)
    if head is None:
        return None
    own = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(_BUFFERS))
    per_class = math.prod(shapes[f"{head}.weight"][1:]) + (f"{head}.bias" in shapes)
    for name in names():
        missing_classes = len(published(name).class_names) - shapes[f"{head}.weight"][0]
        flexible = name in _AUXILIARY and head == "fc" or name.startswith("vit_") and _POSITIONS in shapes
        if own + missing_classes * per_class != published(name).parameters and not flexible:
            continue
        architecture, fitted = _fitted(name, shapes)
        if fitted == shapes:
            return architecture
    return None


def _first_difference(name: str, published: Shapes, shapes: Shapes) -> str:
    for key, shape in published.items():
        if key in shapes and shapes[key] != shape:
            return f"{key} is {_times(shape)} in {name}, but {_times(shapes[key])} in the file"
    for key, shape in published.items():
        if key not in shapes:
            return f"{key} ({_times(shape)} in {name}) is missing in the file"
    extra = next(key for key in shapes if key not in published)
    return f"the file holds {extra} ({_times(shapes[extra])}), which {name} does not have"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
