"""The ONNX file of a pruned structure, cut out of that of the dense model, to be timed and never to be used.

An export takes seconds, and a search needs the time of a hundred structures of one model. Their files differ in the
shapes of weights alone. So the dense model is exported once for each choice of bits, and its weights are cut to the
shapes of the structure: any values do, because the time of a kernel does not depend on them. A cut file takes one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

_LAYERS = ("Conv", "Gemm", "MatMul")


class CannotCutError(Exception):
    """The file holds a constant that goes with the channels in a way that is not known here; export the structure."""


@dataclass(frozen=True)
class _Layer:
    shape: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> _Layer:
        return cls(tuple(module.weight.shape), getattr(module, "groups", 1))


def cut(path: Path, dense: nn.Module, shrunk: nn.Module, target: Path) -> None:
    """Writes the file of the dense model at `path` to `target`, with the shapes that `shrunk` has.

    Raises:
        CannotCutError: not every constant belongs to a convolution or linear layer, or is no larger than one number.
    """
    before, after = _layers(dense), _layers(shrunk)
    model = onnx.load(path)
    constants = {constant.name: constant for constant in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    seen: set[str] = set()
    for node in model.graph.node:
        read = [name for value in node.input[1:] for name in _constants_of(value, makers, constants)]
        layer = _layer_of(node, read, before)
        if layer is not None:
            for name in set(read) - seen:
                _resize(constants[name], before[layer], after[layer])
            seen.update(read)
            _set_groups(node, after[layer].groups)
        elif node.op_type == "Reshape" and _flattens(node, constants):
            seen.add(node.input[1])
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.array([1, -1]), node.input[1]))
    for name, constant in constants.items():
        if name not in seen and max(constant.dims, default=1) > 1:
            raise CannotCutError(name)
    del model.graph.value_info[:]
    onnx.save(model, target)


def _layers(model: nn.Module) -> dict[str, _Layer]:
    return {name: _Layer.of(m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def _layer_of(node: onnx.NodeProto, read: Sequence[str], layers: Mapping[str, _Layer]) -> str | None:
    """By the name of its weight (`conv1.weight`, `conv1.codes`): a node that took in a BatchNorm may have that one's name."""
    if node.op_type not in _LAYERS:
        return None
    return next((owner for name in read if (owner := name.rpartition(".")[0]) in layers), None)


def _constants_of(
    value: str, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> list[str]:
    """The constants that a layer reads as its weight or bias: itself, or the codes, scales and zeros behind it."""
    if value in constants:
        return [value]
    maker = makers.get(value)
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in constants:
        return []
    return [name for name in maker.input if name in constants]


def _resize(constant: onnx.TensorProto, before: _Layer, after: _Layer) -> None:
    """A weight, a transposed weight, or one number for each output channel, in place; single numbers stay."""
    shapes = {
        before.shape: after.shape,
        before.shape[::-1]: after.shape[::-1],
        before.shape[:1]: after.shape[:1],
    }
    dims = tuple(constant.dims)
    if dims in ((), (1,)):
        return
    if dims not in shapes:
        raise CannotCutError(constant.name)
    values = numpy_helper.to_array(constant)[tuple(slice(0, size) for size in shapes[dims])]
    constant.CopyFrom(numpy_helper.from_array(values.copy(), constant.name))


def _set_groups(node: onnx.NodeProto, groups: int) -> None:
    for number, attribute in enumerate(node.attribute):
        if attribute.name == "group" and attribute.i != groups:
            node.attribute[number].CopyFrom(helper.make_attribute("group", groups))


def _flattens(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it makes rows of everything but the batch, so that the number of channels can be left to it."""
    shape = constants.get(node.input[1])
    return shape is not None and tuple(shape.dims) == (2,)
