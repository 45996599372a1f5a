"""Parameters and MACs after pruning at any sparsity, counted from the plan: nothing is pruned, no weight is read.

A layer's weights shrink with its output channels and with its input channels, and the plan knows both. So the counts are
those of the pruned model itself: equal to docs/coverage.json, which was made by pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from compress.models.attention import keep_heads
from compress.models.counting import count_macs, count_parameters, macs_by_module
from compress.pruning.allocation import allocate, settle_grouped
from compress.pruning.channels import Channels
from compress.pruning.constraints import by_name
from compress.pruning.graph.axes import Axis
from compress.pruning.graph.tensors import stored
from compress.pruning.interface import Plan
from compress.pruning.plan import DEFAULT_MULTIPLE
from compress.tracing.graph import probe, traced_copy


@dataclass(frozen=True)
class Estimate:
    """A model after pruning at one sparsity."""

    sparsity: float
    parameters: int
    macs: int
    """Multiply-accumulates of one image, counted as `counting.count_macs` does; of Swin v2, whose tables of positions do
    not all shrink with the heads, within about 1 %."""
    plan: Plan


@dataclass(frozen=True)
class _Term:
    """Counts of a module that are proportional to its output channels and, `weights` and `macs`, to its input channels."""

    weights: int
    others: int
    macs: int
    gives: Axis | None
    reads: Axis | None


def estimates(
    model: nn.Module, example: torch.Tensor, sparsities: Sequence[float], *, multiple: int = DEFAULT_MULTIPLE
) -> Iterator[Estimate]:
    """One estimate for each sparsity, which every group of layers loses alike.

    Args:
        model: a float32 module that can be traced; its parameters may be on the meta device.
        example: images [N, 3, size, size] on the model's device; only the shape is used.

    Raises:
        PruningError: the model cannot be traced.
    """
    size = example.shape[-1]
    parameters, macs = count_parameters(model), count_macs(model, size)
    by_module = macs_by_module(model, size)
    graph_module = traced_copy(model, example)
    probe(graph_module, example)
    for sparsity in sparsities:
        channels = Channels(graph_module)
        constraints = by_name(channels.layers(), sparsity)
        for conv in channels.grouped:
            settle_grouped(channels.sets, conv, constraints, multiple)
        plan = Plan(*allocate(channels, model, constraints, multiple))
        shares = _Shares(channels, plan)
        cut = _attentions_after(model, channels, plan)
        lost_parameters = float(sum(_lost(model, name, smaller) for name, smaller in cut.items()))
        lost_macs = sum(by_module.get(name, 0) * (1 - shares.heads(name)) for name in cut)
        for term in _terms(graph_module, channels, by_module, cut):
            gives, reads = shares.of(term.gives), shares.of(term.reads)
            lost_parameters += term.weights * (1 - gives * reads) + term.others * (1 - gives)
            lost_macs += term.macs * (1 - gives * reads)
        yield Estimate(sparsity, parameters - round(lost_parameters), macs - round(lost_macs), plan)


class _Shares:
    """Which share of the channels of an axis is kept."""

    def __init__(self, channels: Channels, plan: Plan) -> None:
        self._sets, self._layers = channels.sets, plan.layers
        self._kept = {
            channels.sets.root(channels.own_set[group.layers[0]]): group.channels_after / group.channels_before
            for group in plan.groups
        }

    def heads(self, name: str) -> float:
        """Share of the heads of an attention that are kept; its work is spread evenly over them."""
        return self._layers[name].channels_after / self._layers[name].channels_before

    def of(self, axis: Axis | None) -> float:
        if axis is None:
            return 1.0
        sizes = [part.features for part in axis.parts]
        kept = (self._kept.get(self._sets.root(part.set_id), 1.0) for part in axis.parts)
        return sum(size * share for size, share in zip(sizes, kept, strict=True)) / sum(sizes)


def _terms(
    graph_module: fx.GraphModule, channels: Channels, by_module: Mapping[str, int], cut: Mapping[str, nn.Module]
) -> Iterator[_Term]:
    """Every module and parameter whose size depends on the plan, once; those of an attention without its removed heads."""
    visited: set[str] = set()
    counted: set[int] = set()
    for node in graph_module.graph.nodes:
        name, attention = str(node.target), node.meta.get("attention")
        if node.op == "get_attr" and attention not in cut:
            yield from _attribute(channels, node, counted)
        if node.op != "call_module" or name == attention or name in visited:
            continue
        visited.add(name)
        module, gives = channels.modules[name], channels.axes[node]
        if attention in cut:
            module = cut[attention].get_submodule(name.removeprefix(f"{attention}."))
        reads = next((channels.axes[item] for item in node.all_input_nodes if item in channels.axes), None)
        sizes = {id(parameter): parameter.numel() for parameter in module.parameters() if id(parameter) not in counted}
        counted.update(sizes)  # a tied weight is one weight
        own = sum(sizes.values())
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            if not isinstance(module, nn.Linear) and module.groups > 1 and _loses_groups(channels, gives, reads):
                reads = None  # each channel that stays reads its own group as before
            weights = sizes.get(id(module.weight), 0)
            yield _Term(weights, own - weights, 0 if attention else by_module.get(name, 0), gives, reads)
        elif own:
            yield _Term(0, own, 0, gives, None)


def _attribute(channels: Channels, node: fx.Node, counted: set[int]) -> Iterator[_Term]:
    """A parameter that the forward pass reads by itself; buffers are not counted as parameters."""
    tensor = stored(channels.graph_module, str(node.target))
    if isinstance(tensor, nn.Parameter) and id(tensor) not in counted:
        axes = [axis for axis in channels.roles.dims(tensor).values() if axis is not None]
        if axes:
            counted.add(id(tensor))
            yield _Term(tensor.numel(), 0, 0, axes[0], axes[1] if len(axes) > 1 else None)


def _loses_groups(channels: Channels, gives: Axis | None, reads: Axis | None) -> bool:
    """Whether a grouped convolution gives the very channels that it reads, so that whole groups go."""
    if gives is None or reads is None:
        return False
    return [channels.sets.root(p.set_id) for p in gives.parts] == [channels.sets.root(p.set_id) for p in reads.parts]


def _attentions_after(model: nn.Module, channels: Channels, plan: Plan) -> dict[str, nn.Module]:
    """Each attention that loses heads, without them."""
    return {
        name: keep_heads(model.get_submodule(name), range(group.channels_after // channels.attentions[name].width))
        for name, group in plan.layers.items()
        if name in channels.attentions
    }


def _lost(model: nn.Module, name: str, smaller: nn.Module) -> int:
    return count_parameters(model.get_submodule(name)) - count_parameters(smaller)
