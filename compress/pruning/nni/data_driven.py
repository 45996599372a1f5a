"""Data-driven pruners that NNI 3.0 no longer has, implemented on its base classes from their papers.

Each function takes a copy of the model, example images float32 [N, C, H, W], the plan and the training, and returns NNI's
masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress import nni_bridge
from compress.methods.pruners import Pruner
from compress.pruning.channel_statistics import activation_scores
from compress.pruning.interface import Plan, PruningTraining
from compress.pruning.nni.config import Masks, config_list, make_comparable
from compress.pruning.nni.evaluator import first_batches, training_evaluator

Metrics = dict[str, dict[str, Tensor]]
"""layer -> parameter name -> values."""

_PRUNER = "nni.compression.base.compressor.Pruner"
_SCHEDULED = "nni.compression.pruning.scheduled_pruner.ScheduledPruner"
ADMM_PENALTY = 1e-3
"""rho of Zhang et al. 2018: strength of the pull towards the pruned weights."""


def by_activation(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """Ranks channels by their activations on `training.steps` batches, by the statistic of the pruner's name;
    `example` is float32 [N, C, H, W]."""
    images = first_batches(training, training.steps)
    return masks_by_score(model, plan, activation_scores(model, example, plan, images, method.name))


def masks_by_score(model: nn.Module, plan: Plan, scores: list[Tensor]) -> Masks:
    """Keep the channels of the largest scores in each group.

    Args:
        model: left unwrapped.
        scores: for each group of `plan`, float of shape [channels].
    """
    by_layer = {layer: score for group, score in zip(plan.groups, scores, strict=True) for layer in group.layers}
    with torch.no_grad():
        pruner = _on_nni(Scored, _PRUNER)(model, config_list(model, plan), by_layer)
        make_comparable(pruner, plan)
        masks: Masks = pruner.compress(None, None)[1]
    pruner.unwrap_model()
    return masks


def admm(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """Zhang et al. 2018, scaled form, with whole channels in place of single weights.

        W <- SGD on loss(W) + rho/2 ||W - Z + U||^2        for one round
        Z <- Euclidean projection of W + U onto the weights that have no more than the planned channels
        U <- U + W - Z

    Z and U start as the projection of W and zero. After the last round the channels of smallest norm are masked. `example`
    is float32 [N, C, H, W].
    """
    pruner = _on_nni(ADMM, _PRUNER)(
        model, config_list(model, plan), training_evaluator(model, training), training.steps // training.rounds
    )
    return _trained(pruner, plan, training)


def lottery_ticket(model: nn.Module, example: Tensor, plan: Plan, training: PruningTraining, method: Pruner) -> Masks:
    """Frankle and Carbin 2019, iterative pruning with resetting.

    Each of n rounds trains, keeps the share p^(1/n) of the remaining channels by their L1 norm, p being the share kept at the
    end, and resets the weights to their original values. A masked channel stays masked. `example` is float32 [N, C, H, W].
    """
    pruner = _on_nni(LotteryTicket, _SCHEDULED)(
        model, config_list(model, plan), training_evaluator(model, training), training.rounds
    )
    return _trained(pruner, plan, training)


def _trained(pruner: Any, plan: Plan, training: PruningTraining) -> Masks:
    make_comparable(pruner, plan)
    masks: Masks = pruner.compress(training.steps, None)[1]
    pruner.unwrap_model()
    return masks


@functools.cache
def _on_nni(method: type, base: str) -> Any:
    """The class of `method` on NNI's class `base`, such as "nni.compression.base.compressor.Pruner"."""
    module, _, name = base.rpartition(".")
    return type(method.__name__, (method, getattr(nni_bridge.load(module), name)), {})


class _Ranked:
    """NNI removes the channels of the smallest metrics, by the rules of its config list.

    Declared here is what NNI's base class adds, which `_on_nni` mixes in: NNI is imported late, and has no types.
    """

    _target_spaces: dict[str, dict[str, Any]]
    sparse_goals: dict[str, dict[str, dict[str, float]]]
    bound_model: nn.Module
    update_masks: Callable[[Masks], None]
    generate_masks: Callable[[], Masks]
    _fusion_compress: Callable[[int, None], None]
    _init_sparse_goals: Callable[[], None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    def _generate_sparsity(self, metrics: Metrics) -> Masks:
        masks: Masks = _tools().generate_sparsity(metrics, self._target_spaces)
        return masks

    def _shrunk(self, data: Metrics, reduce: Callable[[Tensor], Tensor]) -> Metrics:
        """One number for each prunable unit: `reduce` over the last dimension of its values."""
        return {
            layer: {
                name: self._target_spaces[layer][name]._scaler.shrink(value, reduce, keepdim=True)
                for name, value in targets.items()
            }
            for layer, targets in data.items()
        }


class Scored(_Ranked):
    """Channels whose scores are known."""

    def __init__(self, model: nn.Module, config: list[dict[str, Any]], scores: dict[str, Tensor]) -> None:
        super().__init__(model, config)
        self._scores = scores

    def _collect_data(self) -> Metrics:
        data = {}
        for layer, score in self._scores.items():
            weight = self._target_spaces[layer]["weight"].target
            data[layer] = {"weight": score.to(weight).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)}
        return data

    def _calculate_metrics(self, data: Metrics) -> Metrics:
        return self._shrunk(data, lambda scores: scores.mean(-1))

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self.update_masks(self.generate_masks())


