"""PyTorch model to ONNX file: float, half precision, or explicit Q/DQ in one flavour or both.

Every file has a dynamic batch, the input `images` (float32, NCHW, normalised) and the output `logits` (float32). Nodes
and tensors carry the name of their layer or quantization point (`layer1.0.conv1.scales`, `q_relu.scale`), and nothing
in the file tells where it was made.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.errors import HandoffError
from compress.methods.runtimes import Flavour
from compress.quantization.convert import convert
from compress.quantization.flavours import apply_flavour
from compress.quantization.grids import Quantized
from compress.quantization.onnx_graph import array, constant, free_suffix, is_constant, name_of, operand, remove_unused
from compress.quantization.prepare import quantization_points
from compress.report import Handoff
from compress.tracing.folding import folded
from compress.tracing.wording import place_of

log = logging.getLogger("compress")

Precision = Literal["fp32", "fp16"]
INPUT, OUTPUT = "images", "logits"
OPSET = 20
LARGEST_BATCH = 4096
_LARGEST_FILE = 1_500_000_000
_SCOPES = "pkg.torch.onnx.name_scopes"


def export(
    model: nn.Module, path: Path, *, input_size: int, precision: Precision = "fp32", images: Tensor | None = None
) -> Handoff | None:
    """Write `model` (eval mode is assumed; a float model) as one ONNX file, and return how folding was proved.

    BatchNorm is folded first: the exporter would do so last, after it has carried it through every one of its passes.
    Weights beyond 1.5 GB go to `<name>.data` beside it.

    Args:
        images: float32 [N, 3, H, W], normalised, that folding is proved on, see `folded`; default: two random ones.

    Raises:
        HandoffError: torch cannot export the model, or folding changes its answers.
    """
    if images is None:
        images = torch.randn(2, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    smaller, proof = folded(model, images)
    _save(_exported(smaller, input_size, precision), path)
    return proof


def export_flavours(quantized: Quantized, paths: Mapping[Flavour, Path], *, input_size: int) -> None:
    """Write a quantized model with explicit Q/DQ, one file for each flavour of `paths`; torch exports it only once."""
    neutral = _exported(convert(quantized), input_size, "fp32")
    points = quantization_points(quantized.model)
    for flavour, path in paths.items():
        _save(apply_flavour(neutral, points, quantized.grids, flavour), path)


class _HalfPrecision(nn.Module):
    """Computes in fp16; images and logits stay float32, so that every file is called alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.half())
        return logits.float()


def _exported(model: nn.Module, input_size: int, precision: Precision) -> ir.Model:
    source = _HalfPrecision(_half_copy(model)).eval() if precision == "fp16" else model
    images = torch.zeros(2, 3, input_size, input_size, device=_device_of(model))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                source, (images,), dynamo=True, optimize=True, verbose=False, opset_version=OPSET,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: batch},),
            )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the exporter runs the model's own code, which may raise anything
        log.exception("torch.onnx.export failed")
        raise HandoffError(
            f"torch.onnx cannot export {type(model).__name__} for a batch of any size{_culprit(error)}. Write it with other "
            "operations; the exporter's own words are in the log of the run."
        ) from error
    assert program is not None  # it is None without dynamo only
    exported = program.model
    _name_layers(exported)
    _name_quantization(exported)
    _pool_instead_of_mean(exported)
    _lowercase_einsum(exported)
    _strip_metadata(exported)
    return exported


def _culprit(error: BaseException) -> str:
    """The line of the model's code or the layer that the exporter stopped at; empty where it does not say."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in reversed(causes):
        if place := place_of(cause):
            return f"; it stops at {place}"
    layer = re.search(r"call_module\[target=([^\]]+)\]", str(error))
    return f"; it stops at {layer[1]}" if layer else ""


def _half_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).half()
    for module in copied.modules():  # constants that the model's own code casts its input to would stay float32
        module.requires_grad_(False)
    return copied


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns, logs and prints about its own internals; errors still come as exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _name_layers(model: ir.Model) -> None:
    """Name every layer's node as the model does (`layer1.0.conv1`); later calls of a layer keep the exporter's name."""
    taken = {node.name for node in model.graph}
    for node in model.graph:
        scopes = _scopes(node)
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(scopes) > 1 and scopes[-2] and scopes[-2] not in taken:
            node.name = scopes[-2]
            taken.add(node.name)


def _scopes(node: ir.Node) -> list[str]:
    """Module paths from the outermost to the operation itself, as the exporter noted them."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return scopes


