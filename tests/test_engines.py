"""The runtimes: the right answers, the kernels they really use, and one sentence where they are missing."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantization_networks import SIZE, answers, calibrated, images, quantized_at, scratch_folder, trained
from torch import nn
from torchvision import models

from compress import machine
from compress.engines import RUNTIMES, BuildSpec
from compress.engines import tensorrt as tensorrt_engines
from compress.engines.openvino import without_overflow
from compress.errors import HandoffError, RuntimeUnavailableError
from compress.onnx_export import export, export_flavours
from compress.quantization import FLAVOURS, fake_quantized

ROOT = Path(__file__).resolve().parents[1]
CPU_RUNTIMES = ("onnxruntime", "openvino")
LAYERS = 10
"""Convolutions and fully connected layers of the small network."""


@functools.cache
def files() -> dict[str, Path]:
    """The trained network as `fp32` and in both flavours."""
    folder = scratch_folder()
    paths = {name: folder / f"{name}.onnx" for name in (*FLAVOURS, "fp32")}
    export_flavours(calibrated(), {flavour: paths[flavour] for flavour in FLAVOURS}, input_size=SIZE)
    export(trained(), paths["fp32"], input_size=SIZE)
    return paths


@pytest.mark.parametrize("name", CPU_RUNTIMES)
def test_integer_answers_agree_with_the_simulated_model(name):
    runtime, batch = RUNTIMES[name], images(512, seed=21)[0]
    expected = answers(fake_quantized(calibrated(), runtime.flavour), batch).numpy()
    with runtime.load(files()[runtime.flavour], BuildSpec(SIZE, batch_size=512)) as session:
        got, kernels = session.run(batch.numpy()), session.kernels()
        assert session.precision == "int8"
        assert bool(session.notes) == (not machine.has_int8_dot_product())
    assert (expected.argmax(1) == got.argmax(1)).mean() >= 0.98
    assert sum(kernel.precision == "int8" for kernel in kernels) == len(kernels) == LAYERS


@pytest.mark.parametrize("name", CPU_RUNTIMES)
def test_fp32_is_really_fp32(name):
    batch = images(8, seed=22)[0]
    expected = answers(trained(), batch).numpy()
    with RUNTIMES[name].load(files()["fp32"], BuildSpec(SIZE, batch_size=8, precision="fp32")) as session:
        assert session.precision == "fp32" and session.notes == ()
        assert np.abs(session.run(batch.numpy()) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_layer_of_resnet18_and_mobilenet_v2_runs_on_integers(tmp_path):
    for name, layers in (("resnet18", 21), ("mobilenet_v2", 53)):
        torch.manual_seed(0)
        quantized = quantized_at(models.get_model(name, num_classes=10), batches=[torch.randn(8, 3, 32, 32)])
        paths = {flavour: tmp_path / f"{name}.{flavour}.onnx" for flavour in FLAVOURS}
        export_flavours(quantized, paths, input_size=32)
        for runtime in (RUNTIMES[name] for name in CPU_RUNTIMES):
            with runtime.load(paths[runtime.flavour], BuildSpec(32)) as session:
                precisions = [kernel.precision for kernel in session.kernels()]
            assert precisions == ["int8"] * layers, f"{name} on {runtime.name}"
        built = RUNTIMES["tensorrt-rtx"].build(paths["tensorrt"], tmp_path / f"{name}.engine", BuildSpec(32))
        assert (built.passport["integer_layers"], built.passport["candidate_layers"]) == (layers, layers)


@pytest.mark.parametrize("name", CPU_RUNTIMES)
def test_wrong_images_and_files_are_refused(name, tmp_path):
    with RUNTIMES[name].load(files()["fp32"], BuildSpec(SIZE, batch_size=2)) as session:
        with pytest.raises(HandoffError, match="Images of shape 2 x 3 x 8 x 8 .* were given; the session takes"):
            session.run(np.zeros((2, 3, 8, 8), np.float32))
        with pytest.raises(HandoffError, match="float64"):
            session.run(np.zeros((2, 3, SIZE, SIZE)))
    (tmp_path / "broken.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(HandoffError, match="broken.onnx"):
        RUNTIMES[name].load(tmp_path / "broken.onnx", BuildSpec(SIZE))


def test_openvino_is_compiled_for_one_batch_size_unless_asked_otherwise():
    batch = images(3, seed=23)[0].numpy()
    with RUNTIMES["openvino"].load(files()["fp32"], BuildSpec(SIZE, batch_size=1)) as session:
        with pytest.raises(HandoffError, match="the session takes 1 x 3"):
            session.run(batch)
    with RUNTIMES["openvino"].load(files()["fp32"], BuildSpec(SIZE, static=False)) as session:
        assert session.run(batch).shape == (3, 6)


def test_openvino_sends_and_stores_nothing(tmp_path):
    program = (
        "import sys; from pathlib import Path; from compress.engines import RUNTIMES, BuildSpec\n"
        f"RUNTIMES['openvino'].load(Path({str(files()['fp32'])!r}), BuildSpec({SIZE})).close()\n"
        "print(sorted(name for name in sys.modules if name.startswith('openvino_telemetry.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_layers_that_could_overflow_get_narrow_weights():
    content, layers = without_overflow(files()["onnxruntime"])
    assert layers == ["stem"]
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(files()["onnxruntime"]).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(content).graph.initializer}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"stem.codes", "stem.scales"}
    assert np.abs(after["stem.codes"]).max() <= 64
    scales = (values["stem.scales"][:, None, None, None] for values in (before, after))
    old, new = (values["stem.codes"] * scale for values, scale in zip((before, after), scales, strict=True))
    assert np.abs(old - new).max() <= 1.001 * before["stem.scales"].max()
    assert without_overflow(files()["fp32"]) == (b"", [])


@pytest.mark.parametrize("name", CPU_RUNTIMES)
def test_no_sum_of_products_overflows(name, tmp_path):
    """The largest codes everywhere: kernels that add pairs of products in 16 bits answer with half of the truth."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    batch = torch.linspace(-1, 1, 2)[:, None, None, None].expand(2, 3, 8, 8).contiguous()
    quantized = quantized_at(model, batches=[batch])
    path = tmp_path / "model.onnx"
    export_flavours(quantized, {RUNTIMES[name].flavour: path}, input_size=8)
    expected = answers(model, batch).numpy()
    with RUNTIMES[name].load(path, BuildSpec(8, batch_size=2)) as session:
        assert session.precision == "int8"
        assert np.abs(session.run(batch.numpy()) - expected).max() <= 0.03 * np.abs(expected).max()


