"""What only an NVIDIA GPU can tell: `make test-gpu`. Elsewhere each test is skipped with what is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gpu_double import RELEASES
from PIL import Image
from quantization_networks import CLASSES, SIZE, Mixed
from tensorrt_files import LAYERS, SCRIPT, SPEC, answers, batch, files

from compress import models, signing
from compress.engines import RUNTIMES, BuildSpec, benchmark, rebuild
from compress.engines import passport as passports
from compress.engines.tensorrt_run import gpu, missing_gpu
from compress.files import sha256
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.gpu
ENGINES = ("tensorrt", "tensorrt-rtx")
PROVIDERS = ("onnxruntime-cuda", "onnxruntime-tensorrt")
FLOAT, INTEGERS = 1e-3, 2e-2
"""Largest difference (fp32), and root mean square (int8), as a share of the largest logit."""


def available(name: str):
    """The runtime, or a skip that says what is missing for it."""
    runtime = RUNTIMES[name]
    reason = runtime.missing() or (missing_gpu(runtime.title) if runtime.ahead_of_time else None)
    if reason:
        pytest.skip(reason)
    return runtime


def close(got: np.ndarray, expected: np.ndarray, file: str) -> bool:
    difference, scale = np.abs(got - expected), np.abs(expected).max()
    return bool(
        difference.max() <= FLOAT * scale if file == "fp32" else np.sqrt((difference**2).mean()) <= INTEGERS * scale
    )


@pytest.mark.parametrize("file", ["fp32", "tensorrt"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_answers_like_onnx_runtime_for_every_batch_of_its_profile(name, file, tmp_path):
    runtime = available(name)
    built = runtime.build(files()[file], tmp_path / "model.engine", SPEC)
    assert built.ran and built.passport["candidate_layers"] >= 8
    assert built.passport["integer_layers"] == (LAYERS if file == "tensorrt" else 0)
    with runtime.load(built.path, SPEC) as session:
        for count in (1, 2, 3, 4, 1):
            assert close(session.run(batch(count)), answers(files()[file], batch(count)), file)
        assert session.precision == ("int8" if file == "tensorrt" else "fp32")


@pytest.mark.parametrize("file", ["fp32", "tensorrt"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_of_onnx_runtime_answers_like_the_cpu(name, file):
    with available(name).load(files()[file], SPEC) as session:
        for count in (1, 4):
            assert close(session.run(batch(count)), answers(files()[file], batch(count)), file)


@pytest.mark.parametrize("name", ENGINES)
def test_sessions_give_their_memory_back(name, tmp_path):
    runtime = available(name)
    path = runtime.build(files()["tensorrt"], tmp_path / "model.engine", SPEC).path
    free = []
    for _ in range(12):
        with runtime.load(path, SPEC) as session:
            session.run(batch(4))
        with gpu().current():
            free.append(gpu().driver.mem_get_info()[0])
    assert free[-1] >= free[1], "from the second session on, nothing more is held"


@pytest.mark.parametrize("name", ENGINES)
def test_torch_keeps_its_gpu_memory_beside_a_session(name, tmp_path):
    runtime = available(name)
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    kept = torch.arange(10, device="cuda")
    path = runtime.build(files()["fp32"], tmp_path / "model.engine", SPEC).path
    with runtime.load(path, SPEC) as session:
        session.run(batch(2))
    assert int((kept + torch.ones(10, device="cuda", dtype=kept.dtype)).sum()) == 55


@pytest.mark.parametrize("name", ENGINES)
def test_latency_is_of_finished_work(name, tmp_path):
    """A call that returned before the GPU was done would take the same time for one image as for many."""
    runtime = available(name)
    path = runtime.build(files()["fp32"], tmp_path / "model.engine", BuildSpec(SIZE, 1, 1024)).path
    one, many = batch(1), np.repeat(batch(1), 1024, axis=0)
    with runtime.load(path, BuildSpec(SIZE, 1, 1024)) as session:
        few, lots = benchmark.race([lambda: session.run(one), lambda: session.run(many)], rounds=4)
    assert 0 < few.p50_ms < lots.p50_ms


@pytest.mark.parametrize("name", ENGINES)
def test_check_says_that_what_was_built_here_runs_here(name, tmp_path):
    available(name)
    path = tmp_path / "artifacts" / "quantized.tensorrt.onnx"
    path.parent.mkdir()
    path.write_bytes(files()["tensorrt"].read_bytes())
    listed = {"artifacts/quantized.tensorrt.onnx": {"sha256": sha256(path)}}
    (tmp_path / "manifest.json").write_text(signing.sealed("manifest.json", {"format": 1, "files": listed}))
    built = rebuild.build(path, name, batch_size=2, max_batch=4, targets=())
    assert rebuild.check(built.path) == []
    passports.path_of(built.path).unlink()
    assert rebuild.check(built.path) != []


@pytest.mark.parametrize("name", ENGINES)
def test_the_script_of_the_bundle_runs_without_torch(name, tmp_path):
    available(name)
    recipe = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, "bilinear")
    names = tuple(f"thing {number}" for number in range(CLASSES))
    models.save(Mixed().eval(), tmp_path, architecture=None, preprocessing=recipe, class_names=names)
    (tmp_path / "quantized.tensorrt.onnx").write_bytes(files()["tensorrt"].read_bytes())
    (tmp_path / "infer.py").write_bytes(SCRIPT.read_bytes())
    Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(tmp_path / "photo.png")
    for module in ("torch", "nni", "compress", "onnx"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('blocked')\n")
    done = subprocess.run(
        [sys.executable, "infer.py", "photo.png", "--runtime", name, "--json"], capture_output=True, text=True,
        timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["top"]) == 3


def test_the_version_here_is_of_a_generation_whose_names_were_checked():
    available("tensorrt")
    version = importlib.import_module("tensorrt").__version__
    assert version.split(".")[0] in {release.split()[1].split(".")[0] for release in RELEASES if " " in release}
