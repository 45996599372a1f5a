"""What a run works on: a model with its weights, its preprocessing, its images and its task, resolved from a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from compress import hub, naming, own_modules
from compress.checkpoints import reader
from compress.data import archives, fashion_mnist
from compress.data import dataset as data_dataset
from compress.errors import CheckpointError, DataError, RequestError
from compress.models import architectures
from compress.models.architectures import Architecture
from compress.preprocessing import Preprocessing
from compress.request import Request
from compress.tasks import CLASSIFICATION, Task

DEMO_MODEL, DEMO_DATA = "resnet18", "fashion-mnist"
DEMO_CHECKPOINT = data_dataset.ASSETS / "resnet18-fashion-mnist.safetensors"
CUSTOM = "custom"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Workload:
    """A model in eval mode, how its input is made, and the images."""

    model: nn.Module
    architecture: Architecture | None
    """None for a module of the user's own."""
    name: str
    weights: str
    """Where the weights come from, in words."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    dataset: data_dataset.Dataset
    task: Task = CLASSIFICATION
    notes: tuple[str, ...] = ()
    """What was done to a module of the user's own before anything else, a sentence each."""

    @property
    def example(self) -> Tensor:
        """One image [1, 3, size, size] for tracing and counting."""
        size = self.preprocessing.input_size
        return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    architecture: Architecture | None
    weights: str
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def open_workload(request: Request, model: nn.Module | None = None, *, kept: Path | None = None) -> Workload:
    """Builds the model, loads its weights and opens its images.

    Args:
        model: a module of the user's own, with `request.model == "custom"`; see `compress.own_modules`.
        kept: a folder for the weights of a checkpoint file, which is then opened only once.

    Raises:
        RequestError: the model is unknown, or needs something that was not given.
        CheckpointError, DataError: the files cannot be used.
    """
    if request.data not in (data_dataset.FASHION_MNIST, data_dataset.NONE):
        archives.refuse_missing(Path(request.data))  # before weights are downloaded
    loaded = _own_module(request, model) if model is not None else _torchvision_model(request, kept)
    preprocessing = _preprocessing(request, loaded)
    dataset = data_dataset.open_data(
        request.data,
        preprocessing,
        num_classes=_outputs(loaded.model, preprocessing),
        class_names=loaded.class_names,
        class_map=_class_map(request.class_map),
        test_fraction=request.test_fraction,
        seed=request.seed,
    )
    return Workload(
        model=loaded.model,
        architecture=loaded.architecture,
        name=request.model,
        weights=loaded.weights,
        preprocessing=preprocessing,
        class_names=dataset.class_names or loaded.class_names or (),
        dataset=dataset,
        notes=loaded.notes,
    )


def _own_module(request: Request, model: object) -> _Loaded:
    if request.model != CUSTOM:
        raise RequestError("model", request.model, f"{CUSTOM!r}, because a module of your own was given with model=")
    if request.input_size is None:
        raise RequestError("input_size", None, "a number of pixels, because a module of your own does not tell it")
    opened = own_modules.open_module(model, request.input_size)
    name = type(opened.model).__name__
    return _Loaded(opened.model, None, f"the {name} given by the caller", None, None, opened.notes)


def _torchvision_model(request: Request, kept: Path | None) -> _Loaded:
    name = request.model
    if name == CUSTOM:
        raise RequestError(
            "model", name, "a module of your own beside it: compress.run(request, model=...), in Python only"
        )
    if name not in architectures.names():
        close = get_close_matches(name, architectures.names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`python -m compress models` lists them"
        raise RequestError("model", name, f"a torchvision classifier; {hint}")
    published = architectures.published(name)
    kind = request.checkpoint
    if kind == "auto":
        kind = str(DEMO_CHECKPOINT) if (name, request.data) == (DEMO_MODEL, DEMO_DATA) else "published"
    if kind == "random":
        return _random_weights(request, published)
    names: tuple[str, ...] | None = published.class_names
    if kind == "published":
        tensors, recipe = architectures.published_weights(name), published.preprocessing
        weights = "torchvision's published weights"
    else:
        read, weights = _read_checkpoint(kind, kept)
        tensors, names, recipe = dict(read.tensors), read.class_names, read.preprocessing or published.preprocessing
    architecture = architectures.recognise(tensors, expected=name)
    if names is not None and len(names) != architecture.num_classes:
        raise CheckpointError(
            f"{weights}: its metadata names {len(names)} classes, but the model has {architecture.num_classes} outputs: "
            "correct `class_names`, or save the file without this metadata."
        )
    return _Loaded(architectures.load(architecture, tensors), architecture, weights, recipe, names)


def _read_checkpoint(given: str, kept: Path | None) -> tuple[reader.Checkpoint, str]:
    """What is in the file, and in words where it comes from."""
    if given.startswith(hub.SCHEME):
        found = hub.download(given)
        with found.unless_refused() as path:
            return _read_file(path, kept), found.source
    return _read_file(Path(given), kept), Path(given).name


def _read_file(path: Path, kept: Path | None) -> reader.Checkpoint:
    if path == DEMO_CHECKPOINT:
        return reader.read_own(path)
    return reader.read_with_facts(path) if kept is None else reader.read_once(path, kept)


def _random_weights(request: Request, published: architectures.Published) -> _Loaded:
    classes = len(fashion_mnist.CLASS_NAMES) if request.data == DEMO_DATA else len(published.class_names)
    architecture = architectures.fresh(request.model, classes, request.input_size or published.preprocessing.input_size)
    with torch.random.fork_rng():
        torch.manual_seed(request.seed)
        model = architectures.build(architecture)
    return _Loaded(model, architecture, "random", published.preprocessing, None)


def _preprocessing(request: Request, loaded: _Loaded) -> Preprocessing:
    default = loaded.preprocessing or Preprocessing(request.input_size or 224, IMAGENET_MEAN, IMAGENET_STD)
    recipe = default.with_input_size(request.input_size or default.input_size)
    return replace(recipe, mean=request.mean or recipe.mean, std=request.std or recipe.std)


def _outputs(model: nn.Module, preprocessing: Preprocessing) -> int:
    """How many classes the model answers with, by asking it."""
    size = preprocessing.input_size
    try:
        with torch.no_grad():
            answer: Tensor = model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:  # a vision transformer asserts its own size
        raise RequestError(
            "input_size",
            size,
            f"a size that the model accepts, whoever gave this one (it answered: {_first_line(error)})",
        ) from error
    return answer.shape[1]


def _class_map(path: str | None) -> Mapping[str, int] | None:
    if path is None:
        return None
    example = 'a JSON object such as {"cat": 0, "dog": 1}'
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The class map {path} cannot be read ({_first_line(error)}). Give {example}.") from error
    if not isinstance(mapping, dict) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in mapping.values()
    ):
        raise DataError(f"The class map {path} is not {example}: folder names to output numbers.")
    for name in mapping:
        if flaw := naming.flaw(name):
            raise DataError(f"The class map {path} names {naming.shown(name)}, which holds {flaw}: correct that name.")
    return mapping


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