# ---- TensorRT -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_what_is_missing_is_one_sentence():
    runtime = RUNTIMES["tensorrt"]
    assert runtime.missing() == (
        "TensorRT is not installed: install the packages of requirements-gpu.txt on a host with an NVIDIA GPU, or use "
        "the Docker image."
    )
    assert not runtime.runs_here
    with pytest.raises(RuntimeUnavailableError, match="TensorRT is not installed"):
        runtime.build(files()["tensorrt"], files()["tensorrt"].with_suffix(".engine"), BuildSpec(SIZE))


def test_an_rtx_engine_is_built_without_a_gpu_and_labelled_so(tmp_path):
    runtime, engine = RUNTIMES["tensorrt-rtx"], tmp_path / "model.engine"
    assert runtime.missing() is None
    built = runtime.build(files()["tensorrt"], engine, BuildSpec(SIZE, batch_size=4, max_batch=16))
    passport = json.loads((tmp_path / "model.engine.json").read_text())
    assert built.path == engine and built.passport == passport
    assert passport["sha256"] == tensorrt_engines.sha256(engine) and passport["size_bytes"] == engine.stat().st_size
    profile = passport["inputs"]["images"]["profile"]
    assert [shape[0] for shape in (profile["min"], profile["opt"], profile["max"])] == [1, 4, 16]
    assert (passport["integer_layers"], passport["candidate_layers"]) == (LAYERS, LAYERS)
    assert {layer["name"] for layer in passport["layers"]} == set(calibrated().ranges.weights)
    if not runtime.runs_here:
        assert not built.ran and "built, not run" in built.text
        with pytest.raises(RuntimeUnavailableError, match="NVIDIA"):
            runtime.load(engine, BuildSpec(SIZE))