def _name_quantization(model: ir.Model) -> None:
    """Give every Q/DQ node its own constants, named after the point or layer that owns them, and every call of a layer
    Q/DQ nodes of its own.

    The exporter shares equal constants and nodes; ONNX Runtime's rewrite of int8 weights for CPUs without VNNI stops on
    shared codes and zero points ("Attempt to replace the existing tensor").
    """
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and operand(node, 0).is_initializer():
            for user, index in list(node.outputs[0].uses())[1:]:
                _own_weights(model, node, user, index)
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes = operand(node, 0)
        if codes.is_initializer():
            layer, _, call = name_of(codes).rpartition(".codes")
            names = f"{layer}.scales{call}", f"{layer}.zero_points{call}"
        else:
            point = _scopes(node)[-2]
            node.name = f"{point}.{'quantize' if node.op_type == 'QuantizeLinear' else 'dequantize'}"
            names = f"{point}.scale", f"{point}.zero_point"
        for index, name in enumerate(names, start=1):
            node.replace_input_with(index, constant(model, name, array(operand(node, index))))
    remove_unused(model)


def _own_weights(model: ir.Model, dequantize: ir.Node, user: ir.Node, index: int) -> None:
    """Let `user` read a copy of the weights that `dequantize` gives."""
    codes = operand(dequantize, 0)
    name = name_of(codes) + free_suffix(model, name_of(codes))
    inputs = [constant(model, name, array(codes)), *dequantize.inputs[1:]]
    copied = ir.node("DequantizeLinear", inputs, attributes=dict(dequantize.attributes), name=f"{name}.dequantize")
    original = dequantize.outputs[0]
    copied.outputs[0].name, copied.outputs[0].shape, copied.outputs[0].type = (
        f"{name}.dequantized",
        original.shape,
        original.type,
    )
    model.graph.insert_before(user, copied)
    user.replace_input_with(index, copied.outputs[0])


def _pool_instead_of_mean(model: ir.Model) -> None:
    """The mean over height and width as the pooling operator it is: runtimes have integer kernels only for that."""
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
            continue
        axes = sorted(int(axis) % 4 for axis in array(operand(node, 1)).reshape(-1))
        keeps = node.attributes.get_int("keepdims", 1) == 1
        shape = operand(node, 0).shape
        if axes != [2, 3] or not keeps or shape is None or len(shape) != 4:
            continue
        pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        pool.outputs[0].name, pool.outputs[0].shape, pool.outputs[0].type = (
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type)  # fmt: skip
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [pool], node.outputs, pool.outputs)
    remove_unused(model)


def _lowercase_einsum(model: ir.Model) -> None:
    """TensorRT's parser knows lower-case subscripts only; the ONNX standard and the exporter also use upper case."""
    for node in model.graph:
        equation = node.attributes.get_string("equation", "") if node.op_type == "Einsum" else ""
        if equation != equation.lower() and len(set(equation.lower())) == len(set(equation)):
            node.attributes["equation"] = ir.AttrString("equation", equation.lower())


def _strip_metadata(model: ir.Model) -> None:
    """The exporter writes stack traces with local file names beside every node."""
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _save(model: ir.Model, path: Path) -> None:
    size = sum(int(v.const_value.nbytes) for v in model.graph.initializers.values() if v.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    external = f"{path.name}.data" if size > _LARGEST_FILE else None
    ir.save(model, path, external_data=external)
    onnx.checker.check_model(str(path))
