"""The check of a pruned model: its outputs equal those of the masked model, which still has every channel.

In the masked model a removed channel is zero in every tensor that carries it. Where a layer reads it that matters after a
BatchNorm, which turns a zero channel into the constant beta - gamma * mean / deviation: NNI's plain masks let that constant
through, and a model without the channel cannot. A removed attention head is zero where the output projection reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree

from compress.errors import HandoffError
from compress.pruning.channels import LAYERS, Channels
from compress.pruning.graph.axes import Axis, kept_features
from compress.tracing.graph import set_traced_mode, structure_copy

log = logging.getLogger("compress")

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest output of the masked model, in float32."""


@dataclass(frozen=True)
class Difference:
    max_abs_diff: float
    reference_scale: float


def check_equal(
    channels: Channels, kept: Mapping[str, torch.Tensor], result: nn.Module, images: torch.Tensor
) -> Difference:
    """Compare `result` with the masked model on `images`: the outputs, and what the last layers read.

    The second matters where the output is constant, such as under a head that is all zero.

    Args:
        channels: of the unpruned network, which is in eval mode.
        kept: for each layer that lost channels, bool [out_channels]; for attention, bool [heads * head width].
        result: the pruned network; its modes are left as they are.
        images: float32 [N, C, H, W].

    Raises:
        HandoffError: a difference beyond 1e-4 of the scale, or a shape that does not fit.
    """
    masked = _Masked(channels, kept)
    training = channels.graph_module.meta.get("training")
    pruned = set_traced_mode(structure_copy(result), training or ())
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in channels.output_layers}
    for name in inputs:
        pruned.get_submodule(name).register_forward_pre_hook(partial(_record_input, inputs[name]))
    with torch.no_grad(), _heads_zeroed(channels, kept):
        expected = _tensors(masked.run(images))
    try:
        with torch.no_grad():
            outputs = _tensors(pruned(images))
            evaluated = outputs if training is None else _tensors(structure_copy(result).eval()(images))
    except Exception as error:
        log.exception("the pruned model does not run")
        raise HandoffError(f"The pruned model does not run. {_to_exclude(masked, pruned, images)}") from error
    try:
        difference = _compare("outputs", expected, outputs)
        _compare("outputs without the auxiliary heads", expected[: len(evaluated)], evaluated)
        for name in channels.output_layers:
            _compare(f"inputs of {name}", masked.inputs[name], inputs[name])
    except HandoffError as error:
        raise HandoffError(f"{error} {_to_exclude(masked, pruned, images)}") from error
    return difference