def test_a_float_engine_has_no_integer_layers(tmp_path):
    built = RUNTIMES["tensorrt-rtx"].build(files()["fp32"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert built.passport["integer_layers"] == 0 and built.passport["candidate_layers"] >= 8


def test_the_wrong_flavour_is_refused_with_tensorrts_reason(tmp_path):
    with pytest.raises(HandoffError, match="cannot read onnxruntime.onnx: .*"):
        RUNTIMES["tensorrt-rtx"].build(files()["onnxruntime"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_is_only_loaded_as_its_passport_describes_it(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"plan")
    with pytest.raises(HandoffError, match="has no readable passport"):
        tensorrt_engines._checked_passport(engine, "tensorrt")
    passport = {"runtime": "tensorrt", "sha256": tensorrt_engines.sha256(engine)}
    (tmp_path / "model.engine.json").write_text(json.dumps(passport))
    assert tensorrt_engines._checked_passport(engine, "tensorrt") == passport
    engine.write_bytes(b"another plan")
    with pytest.raises(HandoffError, match="is not the file that its passport describes"):
        tensorrt_engines._checked_passport(engine, "tensorrt")


class Recorder:
    """Stands for pycuda and TensorRT: writes down each call, and answers with what was prepared for it."""

    def __init__(self, calls: list[str], prefix: str = "", **answers: object) -> None:
        self._calls, self._prefix, self._answers = calls, prefix, answers

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: object) -> object:
            self._calls.append(f"{self._prefix}{name}")
            answer = self._answers.get(name, Recorder(self._calls, f"{self._prefix}{name}."))
            return answer(*arguments) if isinstance(answer, types.FunctionType) else answer

        return call

    def __int__(self) -> int:
        return 4096


def test_a_tensorrt_session_copies_runs_and_waits_in_this_order(tmp_path, monkeypatch):
    calls: list[str] = []
    stream = types.SimpleNamespace(handle=7, synchronize=lambda: calls.append("synchronize"))
    context = Recorder(calls, "context.")
    cuda = Recorder(
        calls,
        "cuda.",
        Device=lambda number: Recorder(calls, "device.", retain_primary_context=context),
        pagelocked_empty=lambda shape, dtype: np.zeros(shape, dtype),
        Stream=stream,
    )
    cuda.Context = Recorder(calls, "stack.")
    execution = Recorder(calls, "run.", execute_async_v3=True)
    engine = Recorder(calls, "engine.", get_tensor_shape=(-1, 6), create_execution_context=execution)
    bindings = Recorder(calls, "trt.", Runtime=Recorder(calls, "runtime.", deserialize_cuda_engine=engine))
    monkeypatch.setattr(tensorrt_engines, "_cuda", lambda: cuda)
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"plan")
    passport = {"layers": [{"name": "fc", "type": "gemm", "precision": "int8"}], "targets": []}
    session = tensorrt_engines._TensorRTSession(bindings, None, plan, BuildSpec(SIZE, 2, 4), passport)
    assert calls[-3:] == ["run.set_tensor_address", "run.set_tensor_address", "stack.pop"]
    calls.clear()
    assert session.run(np.zeros((3, 3, SIZE, SIZE), np.float32)).shape == (3, 6)
    assert calls == [
        "context.push", "run.set_input_shape", "cuda.memcpy_htod_async", "run.execute_async_v3",
        "cuda.memcpy_dtoh_async", "synchronize", "stack.pop",
    ]  # fmt: skip
    with pytest.raises(HandoffError, match="5 images were given; this engine takes at most 4 at once"):
        session.run(np.zeros((5, 3, SIZE, SIZE), np.float32))
    assert session.precision == "int8"
    calls.clear()
    session.close()
    assert calls[0] == "context.push" and calls[-2:] == ["stack.pop", "context.detach"]
