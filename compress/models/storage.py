"""How a shrunk model is saved and rebuilt.

A shrunk model keeps the class of its architecture; only sizes inside its modules differ. `model.json` records those
sizes (a `RebuildSpec`), `model.safetensors` the weights, so rebuilding needs torchvision and nothing else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compress import files
from compress.errors import CheckpointError, StorageError
from compress.models.architectures import Architecture, build, build_empty, load_weights
from compress.models.attention import give_heads, pruned_heads
from compress.preprocessing import Preprocessing

WEIGHTS_FILE, SPEC_FILE = "model.safetensors", "model.json"
SPEC_FORMAT = 1

_SIZES = (
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features", "normalized_shape",
    "num_groups", "num_channels", "num_parameters", "embed_dim", "kdim", "vdim", "num_heads", "head_dim",
)  # fmt: skip
"""Module attributes that describe widths; a rebuilt module gets them back."""


@dataclass(frozen=True)
class RebuildSpec:
    """What `model.json` holds."""

    architecture: Architecture | None
    model_class: str
    sizes: dict[str, dict[str, Any]]
    """Module name -> the widths in which it differs from the architecture (for a module of the user's own: all)."""
    channels_last: bool
    """Whether convolutions were stored channels last; the layout decides which kernel runs, and so the last bits."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    weights_sha256: str
    heads: dict[str, int] = field(default_factory=dict)
    """Attention module -> how many heads it has left."""


def save(
    model: nn.Module,
    folder: Path,
    *,
    architecture: Architecture | None,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each atomically, the spec last.

    Raises:
        CheckpointError: the model's modules or tensors are not those of `architecture`.
        StorageError: the folder cannot be written.
    """
    sizes = _sizes(model) if architecture is None else _changed_sizes(model, architecture)
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    files.write_tensors(folder / WEIGHTS_FILE, tensors)
    spec = RebuildSpec(
        architecture,
        _class_of(model),
        sizes,
        _is_channels_last(model),
        preprocessing,
        tuple(class_names),
        files.sha256(folder / WEIGHTS_FILE),
        pruned_heads(model),
    )
    files.write_text(folder / SPEC_FILE, json.dumps({"format": SPEC_FORMAT} | asdict(spec), indent=1) + "\n")


def read_spec(folder: Path) -> RebuildSpec:
    """Raises StorageError when `folder` holds no saved model, or one of another version."""
    path = folder / SPEC_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != SPEC_FORMAT:
            raise StorageError(f"{path} was written by another version of this tool: compress the model again.")
        architecture, preprocessing = values.pop("architecture"), values.pop("preprocessing")
        names = tuple(values.pop("class_names"))
        return RebuildSpec(
            architecture=None if architecture is None else Architecture(**architecture),
            preprocessing=Preprocessing.from_dict(preprocessing), class_names=names, **values,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise StorageError(
            f"{folder} holds no saved model ({SPEC_FILE} is missing): give the artifacts folder of a finished run."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: restore it, or compress the model again.") from error


def rebuild(folder: Path, *, model: nn.Module | None = None) -> nn.Module:
    """The saved model in eval mode, equal to it bit for bit.

    Args:
        model: an instance of the user's own module, when the saved model is not a torchvision architecture; a copy of
            it is resized, so it stays as it is.

    Raises:
        StorageError: the folder holds no model, or the weights are not the ones that were saved.
        CheckpointError: `model` is missing, not needed, or not the module that was saved.
    """
    spec = read_spec(folder)
    tensors = _read_weights(folder, spec)
    if spec.architecture is None and model is None:
        raise CheckpointError(
            f"The saved model is a {spec.model_class} of your own: give a fresh instance of it with model=."
        )
    if spec.architecture is not None and model is not None:
        raise CheckpointError(
            f"The saved model is torchvision's {spec.architecture.name} and is built from that: leave model= out."
        )
    if model is None:
        assert spec.architecture is not None
        model = build(spec.architecture)
    else:
        require_class(spec, model)
        model = copy.deepcopy(model)
    try:
        give_heads(model, spec.heads)
    except ValueError as error:
        raise CheckpointError(
            f"The model is not built like the saved one: {error}. Give the class it was made from."
        ) from error
    _resize(model, spec.sizes, tensors)
    load_weights(model, tensors)
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.eval()


def require_class(spec: RebuildSpec, model: nn.Module) -> None:
    """Raises CheckpointError when `model` is of another class than the one that was saved."""
    if _class_of(model) != spec.model_class:
        raise CheckpointError(
            f"The saved model is a {spec.model_class}, but model= is a {_class_of(model)}: give an instance of the "
            "former."
        )


def _read_weights(folder: Path, spec: RebuildSpec) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise StorageError(f"{folder} holds no {WEIGHTS_FILE}: give the artifacts folder of a finished run.")
    if files.sha256(path) != spec.weights_sha256:
        raise StorageError(
            f"{path} is not the file that was saved (its SHA-256 differs): restore it, or compress the model again."
        )
    return load_tensors(path.read_bytes())


def _resize(model: nn.Module, sizes: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Give modules their saved widths, and room for the saved tensors."""
    modules, present = dict(model.named_modules()), model.state_dict()
    strange = sorted(set(sizes) - set(modules)) + sorted(set(tensors) ^ set(present))
    if strange:
        raise CheckpointError(
            f"The model is not built like the saved one: they differ in {strange[0]}. Give the class it was made from."
        )
    for name, values in sizes.items():
        for key, value in values.items():
            setattr(modules[name], key, tuple(value) if isinstance(value, list) else value)
    smaller: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        if present[name].shape == tensor.shape:
            continue
        owner, _, key = name.rpartition(".")
        old = getattr(modules[owner], key)
        if id(old) not in smaller:  # a tied tensor stays one
            new = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
            smaller[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        setattr(modules[owner], key, smaller[id(old)][1])


def _sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    sizes = {  # of the instances: a class may derive one from the layers within, as timm's ConvNormAct does
        name: {key: vars(module)[key] for key in _SIZES if isinstance(vars(module).get(key), int | tuple)}
        for name, module in model.named_modules()
    }
    return {name: values for name, values in sizes.items() if values}


def _changed_sizes(model: nn.Module, architecture: Architecture) -> dict[str, dict[str, Any]]:
    fresh = build_empty(architecture)
    heads = {name: count for name, count in pruned_heads(model).items() if name in dict(fresh.named_modules())}
    give_heads(fresh, heads)
    kinds = {name: type(module) for name, module in fresh.named_modules()}
    for name, module in model.named_modules():
        if kinds.get(name) is not type(module):
            raise CheckpointError(
                f"{name or 'The model'} is a {type(module).__name__}, which {architecture.name} does not have there."
            )
    missing = set(fresh.state_dict()) ^ set(model.state_dict())
    if missing:
        raise CheckpointError(
            f"The tensors of the model are not those of {architecture.name}: they differ in {min(missing)}."
        )
    before = _sizes(fresh)
    changed = {
        name: {key: value for key, value in values.items() if before.get(name, {}).get(key) != value}
        for name, values in _sizes(model).items()
    }
    return {name: values for name, values in changed.items() if values}


def _is_channels_last(model: nn.Module) -> bool:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous() for weight in weights
    )


def _class_of(model: nn.Module) -> str:
    """A parametrized module's class is one that torch made; its parent is the user's."""
    kind = type(model).__bases__[0] if is_parametrized(model) else type(model)
    return f"{kind.__module__}.{kind.__qualname__}"
