"""NNI's pruners that compute gradients or train, run on a copy of the model.

Each function takes the copy, example images float32 [N, C, H, W], the plan and the training, and returns NNI's masks. The
copy is left unwrapped, with the trained weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from compress import nni_bridge
from compress.methods.pruners import Pruner
from compress.pruning.channel_statistics import factor_scores, normalised_groups
from compress.pruning.interface import Plan, PruningTraining
from compress.pruning.nni.config import Masks, config_list, make_comparable
from compress.pruning.nni.data_driven import masks_by_score
from compress.pruning.nni.evaluator import gradient_evaluator, training_evaluator
from compress.training import MOMENTUM, one_cycle

SLIM_REACH = 0.25
"""How far the L1 penalty alone moves a BatchNorm factor in the whole training; factors start near 1.

Liu et al. use a penalty of 1e-4 over 160 epochs, which in half an epoch would do nothing: what counts is the penalty
times the sum of all learning rates.
"""


def taylor(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """The sum of (gradient * weight)^2 over a channel's weights, averaged over batches (Molchanov et al. 2019).

    `example` is float32 [N, C, H, W].
    """
    model.requires_grad_(True)
    evaluator = gradient_evaluator(model, training)
    pruner = _nni_pruners().TaylorPruner(model, config_list(model, plan), evaluator, training.steps)
    return _run(pruner, plan)


def gradual(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """NNI's LinearPruner or AGPPruner on top of L1NormPruner: after each round of training a larger share is masked.

    `example` is float32 [N, C, H, W].
    """
    # Given to the scheduling pruner instead, the evaluator would not train the pruned layers at all.
    inner = _nni_pruners().L1NormPruner(model, config_list(model, plan), training_evaluator(model, training))
    make_comparable(inner, plan)
    pruner = getattr(_nni_pruners(), method.nni_class)(inner, training.steps // training.rounds, training.rounds)
    return _run(pruner, plan, training.steps)


def movement(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """NNI's MovementPruner: scores are learned from the start; masks grow in the middle half of the training.

    `example` is float32 [N, C, H, W].
    """
    start = training.steps // 4
    end = max(start + 1, 3 * training.steps // 4)
    evaluator = training_evaluator(model, training)
    pruner = _nni_pruners().MovementPruner(model, config_list(model, plan), evaluator, start, end)
    return _run(pruner, plan, training.steps)


def slim(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """BatchNorm factors trained with NNI's SlimPruner, used as scores of the layers whose channels they scale.

    Masks of a BatchNorm alone would make no layer smaller. A group of layers is ranked by the mean absolute value of all
    factors that scale its channels; without any, by the L1 norm of its weights. `example` is float32 [N, C, H, W].
    """
    groups = normalised_groups(model, example, plan, method.name)
    norms = sorted({name for group in groups for name, _ in group})
    nni_bridge.know_subclasses(model, norms)
    config = [{"op_names": norms, "target_names": ["weight"], "sparse_ratio": 0.5}]  # its masks are not used
    evaluator = training_evaluator(model, training)
    pruner = _slim_class()(model, config, evaluator, training.steps, _penalty(training) * len(norms))
    pruner.compress()
    factors = {name: pruner.scaling_factors[name]["weight"].detach() for name in norms}
    pruner.unwrap_model()
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_submodule(name).get_parameter("weight").copy_(factor)
    return masks_by_score(model, plan, factor_scores(groups, factors, lambda group: _l1_norm(model, plan, group)))


def _penalty(training: PruningTraining) -> float:
    """The penalty that moves a factor by SLIM_REACH: a gradient of 1 moves it by the sum of all learning rates, with momentum."""
    distance = sum(
        training.learning_rate * one_cycle(step / training.steps) * (1 - MOMENTUM ** (step + 2)) / (1 - MOMENTUM)
        for step in range(training.steps)
    )
    return SLIM_REACH / distance


def _run(pruner: Any, plan: Plan, *steps: int) -> Masks:
    make_comparable(pruner, plan)
    masks: Masks = pruner.compress(*steps, *[None] * len(steps))[1]
    pruner.unwrap_model()
    return masks


def _l1_norm(model: nn.Module, plan: Plan, group: int) -> Tensor:
    weights = [model.get_submodule(layer).get_parameter("weight").detach() for layer in plan.groups[group].layers]
    return torch.stack([weight.flatten(1).abs().sum(1) for weight in weights]).mean(0)


def _nni_pruners() -> Any:
    return nni_bridge.load("nni.compression.pruning")


@functools.cache
def _slim_class() -> type:
    """NNI's SlimPruner on BatchNorm with the factors of the paper.

    NNI trains a factor beside gamma, by Adam at a rate of its own, penalises it and ranks by it alone. Here the factor
    takes the place of gamma and is trained as every other weight.
    """

    class Slim(_nni_pruners().SlimPruner):  # type: ignore[misc]
        def _register_scaling_facotrs(self) -> None:  # NNI's spelling
            super()._register_scaling_facotrs()
            for name, factors in self.scaling_factors.items():
                gamma = self._target_spaces[name]["weight"].target
                with torch.no_grad():
                    factors["weight"].copy_(gamma)
                    gamma.fill_(1.0)
                gamma.requires_grad_(False)

        def _register_factors_optimization(self, evaluator: Any) -> None:
            factors = [factor for targets in self.scaling_factors.values() for factor in targets.values()]
            evaluator._optimizers[0].add_param_group({"params": factors, "weight_decay": 0.0})

    return Slim
