"""Layers of a quantized file back in floating point, without calibrating again."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantization_networks import SIZE, answers, calibrated, images

from compress.engines import RUNTIMES, BuildSpec
from compress.onnx_export import export_flavours
from compress.quantization import FLAVOURS, exclude_layers, fake_quantized, quantized_layers


def exported(folder, flavour):
    path = folder / f"{flavour}.onnx"
    export_flavours(calibrated(), {flavour: path}, input_size=SIZE)
    return path


def kernels(path):
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE, static=False)) as session:
        return {kernel.name: kernel.precision for kernel in session.kernels()}, session.run(BATCH.numpy())


BATCH = images(256, seed=21)[0]


@pytest.mark.parametrize("layers", [{"conv1"}, {"stem"}, {"fc"}, {"left", "depthwise"}])
def test_only_these_layers_leave_the_integers(layers, tmp_path):
    exclude_layers(exported(tmp_path, "onnxruntime"), layers, "onnxruntime", tmp_path / "changed.onnx")
    before, _ = kernels(tmp_path / "onnxruntime.onnx")
    after, got = kernels(tmp_path / "changed.onnx")
    assert set(before.values()) == {"int8"}
    assert {name for name, precision in after.items() if precision != "int8"} == layers
    expected = answers(fake_quantized(calibrated(), "onnxruntime"), BATCH).numpy()
    assert (expected.argmax(1) == got.argmax(1)).mean() >= 0.98


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_layers_in_floats_are_the_model_with_rounded_weights(flavour, tmp_path):
    path = exported(tmp_path, flavour)
    names = set(quantized_layers(calibrated().model))
    exclude_layers(path, names, flavour, tmp_path / "changed.onnx")
    graph = onnx.load(tmp_path / "changed.onnx").graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.name in names:
            grid = calibrated().grids.weights[node.name]
            weight = calibrated().model.get_submodule(node.name).weight
            scales = torch.tensor(grid.scales).reshape(-1, *[1] * (weight.dim() - 1))
            assert np.array_equal(values[node.input[1]], (grid.codes(weight).float() * scales).numpy()), node.name
            assert values[node.input[2]].dtype == np.float32
    assert not any(name.endswith((".codes", ".scales")) for name in values)
