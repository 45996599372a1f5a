"""ONNX files: exact scales, both flavours, any batch, and nothing that tells where they were made."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import user_modules_quantization as user_modules
from onnx import TensorProto, numpy_helper
from places import ROOT
from quantization_networks import SIZE, answers, calibrated, images, quantized_at, scratch_folder, trained
from torch import Tensor, nn

from compress import equality
from compress.engines import RUNTIMES, BuildSpec
from compress.errors import HandoffError, QuantizationError
from compress.onnx_export import export, export_flavours
from compress.quantization import (
    FLAVOURS,
    Quantized,
    assign_bits,
    fake_quantized,
    prepare,
    quantization_points,
    quantize,
)

pytestmark = pytest.mark.integration

SPEC = BuildSpec(SIZE, static=False)


@functools.cache
def exported(weight_bits: int = 8, activation_bits: int = 8) -> dict[str, Path]:
    folder = scratch_folder()
    paths = {flavour: folder / f"{flavour}.onnx" for flavour in FLAVOURS}
    export_flavours(calibrated(weight_bits, activation_bits), paths, input_size=SIZE)
    return paths


def run(path: Path, batch: Tensor) -> np.ndarray:
    with RUNTIMES["onnxruntime"].load(path, SPEC) as session:
        return session.run(batch.numpy())


def constants(path: Path) -> tuple[onnx.GraphProto, dict[str, np.ndarray]]:
    graph = onnx.load(path).graph
    return graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_scale_in_the_file_is_nnis_bit_for_bit(flavour):
    grids, points = calibrated().grids, quantization_points(calibrated().model)
    graph, values = constants(exported()[flavour])
    quantizers = {node.name.removesuffix(".quantize"): node for node in graph.node if node.op_type == "QuantizeLinear"}
    left_out = {name for name, point in points.items() if point.only_onnxruntime and flavour == "tensorrt"}
    assert quantizers.keys() == points.keys() - left_out
    for name, node in quantizers.items():
        scale, zero_point = (values[constant] for constant in node.input[1:3])
        assert scale.dtype == np.float32 and scale.tobytes() == np.float32(grids.activations[name].scale).tobytes()
        expected = (np.int8, 0) if flavour == "tensorrt" else (np.uint8, 0 if points[name].non_negative else 128)
        assert (zero_point.dtype.type, int(zero_point)) == expected
    for name, grid in grids.weights.items():
        assert values[f"{name}.scales"].tobytes() == np.array(grid.scales, dtype=np.float32).tobytes()
        codes = grid.codes(calibrated().model.get_submodule(name).weight)
        assert values[f"{name}.codes"].dtype == np.int8 and np.array_equal(values[f"{name}.codes"], codes.numpy())


@pytest.mark.parametrize(("bits", "factor"), [(2, 32), (4, 8), (6, 2), (7, 1)])
def test_few_bits_are_stored_on_a_finer_scale_with_the_same_values(bits, factor, tmp_path):
    """A bias is rounded to whole multiples of input scale times weight scale; ONNX Runtime does that by itself."""
    quantized = calibrated(bits, 8)
    export_flavours(quantized, {"onnxruntime": tmp_path / "model.onnx"}, input_size=SIZE)
    _, values = constants(tmp_path / "model.onnx")
    for name, grid in quantized.grids.weights.items():
        codes = grid.codes(quantized.model.get_submodule(name).weight).numpy()
        assert np.array_equal(values[f"{name}.codes"], codes * factor) and np.abs(values[f"{name}.codes"]).max() <= 63
        assert np.array_equal(values[f"{name}.scales"] * factor, np.array(grid.scales, dtype=np.float32))


def test_the_order_of_flavours_does_not_matter(tmp_path):
    export_flavours(calibrated(), {name: tmp_path / name for name in ("onnxruntime", "tensorrt")}, input_size=SIZE)
    for name in FLAVOURS:
        assert (tmp_path / name).read_bytes() == exported()[name].read_bytes()


def test_layers_carry_their_own_names_and_nothing_else_is_told():
    path = exported()["onnxruntime"]
    graph, _ = constants(path)
    assert {node.name for node in graph.node if node.op_type == "Conv"} >= {"stem", "conv1", "depthwise"}
    content = path.read_bytes()
    for trace in (b"stack_trace", b".py", str(ROOT).encode()):
        assert trace not in content


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_file_answers_like_the_simulated_model(flavour):
    batch = images(256, seed=11)[0]
    expected = answers(fake_quantized(calibrated(), flavour), batch).numpy()
    got = run(exported()[flavour], batch)
    assert (expected.argmax(1) == got.argmax(1)).all()
    assert np.sqrt(np.square(expected - got).mean()) <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fewer_bits_stay_on_their_grid_in_int8_containers(flavour):
    batch = images(128, seed=12)[0]
    expected = answers(fake_quantized(calibrated(4, 4), flavour), batch).numpy()
    got = run(exported(4, 4)[flavour], batch)
    assert np.abs(expected - got).max() <= 1e-4 * np.abs(expected).max()
    graph, values = constants(exported(4, 4)[flavour])
    assert (
        max(np.abs(value).max() for name, value in values.items() if name.endswith(".codes") and value.ndim > 1) == 56
    )
    assert sum(node.op_type == "Clip" for node in graph.node) >= len(calibrated(4, 4).grids.activations) / 2


def test_every_layer_runs_on_integers_in_onnxruntime_relu6_included():
    with RUNTIMES["onnxruntime"].load(exported()["onnxruntime"], SPEC) as session:
        kernels = session.kernels()
    assert {kernel.precision for kernel in kernels} == {"int8"}
    assert {kernel.name for kernel in kernels} == set(calibrated().grids.weights)


def test_a_relu6_keeps_its_bound_although_its_container_reaches_further():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight.mul_(20)
    batch = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = quantized_at(model, batches=[batch])
    (bounded,) = [name for name, point in quantization_points(quantized.model).items() if point.clipped_above]
    assert quantized.grids.activations[bounded].scale == pytest.approx(6 / 127)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_flavours(quantized, {"onnxruntime": path}, input_size=8)
        with RUNTIMES["onnxruntime"].load(path, BuildSpec(8, static=False)) as session:
            got = session.run(4 * batch.numpy())
            assert [kernel.precision for kernel in session.kernels()] == ["int8", "int8"]
    expected = answers(fake_quantized(quantized, "onnxruntime"), 4 * batch).numpy()
    assert np.abs(got - expected).max() <= 2 * quantized.grids.activations["q__2"].scale


@pytest.mark.parametrize("count", [1, 5])
def test_the_batch_is_free(count):
    assert run(exported()["tensorrt"], images(count, seed=13)[0]).shape == (count, 6)


def test_float_and_half_files_equal_their_model(tmp_path):
    batch = images(16, seed=14)[0]
    expected = answers(trained(), batch).numpy()
    for precision, tolerance, dtype in (("fp32", 1e-5, TensorProto.FLOAT), ("fp16", 1e-2, TensorProto.FLOAT16)):
        path = tmp_path / f"{precision}.onnx"
        export(trained(), path, input_size=SIZE, precision=precision)
        assert np.abs(run(path, batch) - expected).max() <= tolerance * np.abs(expected).max()
        graph, _ = constants(path)
        assert {tensor.data_type for tensor in graph.initializer if tensor.dims} <= {dtype, TensorProto.INT64}
        assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == 1
    assert next(trained().parameters()).dtype == torch.float32


def test_pooling_over_the_image_is_a_pooling_operator(tmp_path):
    export(trained(), tmp_path / "model.onnx", input_size=SIZE)
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "GlobalAveragePool" in kinds and "ReduceMean" not in kinds


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


_BRANCHING = (
    r"^torch\.onnx cannot export Branching for a batch of any size; it stops at test_onnx_export\.py, line \d+, in forward: "
    r"`return x\.flatten\(1\) if x\.sum\(\) > 0 else -x\.flatten\(1\)`\. Write it with other operations; "
    r"the exporter's own words are in the log of the run\.$"
)


def test_a_model_that_cannot_be_exported_is_refused_by_name(tmp_path):
    with pytest.raises(HandoffError, match=_BRANCHING):
        export(Branching(), tmp_path / "model.onnx", input_size=SIZE)
    assert not (tmp_path / "model.onnx").exists()


def test_a_layer_that_holds_its_padding_is_exported_with_it(tmp_path):
    model, pictures = user_modules.built(user_modules.Held), user_modules.images()
    prepared = prepare(model, pictures)
    quantized = quantize(prepared, assign_bits(prepared, 8, 8), calibration=[pictures], train=None)
    file = tmp_path / "quantized.onnx"
    export_flavours(quantized, {"onnxruntime": file}, input_size=user_modules.SIZE)
    expected = equality.answers(fake_quantized(quantized, "onnxruntime"), pictures)
    with RUNTIMES["onnxruntime"].load(file, BuildSpec(user_modules.SIZE, static=False, threads=1)) as session:
        assert equality.judge("model", "file", expected, session.run(pictures.numpy()), "int8").passed


def test_ranges_of_another_model_are_refused():
    other = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()))
    with pytest.raises(QuantizationError, match="the grids belong to a model with other points"):
        fake_quantized(Quantized(other, calibrated().grids))


class UpperCaseEinsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("B C I D, B C J D -> B C I J", x, x).flatten(1)


def test_einsum_is_written_as_tensorrt_reads_it(tmp_path):
    export(UpperCaseEinsum(), tmp_path / "model.onnx", input_size=8)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    equations = [attribute.s for node in nodes for attribute in node.attribute if attribute.name == "equation"]
    assert equations == [equations[0].lower()] and len(equations[0]) > 5
    RUNTIMES["tensorrt-rtx"].build(tmp_path / "model.onnx", tmp_path / "model.engine", BuildSpec(8))
    expected = answers(UpperCaseEinsum(), batch := torch.randn(2, 3, 8, 8)).numpy()
    with RUNTIMES["onnxruntime"].load(tmp_path / "model.onnx", BuildSpec(8, static=False)) as session:
        assert np.abs(session.run(batch.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()
