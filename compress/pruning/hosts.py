"""The smallest parts of a network that contain everything a plan changes.

The channels that a transformer loses are hidden units inside its MLPs. Shrinking each MLP alone, on the input that it
really gets, is many times faster than sending masks through the whole network, and keeps attention (whose heads are
taken out elsewhere) and normalisation out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from .channels import Channels
from .plan import Plan
from .trace import structure_copy

_POSITIONS = 4
"""Tokens, or rows and columns, that are enough to see which channels are alive."""


@dataclass(frozen=True)
class Host:
    """A part of the network, the planned layers in it, and the tensor that it gets for a probe of two images."""

    name: str
    layers: tuple[str, ...]
    inputs: torch.Tensor


def find_hosts(
    model: nn.Module, graph_module: fx.GraphModule, channels: Channels, plan: Plan, images: torch.Tensor
) -> list[Host]:
    """Split `plan` over parts of `model` that can be shrunk alone; the whole model where one group needs it.

    Args:
        model: the module that the plan was made for; only read.
        graph_module: its graph, in eval mode.
        channels: the channels of every tensor in that graph.
        images: a probe, float32 [2, C, h, w].
    """
    whole = [Host("", tuple(plan.layers), images)]
    if "training" in graph_module.meta:  # auxiliary heads are only reached through the whole model
        return whole
    spans = _spans(graph_module, channels, plan)
    if "" in spans.values():
        return whole
    inputs = _captured_inputs(model, {parent for name in spans.values() for parent in _and_parents(name)}, images)
    hosts: dict[str, list[str]] = {}
    for group in plan.groups:
        root = channels.sets.root(channels.own_set[group.layers[0]])
        name = next((parent for parent in _and_parents(spans[root]) if parent in inputs), "")
        if not name:
            return whole
        hosts.setdefault(name, []).extend(group.layers)
    for name in sorted(hosts, key=len, reverse=True):
        outer = next((other for other in hosts if name.startswith(f"{other}.")), None)
        if outer is not None:
            hosts[outer] += hosts.pop(name)
    return [Host(name, tuple(layers), inputs[name]) for name, layers in hosts.items()]


def _spans(graph_module: fx.GraphModule, channels: Channels, plan: Plan) -> dict[int, str]:
    """For each planned set: the innermost module around every operation that gives or takes its channels."""
    spans: dict[int, str] = {}
    planned = {channels.sets.root(channels.own_set[layer]) for layer in plan.layers}
    for node in graph_module.graph.nodes:
        axes = [channels.axes.get(item) for item in (node, *node.all_input_nodes)]
        roots = {channels.sets.root(part.set_id) for axis in axes if axis is not None for part in axis.parts}
        for root in roots & planned:
            place = _module_around(node)
            spans[root] = _common(spans[root], place) if root in spans else place
    return spans


def _module_around(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


def _common(first: str, second: str) -> str:
    shared = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)


def _and_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _captured_inputs(model: nn.Module, names: Iterable[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input of each named module that is called exactly once, with one tensor."""
    subject = structure_copy(model).eval()
    calls: dict[str, list[torch.Tensor | None]] = {}

    def listen(name: str) -> None:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            single = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            calls.setdefault(name, []).append(args[0].detach() if single else None)

        subject.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    for name in names:
        listen(name)
    with torch.no_grad():
        subject(images)
    found = {name: inputs[0] for name, inputs in calls.items() if len(inputs) == 1 and inputs[0] is not None}
    return {name: _trimmed(subject.get_submodule(name), inputs) for name, inputs in found.items()}


def _trimmed(part: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Fewer positions of `inputs`, where the part works on them: MLPs treat each token alone."""
    every, few = slice(None), slice(0, _POSITIONS)
    candidates = {3: [(every, few, every)], 4: [(every, few, few, every), (every, every, few, few)]}
    for index in candidates.get(inputs.dim(), []):
        try:
            with torch.no_grad():
                part(inputs[index])
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
        return inputs[index].clone()
    return inputs
