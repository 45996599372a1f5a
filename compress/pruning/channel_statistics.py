"""Importance of channels from activations and from BatchNorm factors, wherever in the graph a group's channels are.

Scores are float [channels]; smaller is less important. A group's channels may be in several places, as on a residual
stream: its score is the mean over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.errors import RequestError
from compress.pruning.channels import LAYERS, Channels, analyse
from compress.pruning.graph.operations import operation_name
from compress.pruning.interface import Plan

ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
                      nn.Mish, nn.Hardswish)  # fmt: skip
ACTIVATIONS = frozenset(
    ("relu relu_ relu6 leaky_relu leaky_relu_ prelu elu elu_ selu celu gelu silu mish hardswish").split()
)
"""Functions that let positive values through. Sigmoid and tanh are gates: their result is no activation."""

STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "activation-apoz": lambda values: (values > 0).float(),
    "activation-mean": torch.abs,
}
"""Pruner -> statistic of each value of an activation; averaged over images and positions.

The share of positive values is 1 - APoZ (Hu et al. 2016, equation 1) after a ReLU, and is still meaningful after functions
that give small negative values. After a ReLU the mean absolute value is the mean (Molchanov et al. 2016).
"""


@dataclass(frozen=True)
class Place:
    """Where a tensor or a BatchNorm carries the channels of a group: `span` neighbouring features each, from `start`."""

    group: int
    dim: int
    start: int
    channels: int
    span: int

    def take(self, values: Tensor) -> Tensor:
        """The group's values, [channels, everything else], from a tensor that has its features along `dim`."""
        features = values.movedim(self.dim, 0).narrow(0, self.start, self.channels * self.span)
        return features.reshape(self.channels, -1)


def activation_scores(
    model: nn.Module, example: Tensor, plan: Plan, batches: Iterable[tuple[Tensor, Tensor]], statistic: str
) -> list[Tensor]:
    """The mean of a statistic over the activations of each group: float32 [channels], >= 0, over all images and positions.

    It is taken from the results of the activation functions (ACTIVATIONS) that carry the group's channels; where there is
    none, as in a linear bottleneck, from what the following layers read.

    Args:
        example: float32 [N, C, H, W]; only the shape is used.
        batches: (images float32 [N, C, H, W] on the model's device, labels), read once.
        statistic: key into STATISTICS.
    """
    channels = analyse(model, example)
    recorder = _Recorder(channels.graph_module, _activation_places(channels, plan), STATISTICS[statistic])
    with torch.no_grad():
        for images, _ in batches:
            recorder.run(images)
    return recorder.means(len(plan.groups))


def normalised_groups(
    model: nn.Module, example: Tensor, plan: Plan, pruner: str = "slim"
) -> list[list[tuple[str, Place]]]:
    """For each group of `plan` the BatchNorms whose trainable factors scale its channels, and where in them.

    Args:
        example: float32 [N, C, H, W]; only the shape is used.
        pruner: the name that a refusal names.

    Raises:
        RequestError: no group has one, so that there is nothing to penalise.
    """
    channels = analyse(model, example)
    groups: list[list[tuple[str, Place]]] = [[] for _ in plan.groups]
    factors = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine and module.weight.requires_grad
    }
    for node in channels.graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target) in factors:
            for place in _places(node, channels, plan):
                groups[place.group].append((str(node.target), place))
    if not any(groups):
        allowed = (
            f"another one, such as l1-norm, because no layer that can be pruned in {type(model).__name__} is followed by "
            "a BatchNorm with factors to train"
        )
        raise RequestError("pruner", pruner, allowed)
    return groups


def factor_scores(
    groups: list[list[tuple[str, Place]]], factors: Mapping[str, Tensor], fallback: Callable[[int], Tensor]
) -> list[Tensor]:
    """The mean absolute BatchNorm factor of each group's channels (Liu et al. 2017): float of shape [channels], >= 0.

    Args:
        groups: from `normalised_groups`.
        factors: BatchNorm -> its factors, float [features].
        fallback: the scores of a group without BatchNorm, float [channels], from its index.
    """
    scores = []
    for index, norms in enumerate(groups):
        sizes = [place.take(factors[name].abs()[None]).mean(1) for name, place in norms]
        scores.append(torch.stack(sizes).mean(0) if sizes else fallback(index))
    return scores


def _places(node: fx.Node, channels: Channels, plan: Plan) -> Iterator[Place]:
    axis = channels.axes.get(node)
    if axis is None:
        return
    groups = {channels.sets.root(channels.own_set[group.layers[0]]): index for index, group in enumerate(plan.groups)}
    start = 0
    for part in axis.parts:
        group = groups.get(channels.sets.root(part.set_id))
        if group is not None and part.span.denominator == 1:  # behind a pixel shuffle there are no single channels
            yield Place(group, axis.dim, start, part.channels, int(part.span))
        start += part.features


def _activation_places(channels: Channels, plan: Plan) -> dict[fx.Node, list[Place]]:
    places: dict[fx.Node, list[Place]] = {}
    read: dict[fx.Node, list[Place]] = {}
    for node in channels.graph_module.graph.nodes:
        module = channels.modules[str(node.target)] if node.op == "call_module" else None
        if type(module) in LAYERS:
            read[node.all_input_nodes[0]] = list(_places(node.all_input_nodes[0], channels, plan))
        elif type(module) in ACTIVATION_MODULES or (module is None and operation_name(node) in ACTIVATIONS):
            places[node] = list(_places(node, channels, plan))
    activated = {place.group for at_node in places.values() for place in at_node}
    for node, at_node in read.items():
        places.setdefault(node, []).extend(place for place in at_node if place.group not in activated)
    return {node: at_node for node, at_node in places.items() if at_node}


class _Recorder(fx.Interpreter):
    """Runs the network and sums a statistic of the tensors at some nodes, as each is computed."""

    def __init__(
        self, graph_module: fx.GraphModule, places: Mapping[fx.Node, list[Place]], statistic: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(graph_module)
        self._places, self._statistic = places, statistic
        self._sums: dict[tuple[fx.Node, Place], Tensor] = {}
        self._counts: dict[tuple[fx.Node, Place], int] = defaultdict(int)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        for place in self._places.get(n, ()):
            values = place.take(self._statistic(result))
            total = values.sum(1, dtype=torch.float64)
            self._sums[n, place] = self._sums[n, place] + total if (n, place) in self._sums else total
            self._counts[n, place] += values.shape[1]
        return result

    def means(self, groups: int) -> list[Tensor]:
        """For each group the mean over its places: float32 [channels] on the CPU."""
        means: list[list[Tensor]] = [[] for _ in range(groups)]
        for (node, place), total in self._sums.items():
            means[place.group].append((total / self._counts[node, place]).float().cpu())
        return [torch.stack(of_group).mean(0) for of_group in means]