def _record_input(record: list[torch.Tensor], module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    record.append(args[0])


def _record_output(
    record: list[torch.Tensor], module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    record.append(output.clone())


def _to_exclude(masked: _Masked, pruned: nn.Module, images: torch.Tensor) -> str:
    """What to do about a pruned model that differs: the first layer that does, and the layers that it reads from."""
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in masked.layers}
    masked.outputs = {name: [] for name in masked.layers}
    for name in outputs:
        pruned.get_submodule(name).register_forward_hook(partial(_record_output, outputs[name]))
    with torch.no_grad(), _heads_zeroed(masked.channels, masked.kept):
        masked.run(images)
    with torch.no_grad(), suppress(Exception):  # it may be what does not run
        pruned(images)
    layer = next((name for name, expected in masked.outputs.items() if not _agree(expected, outputs[name])), None)
    if layer is None:
        return (
            "No single layer differs: this is a fault of Espalier; choose the pruner `none` to go on without pruning."
        )
    names = ", ".join(sorted({layer, *masked.sources(layer)}))
    return (
        f"The first layer that differs is {layer}, which is a fault of Espalier's pruning plan and not of your model; "
        f"exclude {names} to go on without pruning there. The input model is unchanged; nothing was handed on."
    )


def _agree(expected: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    if [one.shape for one in expected] != [one.shape for one in outputs]:
        return False
    return all(
        float((one - two).abs().max()) <= TOLERANCE * float(one.abs().max())
        for one, two in zip(expected, outputs, strict=True)
        if one.numel()
    )


@contextmanager
def _heads_zeroed(channels: Channels, kept: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context, every attention's output projection reads zero from the heads that are removed."""
    projections: dict[str, Any] = {
        name: channels.graph_module.get_submodule(f"{name}.{heads.projection}")
        for name, heads in channels.attentions.items()
        if name in kept
    }
    weights = {name: projection.weight for name, projection in projections.items()}
    try:
        for name, projection in projections.items():
            columns = kept[name].to(weights[name].device)
            projection.weight = nn.Parameter(weights[name].detach() * columns, requires_grad=False)
        yield
    finally:
        for name, projection in projections.items():
            projection.weight = weights[name]


class _Masked(fx.Interpreter):
    """Runs the unpruned network with removed channels at zero.

    Attributes:
        inputs: layer whose outputs are the model's -> what it reads, without the removed channels, one tensor for each call.
        outputs: layer -> its outputs without the removed channels, one for each call, of the layers put in here.
        layers: the Conv2d and Linear layers, in the order of their first calls.
    """

    def __init__(self, channels: Channels, kept: Mapping[str, torch.Tensor]) -> None:
        super().__init__(channels.graph_module)
        self.channels, self.kept = channels, kept
        self._kept = {channels.sets.root(channels.own_set[layer]): rows for layer, rows in kept.items()}
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in channels.output_layers}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        nodes = channels.graph_module.graph.nodes
        self.layers = list(dict.fromkeys(str(node.target) for node in nodes if self._is_layer(node)))

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.fetch_attr(str(node.target))) in LAYERS

    def sources(self, layer: str) -> list[str]:
        """The pruned layers whose channels `layer` reads."""
        sets = self.channels.sets
        nodes = self.channels.graph_module.graph.nodes
        calls = [node for node in nodes if node.op == "call_module" and node.target == layer]
        axes = [self.channels.axes.get(node.all_input_nodes[0]) for node in calls]
        roots = {sets.root(part.set_id) for axis in axes if axis for part in axis.parts} & self._kept.keys()
        return [name for name, own in self.channels.own_set.items() if sets.root(own) in roots]

    def run_node(self, n: fx.Node) -> Any:
        axis = self.channels.axes.get(n)
        if not self._is_layer(n):
            return self._zeroed(super().run_node(n), axis, in_place=n.op != "get_attr")
        (images, *_), _ = self.fetch_args_kwargs_from_env(n)
        source = self.channels.axes[n.all_input_nodes[0]]
        if str(n.target) in self.inputs:
            self.inputs[str(n.target)].append(self._only_kept(images, source))
        output = self._zeroed(self.fetch_attr(str(n.target))(self._zeroed(images, source)), axis)
        if str(n.target) in self.outputs:
            self.outputs[str(n.target)].append(self._only_kept(output, axis).clone())
        return output

    def _rows(self, axis: Axis | None) -> torch.Tensor | None:
        return kept_features(axis, self.channels.sets, self._kept)

    def _zeroed(self, tensor: Any, axis: Axis | None, *, in_place: bool = False) -> Any:
        """`tensor` without the removed channels; in place, so that what shares its memory loses them too."""
        rows = self._rows(axis)
        if axis is None or rows is None or not isinstance(tensor, torch.Tensor):
            return tensor
        shape = [1] * tensor.dim()
        shape[axis.dim] = -1
        removed = ~rows.view(shape).to(tensor.device)
        expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        return tensor.masked_fill_(removed, 0) if in_place and not expanded else tensor.masked_fill(removed, 0)

    def _only_kept(self, tensor: torch.Tensor, axis: Axis | None) -> torch.Tensor:
        rows = self._rows(axis)
        if axis is None or rows is None:
            return tensor
        return tensor.index_select(axis.dim, rows.nonzero().flatten().to(tensor.device))


def _compare(what: str, expected: list[torch.Tensor], outputs: list[torch.Tensor]) -> Difference:
    shapes = [tuple(one.shape) for one in expected], [tuple(one.shape) for one in outputs]
    if shapes[0] != shapes[1]:
        raise HandoffError(
            f"The {what} of the pruned model have shapes {shapes[1]}, those of the masked model {shapes[0]}."
        )
    scale = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
    worst = max(
        (float((one - two).abs().max()) for one, two in zip(expected, outputs, strict=True) if one.numel()), default=0.0
    )
    if not worst <= TOLERANCE * scale:
        raise HandoffError(
            f"The {what} of the pruned model differ from the masked model's by {worst:.3g} where their scale is "
            f"{scale:.3g}; {TOLERANCE * scale:.3g} is allowed."
        )
    return Difference(worst, scale)


def _tensors(outputs: object) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
