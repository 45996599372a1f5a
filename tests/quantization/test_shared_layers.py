"""Layers that the forward pass calls several times: every call has constants of its own, and every runtime takes them."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import onnx
import pytest
from quantization_networks import scratch_folder
from user_modules_quantization import SIZE, Called, built, images

from compress import equality, onnx_export
from compress.engines import RUNTIMES, BuildSpec
from compress.quantization import (
    Quantized,
    assign_bits,
    exclude_layers,
    fake_quantized,
    file_noise,
    prepare,
    quantize,
    quantized_layers,
)

CALLS = {"block": 3, "mlp": 3, "stem": 1, "fc": 1}


@functools.cache
def quantized() -> Quantized:
    prepared = prepare(built(Called), images())
    return quantize(prepared, assign_bits(prepared, 8, 8), calibration=[images(16)], train=None)


@functools.cache
def files() -> dict[str, Path]:
    folder = scratch_folder()
    paths = {flavour: folder / f"{flavour}.onnx" for flavour in quantized().grids.flavours}
    onnx_export.export_flavours(quantized(), paths, input_size=SIZE)
    return paths


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_every_call_has_constants_of_its_own(flavour):
    graph = onnx.load(files()[flavour]).graph
    names = {constant.name for constant in graph.initializer}
    readers = Counter(name for node in graph.node for name in set(node.input) if name in names)
    kinds = ("codes", "scales", "zero_points")
    weights = {name: count for name, count in readers.items() if any(f".{kind}" in name for kind in kinds)}
    assert set(weights.values()) == {1}
    assert Counter(name.split(".codes")[0] for name in weights if ".codes" in name and ".bias" not in name) == CALLS


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_answer_as_the_model(runtime):
    if RUNTIMES[runtime].missing():
        pytest.skip("not installed")
    flavour = RUNTIMES[runtime].flavour
    expected = equality.answers(fake_quantized(quantized(), flavour), images(32))
    with RUNTIMES[runtime].load(files()[flavour], BuildSpec(SIZE, static=False, threads=1)) as session:
        row = equality.judge("fake-quantized, torch", runtime, expected, session.run(images(32).numpy()), "int8")
        kernels = session.kernels()
    assert row.passed
    assert [kernel.precision for kernel in kernels] == ["int8"] * 8
    if runtime == "onnxruntime":
        assert row.max_abs_diff <= 1e-5 * row.reference_scale


def test_tensorrt_takes_every_call_on_integers(tmp_path):
    runtime = RUNTIMES["tensorrt-rtx"]
    if runtime.missing():
        pytest.skip("not installed")
    built_engine = runtime.build(files()["tensorrt"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert [layer["precision"] for layer in built_engine.passport["layers"]] == ["int8"] * 8


def test_an_excluded_layer_is_excluded_in_all_its_calls(tmp_path):
    exclude_layers(files()["onnxruntime"], ["block"], "onnxruntime", tmp_path / "model.onnx")
    constants = onnx.load(tmp_path / "model.onnx").graph.initializer
    integers = {constant.name for constant in constants if constant.data_type == onnx.TensorProto.INT8}
    assert not any(name.startswith("block.") for name in integers) and "mlp.codes_3" in integers


def test_noise_is_told_by_the_layers_of_the_model():
    reference = fake_quantized(quantized(), "onnxruntime")
    rows = file_noise(quantized(), "onnxruntime", lambda batch: {"logits": reference(batch)}, [images()])
    assert {layer for row in rows for layer in row.layers} == {*quantized_layers(quantized().model), "norm"}


def test_two_layers_of_one_weight_move_once(monkeypatch):
    model = built(Called)
    model.fc.weight = model.mlp.weight
    model.fc.bias = model.mlp.bias
    prepared = prepare(model, images())
    result = quantize(prepared, assign_bits(prepared, 4, 8), calibration=[images()], train=None)
    moved = fake_quantized(result)
    assert moved.mlp.weight.equal(moved.mlp_2.weight) and not moved.mlp.weight.equal(result.model.mlp.weight)
