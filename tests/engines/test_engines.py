"""The runtimes: the right answers, the kernels they really use, and one sentence where they are missing."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from places import ROOT
from quantization_networks import SIZE, Mixed, answers, calibrated, images, quantized_at, scratch_folder, trained
from torch import nn
from torchvision import models

from compress import machine
from compress.engines import RUNTIMES, BuildSpec
from compress.engines import onnxruntime as onnxruntime_engine
from compress.engines.base import LARGEST_SAFE_WEIGHT
from compress.engines.openvino import without_overflow
from compress.errors import HandoffError, RuntimeUnavailableError
from compress.onnx_export import export, export_flavours
from compress.quantization import FLAVOURS, fake_quantized

pytestmark = pytest.mark.integration

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
        assert all("--weight-bits 7" in note for note in session.notes)
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
        precisions = [(layer["name"], layer["precision"]) for layer in built.passport["layers"]]
        assert [precision for _, precision in precisions] == ["int8"] * layers, precisions


def test_engines_built_at_the_same_time_have_their_own_layers(tmp_path):
    """All builds of a process write into one log, which is where layers are read."""
    rtx, paths, started = RUNTIMES["tensorrt-rtx"], files(), threading.Barrier(2)

    def layers(kind: str, times: int = 1) -> list[tuple[int, int]]:
        built = [rtx.build(paths[kind], tmp_path / f"{kind}.engine", BuildSpec(SIZE)).passport for _ in range(times)]
        return [(passport["integer_layers"], passport["candidate_layers"]) for passport in built]

    def at_once(kind: str) -> list[tuple[int, int]]:
        started.wait()
        return layers(kind, times=3)

    alone = {kind: layers(kind) for kind in ("tensorrt", "fp32")}
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(at_once, alone)) == [3 * alone["tensorrt"], 3 * alone["fp32"]]
    assert alone["tensorrt"][0][0] > 0 == alone["fp32"][0][0]


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
        f"RUNTIMES['openvino'].open(Path({str(files()['fp32'])!r}), BuildSpec({SIZE})).close()\n"
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


@pytest.mark.parametrize("name", CPU_RUNTIMES)
def test_weights_of_seven_bits_need_no_care(name, tmp_path, monkeypatch):
    """They cannot overflow, so the fast kernels are used, and give the exact ones' answers bit for bit."""
    assert 2 * 255 * LARGEST_SAFE_WEIGHT < 2**15 < 2 * 255 * (LARGEST_SAFE_WEIGHT + 1)
    batch = images(16, seed=24)[0].numpy()
    found, overflows_here = {}, not machine.has_int8_dot_product()
    for bits in (7, 8):
        path = tmp_path / f"{bits}.onnx"
        quantized = quantized_at(Mixed().eval(), bits, 8, batches=[images(32, seed=2)[0]])
        export_flavours(quantized, {RUNTIMES[name].flavour: path}, input_size=SIZE)
        for dot_product in (False, True):
            monkeypatch.setattr(machine, "has_int8_dot_product", lambda told=dot_product: told)
            with RUNTIMES[name].open(path, BuildSpec(SIZE, batch_size=16)) as session:
                found[bits, dot_product] = session.notes, session.run(batch)
    assert found[7, False][0] == found[7, True][0] == found[8, True][0] == ()
    assert np.array_equal(found[7, False][1], found[7, True][1])
    if overflows_here:  # elsewhere ONNX Runtime knows that no care is needed
        (note,) = found[8, False][0]
        assert f"{LAYERS if name == 'onnxruntime' else 1} layer(s)" in note


def test_openvino_for_throughput_answers_alike_and_says_how_it_runs():
    batch = images(5, seed=25)[0].numpy()
    with RUNTIMES["openvino"].load(files()["fp32"], BuildSpec(SIZE, batch_size=5)) as session:
        expected = session.run(batch)
    spec = BuildSpec(SIZE, batch_size=5, threads=2, hint="throughput")
    with RUNTIMES["openvino"].open(files()["fp32"], spec) as session:
        assert str(session._compiled.get_property("PERFORMANCE_HINT")).endswith("THROUGHPUT")
        assert "request(s) of one image run side by side" in session.notes[0] and session.precision == "fp32"
        np.testing.assert_allclose(session.run(batch), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(session.run(batch[:3]), expected[:3], rtol=1e-5, atol=1e-6)


# ---- ONNX Runtime on a GPU, as far as a machine without one can tell ----------------------------------------------

GPU_PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}


@pytest.mark.parametrize("name", GPU_PROVIDERS)
def test_a_provider_that_is_not_built_in_is_missing(name):
    if GPU_PROVIDERS[name] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    assert RUNTIMES[name].missing() == (
        f"The installed ONNX Runtime offers only {', '.join(onnxruntime.get_available_providers())}; on a host with an "
        "NVIDIA GPU install onnxruntime-gpu in its place."
    )
    assert not RUNTIMES[name].runs_here
    with pytest.raises(RuntimeUnavailableError, match="install onnxruntime-gpu"):
        RUNTIMES[name].load(files()["fp32"], BuildSpec(SIZE))


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("name", GPU_PROVIDERS)
def test_a_silent_fall_back_to_the_cpu_is_refused(name, monkeypatch):
    """The library itself falls back here, with a warning at most."""
    if GPU_PROVIDERS[name] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU_PROVIDERS.values()])
    assert RUNTIMES[name].missing() is None
    with pytest.raises(
        HandoffError, match=f"asked for its {GPU_PROVIDERS[name]} and fell back to CPUExecutionProvider"
    ):
        RUNTIMES[name].open(files()["fp32"], BuildSpec(SIZE))


def test_nodes_are_counted_by_the_provider_that_executes_them():
    spec = BuildSpec(SIZE, batch_size=2)
    nodes = onnxruntime_engine.nodes_by_provider(
        files()["fp32"], onnxruntime_engine._options(spec), ["CPUExecutionProvider"], spec
    )
    assert set(nodes) == {"CPUExecutionProvider"} and nodes["CPUExecutionProvider"] >= LAYERS


def test_options_of_the_gpu_providers_follow_the_file():
    def options(file):
        return onnxruntime_engine.gpu_providers(
            "TensorrtExecutionProvider", BuildSpec(SIZE, 2, 8), onnx.load(files()[file])
        )

    assert [name for name, _ in options("fp32")] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    (_, integers), (_, cuda) = options("tensorrt")
    assert (integers["trt_int8_enable"], options("fp32")[0][1]["trt_int8_enable"]) == ("1", "0")
    assert (integers["trt_profile_min_shapes"], integers["trt_profile_max_shapes"]) == (
        f"images:1x3x{SIZE}x{SIZE}",
        f"images:8x3x{SIZE}x{SIZE}",
    )
    assert cuda == {"use_tf32": "0"}
