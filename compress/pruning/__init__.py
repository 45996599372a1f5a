"""Pruning: a plan that can be read, NNI's pruners, and a shrunk model that is proved equal to the masked one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import RequestError
from .plan import Group, LeftOut, Plan, plan
from .trace import trace

__all__ = ["PRUNERS", "Group", "LeftOut", "Plan", "Pruner", "Shrunk", "plan", "prune", "trace"]


@dataclass(frozen=True)
class Pruner:
    """A way to choose which channels go."""

    name: str
    """Key into PRUNERS, as written in a request."""
    title: str
    summary: str
    """What it does, in one line."""
    needs_data: str
    """What it looks at besides the weights: "nothing", or which images."""
    cost: str
    paper: str
    nni_class: str
    """Name of the class in nni.compression.pruning."""


@dataclass(frozen=True)
class Shrunk:
    """A really smaller model, and how far its answers are from the masked model's.

    Attributes:
        model: of the original class, its layers replaced; modes and requires_grad as in the input model.
        plan: what was removed.
        max_abs_diff: largest absolute difference to the masked model, over the outputs on the example images.
        reference_scale: largest absolute output of the masked model.
        kept: layer -> which of its output channels stay, bool [channels before].
        seconds: wall time of masking, shrinking and checking.
    """

    model: nn.Module
    plan: Plan
    max_abs_diff: float
    reference_scale: float
    kept: Mapping[str, torch.Tensor]
    seconds: float


def _registry(*pruners: Pruner) -> dict[str, Pruner]:
    names = [pruner.name for pruner in pruners]
    if len(set(names)) != len(names):
        raise ValueError(f"two pruners share a name: {names}")
    return {pruner.name: pruner for pruner in pruners}


PRUNERS: dict[str, Pruner] = _registry(
    Pruner(
        "l1-norm",
        "L1 norm",
        "Removes the channels whose weights have the smallest sum of absolute values.",
        "nothing",
        "under a second",
        "Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        "L1NormPruner",
    ),
    Pruner(
        "l2-norm",
        "L2 norm",
        "Removes the channels whose weights have the smallest Euclidean norm.",
        "nothing",
        "under a second",
        "Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710",
        "L2NormPruner",
    ),
    Pruner(
        "fpgm",
        "Geometric median",
        "Removes the channels nearest to all others, which the others can replace.",
        "nothing",
        "seconds for wide layers",
        "He et al., Filter Pruning via Geometric Median, CVPR 2019, arXiv:1811.00250",
        "FPGMPruner",
    ),
)


def prune(model: nn.Module, example: torch.Tensor, plan: Plan, pruner: str) -> Shrunk:
    """Remove from a copy of `model` what `plan` says, choosing the channels with `pruner`.

    The input model (weights, gradients, requires_grad, train/eval flags) and the random generators are left untouched,
    also when this fails.

    Args:
        model: the module that the plan was made for.
        example: float32 images [N, C, H, W] on the model's device; the first one and noise of its shape are the
            images of the equality check.
        plan: from `plan(model, ...)`.
        pruner: key into PRUNERS.

    Raises:
        RequestError: no such pruner.
        PruningError: the plan was made for another model, or NNI cannot shrink a module.
        HandoffError: the shrunk model is not equal to the masked model within 1e-4 of its scale, in float32.
    """
    if pruner not in PRUNERS:
        raise RequestError("pruner", pruner, f"one of {', '.join(PRUNERS)}")
    from . import speedup  # imports NNI

    return speedup.shrink(model, example, plan, PRUNERS[pruner])