class ADMM(_Ranked):
    """See `admm`.

    Attributes:
        weights, pruned, dual: W, Z and U of each layer.
    """

    def __init__(self, model: nn.Module, config: list[dict[str, Any]], evaluator: Any, interval: int) -> None:
        super().__init__(model, config, evaluator)
        self._interval, self._step = interval, 0

    def _collect_data(self) -> Metrics:
        weights: Metrics = _tools().active_sparse_targets_filter(self._target_spaces)
        return weights

    def _calculate_metrics(self, data: Metrics) -> Metrics:
        # Squares, because NNI averages over a group: their sum is what a projection of all its layers loses.
        return self._shrunk(data, lambda weights: weights.square().sum(-1))

    def project(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The nearest weights, in Euclidean distance, with no more than the planned channels: layer -> of the weight's shape."""
        data = {layer: {"weight": value} for layer, value in values.items()}
        masks = self._generate_sparsity(self._calculate_metrics(data))
        return {layer: value * masks[layer]["weight"] for layer, value in values.items()}

    def _fuse_preprocess(self, evaluator: Any) -> None:
        self.start()
        evaluator.patch_loss(lambda loss, batch: loss + ADMM_PENALTY / 2 * self.distance())
        evaluator.patch_optimizer_step([], [self._after_step])

    @torch.no_grad()
    def start(self) -> None:
        self.weights = {layer: spaces["weight"].target for layer, spaces in self._target_spaces.items()}
        self.dual = {layer: torch.zeros_like(weight) for layer, weight in self.weights.items()}
        self.pruned = self.project(self.weights)

    def distance(self) -> Tensor:
        """||W - Z + U||^2 over all layers, a scalar."""
        gaps = [weight - self.pruned[layer] + self.dual[layer] for layer, weight in self.weights.items()]
        return torch.stack([gap.square().sum() for gap in gaps]).sum()

    def _after_step(self) -> None:
        self._step += 1
        if self._step % self._interval == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Z and U for the present W."""
        self.pruned = self.project({layer: weight + self.dual[layer] for layer, weight in self.weights.items()})
        self.dual = {layer: self.dual[layer] + weight - self.pruned[layer] for layer, weight in self.weights.items()}

    def _fuse_postprocess(self, evaluator: Any) -> None:
        self.update_masks(self.generate_masks())

    def _single_compress(self, max_steps: int, max_epochs: None) -> None:
        self._fusion_compress(max_steps, max_epochs)


class LotteryTicket(_Ranked):
    """See `lottery_ticket`."""

    def __init__(self, model: nn.Module, config: list[dict[str, Any]], evaluator: Any, rounds: int) -> None:
        super().__init__(model, config, evaluator)
        self._rounds = rounds
        self._init_sparse_goals()

    def update_sparse_goals(self, current_times: int) -> None:
        for layer, targets in self.sparse_goals.items():
            for name, goals in targets.items():
                for key, goal in goals.items():
                    left = (1 - goal) ** (current_times / self._rounds)
                    setattr(self._target_spaces[layer][name], key, 1 - left)

    def _collect_data(self) -> Metrics:
        weights = _tools().active_sparse_targets_filter(self._target_spaces)
        return {
            layer: {name: value * self._target_spaces[layer][name].mask for name, value in targets.items()}
            for layer, targets in weights.items()
        }

    def _calculate_metrics(self, data: Metrics) -> Metrics:
        return self._shrunk(data, lambda weights: weights.abs().sum(-1))

    def _fuse_preprocess(self, evaluator: Any) -> None:
        """Nothing: masks change between the trainings, not in them."""

    _fuse_postprocess = _fuse_preprocess

    def _single_compress(self, max_steps: int, max_epochs: None) -> None:
        state = self.bound_model.state_dict()
        original = {name: value.clone() for name, value in state.items() if not name.endswith("_mask")}
        for times in range(1, self._rounds + 1):
            self._fusion_compress(max_steps // self._rounds, None)
            self.update_sparse_goals(times)
            masks = self.generate_masks()
            self.bound_model.load_state_dict(original, strict=False)
            self.update_masks(masks)


def _tools() -> Any:
    return nni_bridge.load("nni.compression.pruning.tools")
