"""The torchvision classifiers on offer, with what torchvision publishes about their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torchvision
from torch import Tensor

from compress.errors import CheckpointError, RequestError
from compress.preprocessing import Preprocessing

_INPUT_RESCALED = ("googlenet", "inception_v3")
"""Their published weights run with `transform_input=True`, which turns ImageNet's normalisation into mean 0.5 and
standard deviation 0.5. Given that normalisation directly, the model needs no such step."""
_OLD_DENSENET_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


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
    """Torchvision's default weights, downloaded once into its own cache and checked against their hash.

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
