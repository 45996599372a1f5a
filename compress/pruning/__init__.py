"""Pruning: a plan that can be read, NNI's pruners, and a pruned model that is proved equal to the masked one."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import RequestError
from compress.methods.pruners import PRUNERS, SEARCHES, Pruner
from compress.pruning.interface import Group, Plan, PrunedModel, PruningTraining, SparseModel, Unpruned
from compress.pruning.plan import plan, plan_without_shrinking
from compress.pruning.shortfall import shortfall
from compress.tracing.graph import trace

__all__ = [
    "PRUNERS",
    "SEARCHES",
    "Group",
    "Plan",
    "PrunedModel",
    "Pruner",
    "PruningTraining",
    "SparseModel",
    "Unpruned",
    "plan",
    "plan_without_shrinking",
    "prune",
    "require_usable",
    "shortfall",
    "trace",
    "zero_weights",
]


def prune(
    model: nn.Module, example: torch.Tensor, plan: Plan, pruner: str, training: PruningTraining | None = None
) -> PrunedModel:
    """Remove from a copy of `model` what `plan` says, choosing the channels with `pruner`.

    The input model (weights, gradients, requires_grad, train/eval flags) and the random generators are left untouched,
    also when this fails. The result carries the weights trained on the way where the pruner says `leaves_trained`.

    Args:
        model: the module that the plan was made for.
        example: float32 images [N, C, H, W] on the model's device; the first one and noise of its shape are the
            images of the equality check.
        plan: from `plan(model, ...)`.
        pruner: key into PRUNERS, not a fine-grained one.
        training: for the pruners that need images.

    Raises:
        RequestError: no such pruner, or it needs images and got none.
        PruningError: the plan was made for another model, or NNI cannot shrink a module.
        TrainingError: the training diverged, or there is not one batch.
        HandoffError: the pruned model is not equal to the masked model within 1e-4 of its scale, in float32.
    """
    if pruner not in PRUNERS or PRUNERS[pruner].fine_grained:
        known = ", ".join(name for name, one in PRUNERS.items() if not one.fine_grained)
        raise RequestError("pruner", pruner, f"one of {known}")
    if PRUNERS[pruner].needs_images and training is None:
        raise RequestError("pruner", pruner, f"one that needs no images, because none were given: {_without_images()}")
    from compress.pruning import speedup  # imports NNI

    return speedup.shrink(model, example, plan, PRUNERS[pruner], training)


def zero_weights(model: nn.Module, plan: Plan, sparsity: float) -> SparseModel:
    """Set the fraction `sparsity` of smallest weights to zero in a copy of `model`, in each layer of `plan.sparse_layers`.

    Args:
        plan: from `plan_without_shrinking(model, ...)`.
        sparsity: 0 < sparsity < 1; int(sparsity * weights) of each layer go.
    """
    from compress.pruning.nni import backend

    return backend.zero_weights(model, plan, sparsity)


def require_usable(model: nn.Module, example: torch.Tensor, plan: Plan, pruner: str, *, has_images: bool) -> None:
    """Refuse a pruner that cannot work on this model or without images, before any work is done.

    Args:
        example: float32 [N, C, H, W]; only the shape is used.

    Raises:
        RequestError: it needs images and there are none, or BatchNorm factors and no planned layer has any.
    """
    if PRUNERS[pruner].needs_images and not has_images:
        allowed = f"one that needs no images, because data is `none`: {_without_images()}"
        raise RequestError("pruner", pruner, allowed)
    if PRUNERS[pruner].needs_batch_norm:
        from compress.pruning.channel_statistics import normalised_groups

        normalised_groups(model, example, plan, pruner)


def _without_images() -> str:
    return ", ".join(name for name, pruner in PRUNERS.items() if not pruner.needs_images)
