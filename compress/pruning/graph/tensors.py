"""The channels along the dimensions of parameters and buffers: what each tensor loses with a channel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from compress.pruning.graph.axes import Axis, Part
from compress.pruning.graph.channel_sets import ChannelSets, Kind

MADE_IN_FORWARD = "_tensor_constant"
"""How torch.fx names a tensor that the forward pass makes of numbers: it is no attribute of the model."""
READS = "reads"
"""In place of a dimension: channels that a grouped convolution reads, a part of them with each output."""

Dims = Mapping[int | str, Axis | None]


def stored(model: nn.Module, name: str) -> Any:
    """The attribute of this dotted name."""
    return attrgetter(name)(model)


class Roles:
    """For each parameter and buffer, which channels lie along which of its dimensions, whoever reads it and how often.

    Only what the model's state dict has (`saved`) can get smaller: a rebuilt model makes everything else anew.
    """

    def __init__(self, sets: ChannelSets, saved: Collection[str]) -> None:
        self._sets, self._saved = sets, saved
        self._dims: dict[int, dict[int | str, Axis | None]] = {}
        self._readers: dict[int, str] = {}
        self._frozen: dict[int, str] = {}
        self.names: dict[int, str] = {}
        """Of tensors that no layer holds as its weight or bias: their dotted name."""

    def bind(self, tensors: Mapping[str, tuple[torch.Tensor, Dims]], reader: str) -> None:
        """Record what the dimensions of tensors of any shape are for `reader`; an earlier reader's channels become the same ones."""
        for name, (tensor, dims) in tensors.items():
            key = id(tensor)
            if name not in self._saved:
                self._frozen.setdefault(key, _unsaved(name))
            before = self._dims.setdefault(key, dict(dims))
            first = self._readers.setdefault(key, reader)
            if key in self._frozen:
                self._freeze(dims.values(), self._frozen[key])
            if set(before) != set(dims):
                reason = f"meets a weight that {first} and {reader} read in different ways"
                self._freeze([*before.values(), *dims.values()], reason)
                continue
            for dim, axis in dims.items():
                if axis is not before[dim]:
                    self._unite(before[dim], axis, first, reader)

    def _unite(self, one: Axis | None, other: Axis | None, first: str, reader: str) -> None:
        reason = f"{reader} is called more than once" if first == reader else f"{first} and {reader} share a weight"
        if one is None or other is None or one.boundaries != other.boundaries:
            reason = f"feeds {reader} more than once, each time with channels in another order"
            if first != reader:
                reason = f"meets a weight that {first} and {reader} share, with channels in another order"
            self._freeze([one, other], reason)
            return
        for mine, theirs in zip(one.parts, other.parts, strict=True):
            if self._sets.root(mine.set_id) != self._sets.root(theirs.set_id):
                self._sets.join(mine.set_id, theirs.set_id, reason)

    def axis_of(self, name: str, tensor: object) -> Axis | None:
        """The channels of a tensor that the forward pass reads as an attribute: of a vector, a set of its own."""
        if not isinstance(tensor, torch.Tensor):
            return None
        if not _made_in_forward(name):
            self.names[id(tensor)] = name
        wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        bound = [axis for axis in self._dims.get(id(tensor), {}).values() if axis is not None]
        if not bound:
            return self.opened(name, tensor, wide[0]) if len(wide) == 1 else None
        return replace(bound[0], dim=wide[0]) if len(wide) == 1 else None

    def opened(self, name: str, tensor: torch.Tensor, dim: int) -> Axis:
        """A new set along one dimension of a tensor of any shape that has none yet."""
        axis = Axis(dim, (Part(self._sets.new(tensor.shape[dim]), tensor.shape[dim]),))
        self.bind({name: (tensor, {dim: axis})}, name)
        return axis

    def freeze(self, tensor: object, reason: str, kind: Kind = "structure") -> None:
        """Rule that a tensor keeps its size: an operation reads it in a way that is not followed."""
        self._frozen.setdefault(id(tensor), reason)
        self._freeze(self._dims.get(id(tensor), {}).values(), reason, kind)

    def has(self, tensor: object) -> bool:
        """Whether `bind` has recorded this tensor."""
        return id(tensor) in self._dims

    def dims(self, tensor: torch.Tensor) -> Dims:
        """The channels along each dimension of a tensor of any shape that is known."""
        return self._dims.get(id(tensor), {})

    def _freeze(self, axes: Iterable[Axis | None], reason: str, kind: Kind = "structure") -> None:
        for axis in axes:
            for part in axis.parts if axis is not None else ():
                self._sets.freeze(part.set_id, reason, kind=kind)


def _made_in_forward(name: str) -> bool:
    return name.rpartition(".")[2].startswith(MADE_IN_FORWARD)


def _unsaved(name: str) -> str:
    if _made_in_forward(name):
        return "meets a tensor that the forward pass makes of fixed numbers"
    return f"meets {name}, which is not saved with the model; make it a parameter or a persistent buffer"


def owners(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter and buffer of `model` -> its dotted names, several where it is tied."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                names[id(tensor)].append(f"{prefix}{key}")
    return names
