"""What images and BatchNorms say about the channels of each group, wherever in the graph those channels are.

Scores are float [channels]; smaller means less needed. A group's channels may be seen in several places, as on a
residual stream: its score is the mean over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.errors import RequestError
from compress.pruning.channels import LAYERS, Channels
from compress.pruning.graph.operations import operation_name
from compress.pruning.plan import Plan
from compress.tracing.graph import probe, traced_copy

ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
                      nn.Mish, nn.Hardswish)  # fmt: skip
ACTIVATIONS = frozenset(
    {
        *(
            "relu",
            "relu_",
            "relu6",
            "leaky_relu",
            "leaky_relu_",
            "prelu",
            "elu",
            "elu_",
            "selu",
            "celu",
            "gelu",
            "silu",
        ),
        *("mish", "hardswish"),
    }
)
"""Functions that let positive values through. Sigmoid and tanh are gates: what they give is no activation."""

STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "activation-apoz": lambda values: (values > 0).float(),
    "activation-mean": torch.abs,
}
"""Per value of an activation; averaged over images and positions.

The share of positive values is 1 - APoZ (Hu et al. 2016, equation 1) behind a ReLU, and goes on to mean something behind
functions that give small negative values. Behind a ReLU the mean absolute value is the mean (Molchanov et al. 2016).
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
        """[channels, everything else] out of a tensor that carries its channels along `dim`."""
        features = values.movedim(self.dim, 0).narrow(0, self.start, self.channels * self.span)
        return features.reshape(self.channels, -1)


def activation_scores(
    model: nn.Module, example: Tensor, plan: Plan, batches: Iterable[tuple[Tensor, Tensor]], statistic: str
) -> list[Tensor]:
    """For each group of `plan` the mean of STATISTICS[statistic] in its activations, over all images and positions.

    Observed are the results of the activation functions (ACTIVATIONS) that carry the group's channels; where there is
    none, as in a linear bottleneck, what the following layers read.
    """
    graph_module, channels = _channels(model, example)
    watch = _Watch(graph_module, _activation_places(graph_module, channels, plan), STATISTICS[statistic])
    with torch.no_grad():
        for images, _ in batches:
            watch.run(images)
    return watch.means(len(plan.groups))


def normalised_groups(model: nn.Module, example: Tensor, plan: Plan) -> list[list[tuple[str, Place]]]:
    """For each group of `plan` the BatchNorms whose trainable factors scale its channels, and where in them.

    Raises:
        RequestError: no group has one, so that there is nothing to penalise.
    """
    graph_module, channels = _channels(model, example)
    groups: list[list[tuple[str, Place]]] = [[] for _ in plan.groups]
    factors = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine and module.weight.requires_grad
    }
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target) in factors:
            for place in _places(node, channels, plan):
                groups[place.group].append((str(node.target), place))
    if not any(groups):
        allowed = (
            f"another one, such as l1-norm, because no layer that can be pruned in {type(model).__name__} is followed by "
            "a BatchNorm with factors to train"
        )
        raise RequestError("pruner", "slim", allowed)
    return groups


def factor_scores(
    groups: list[list[tuple[str, Place]]], factors: Mapping[str, Tensor], fallback: Callable[[int], Tensor]
) -> list[Tensor]:
    """For each group the mean size of its BatchNorm factors (Liu et al. 2017); `fallback(group)` where it has none.

    Args:
        groups: from `normalised_groups`.
        factors: BatchNorm -> its factors [features].
    """
    scores = []
    for index, norms in enumerate(groups):
        sizes = [place.take(factors[name].abs()[None]).mean(1) for name, place in norms]
        scores.append(torch.stack(sizes).mean(0) if sizes else fallback(index))
    return scores


def _channels(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Channels]:
    graph_module = traced_copy(model, example)
    probe(graph_module, example)
    return graph_module, Channels(graph_module)


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


def _activation_places(graph_module: fx.GraphModule, channels: Channels, plan: Plan) -> dict[fx.Node, list[Place]]:
    places: dict[fx.Node, list[Place]] = {}
    read: dict[fx.Node, list[Place]] = {}
    for node in graph_module.graph.nodes:
        module = channels.modules[str(node.target)] if node.op == "call_module" else None
        if type(module) in LAYERS:
            read[node.all_input_nodes[0]] = list(_places(node.all_input_nodes[0], channels, plan))
        elif type(module) in ACTIVATION_MODULES or (module is None and operation_name(node) in ACTIVATIONS):
            places[node] = list(_places(node, channels, plan))
    seen = {place.group for found in places.values() for place in found}
    for node, found in read.items():
        places.setdefault(node, []).extend(place for place in found if place.group not in seen)
    return {node: found for node, found in places.items() if found}


class _Watch(fx.Interpreter):
    """Runs the network and sums a statistic of the watched tensors, each as it is made."""

    def __init__(
        self, graph_module: fx.GraphModule, places: Mapping[fx.Node, list[Place]], statistic: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(graph_module)
        self._places, self._statistic = places, statistic
        self._sums: dict[tuple[fx.Node, Place], Tensor | float] = defaultdict(float)
        self._counts: dict[tuple[fx.Node, Place], int] = defaultdict(int)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        for place in self._places.get(n, ()):
            values = place.take(self._statistic(result))
            self._sums[n, place] += values.sum(1, dtype=torch.float64)
            self._counts[n, place] += values.shape[1]
        return result

    def means(self, groups: int) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in range(groups)]
        for (node, place), total in self._sums.items():
            found[place.group].append((total / self._counts[node, place]).float().cpu())
        return [torch.stack(means).mean(0) for means in found]
