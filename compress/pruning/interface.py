"""The types that pruning takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import RequestError
from compress.pruning.graph.channel_sets import Kind


@dataclass(frozen=True)
class Group:
    """Layers that keep the same output channels, or one attention module, whose heads together are its channels."""

    layers: tuple[str, ...]
    """Names of the Conv2d and Linear modules, in the order of the forward pass; or of the attention module."""
    channels_before: int
    channels_after: int
    reason: str
    """Why these layers share their channels, in a user's words."""
    unit: int = 1
    """Neighbouring channels that are kept or removed together: the width of a convolution's groups, or of a head."""
    blocks: int = 1
    """Equal parts of the channels that each keep the same number: the groups of a grouped convolution."""


@dataclass(frozen=True)
class Unpruned:
    """A layer that keeps all its output channels."""

    layer: str
    reason: str
    """Why it is not pruned, as the end of a sentence about the layer."""
    kind: Kind = "structure"
    cause: str = ""
    """The reason of the layer that it shares its channels with; its own where that is itself."""


@dataclass(frozen=True)
class Plan:
    """What will be removed from a model. Input channels follow from the output channels of the layers before."""

    groups: tuple[Group, ...]
    unpruned: tuple[Unpruned, ...]
    sparse_layers: tuple[str, ...] = ()
    """Layers that keep their shape and get zeros among their weights, by a fine-grained pruner."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers, ready for JSON, under the keys that records have."""
        fields = asdict(self)
        return {"groups": fields["groups"], "left_out": fields["unpruned"], "thinned": fields["sparse_layers"]}

    @property
    def layers(self) -> dict[str, Group]:
        """The group of each layer that loses channels."""
        return {layer: group for group in self.groups for layer in group.layers}


@dataclass(frozen=True)
class PruningTraining:
    """How a pruner looks at images and trains.

    Attributes:
        batches: epoch number -> batches of (images float32 [N, C, H, W], labels int64 [N]; -1 where unknown), all of
            one size; never test images.
        loss: loss(model, images, labels) -> scalar to train by.
        steps: batches to look at, or optimizer steps to make, over all rounds; at least `rounds`.
        learning_rate: peak of the cycle (SGD).
        rounds: of gradual pruning: train, prune, train again.
        progress: called with the fraction done and a text.
    """

    batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    steps: int
    learning_rate: float
    rounds: int = 5
    progress: Callable[[float, str], None] = lambda fraction, text: None

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.steps:
            raise RequestError("rounds", self.rounds, f"a whole number from 1 to the {self.steps} training steps")


@dataclass(frozen=True)
class PrunedModel:
    """A really smaller model, and how far its answers are from the masked model's.

    Attributes:
        model: of the original class, its layers replaced; modes and requires_grad as in the input model.
        plan: what was removed.
        max_abs_diff: largest absolute difference to the masked model, over the outputs on the example images.
        reference_scale: largest absolute output of the masked model.
        kept_channels: layer -> which of its output channels stay, bool [channels before].
        seconds: wall time of choosing, shrinking and checking.
    """

    model: nn.Module
    plan: Plan
    max_abs_diff: float
    reference_scale: float
    kept_channels: Mapping[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class SparseModel:
    """A model of the original shape with single weights at zero.

    Attributes:
        model: a copy of the original; modes and requires_grad as there.
        zeros: layer -> share of its weights that are zero.
    """

    model: nn.Module
    zeros: Mapping[str, float]


def clause(subject: str, reason: str) -> str:
    """`reason`, as an `Unpruned` has it, with a subject: "it", "which", or the name of the layer.

    Reasons speak of the layer ("feeds LayerNorm") or of its channels ("its channels go through sort()").
    """
    if not reason.startswith("its "):
        return f"{subject} {reason}"
    owned = reason.removeprefix("its ")
    return {"it": reason, "which": f"whose {owned}"}.get(subject, f"the {owned.replace(' ', f' of {subject} ', 1)}")
