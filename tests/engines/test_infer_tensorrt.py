"""`artifacts/infer.py` through TensorRT, on a GPU that is not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_double import RELEASES
from PIL import Image
from quantization_networks import CLASSES, SIZE, Mixed
from tensorrt_files import SCRIPT, SPEC, answers, files, runtime_of

from compress import models
from compress.engines import RUNTIMES
from compress.engines import passport as passports
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.integration


@pytest.fixture
def bundle(tmp_path) -> Path:
    """What a user downloads, without an engine."""
    recipe = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, "bilinear")
    names = tuple(f"thing {number}" for number in range(CLASSES))
    models.save(Mixed().eval(), tmp_path, architecture=None, preprocessing=recipe, class_names=names)
    (tmp_path / "quantized.tensorrt.onnx").write_bytes(files()["tensorrt"].read_bytes())
    (tmp_path / "infer.py").write_bytes(SCRIPT.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path


def classify(folder: Path, monkeypatch, capsys, release: str, *arguments: str) -> str:
    """What the script prints, run in this process, where the double can stand for its imports."""
    spec = importlib.util.spec_from_file_location("infer_script", folder / "infer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = ["--runtime", runtime_of(release).name, "--json", *arguments]
    monkeypatch.setattr(sys, "argv", ["infer.py", str(folder / "photo.png"), *options])
    script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("from_engine", [False, True])
def test_infer_py_answers_through_tensorrt(release, from_engine, device, bundle, monkeypatch, capsys):
    double, runtime = device(release), runtime_of(release)
    if from_engine:
        runtime.build(bundle / "quantized.tensorrt.onnx", bundle / f"quantized.tensorrt.{runtime.name}.engine", SPEC)
        double.calls.clear()
    top = json.loads(classify(bundle, monkeypatch, capsys, release))["top"]
    assert ("create_network(0)" in double.calls or "create_network(2)" in double.calls) == (not from_engine)
    pixels = np.asarray(Image.open(bundle / "photo.png"), np.float32) / np.float32(255)
    mean, std = np.array((0.4, 0.5, 0.6), np.float32), np.array((0.2, 0.25, 0.3), np.float32)
    logits = answers(files()["tensorrt"], ((pixels - mean) / std).transpose(2, 0, 1)[None])[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert [name for name, _ in top] == [f"thing {k}" for k in np.argsort(-shares)[:3]]
    np.testing.assert_allclose([share for _, share in top], np.sort(shares)[::-1][:3], rtol=1e-6)
    assert not double.current and not double.problems


def test_infer_py_loads_no_other_engine_than_the_passports(device, bundle, monkeypatch, capsys):
    release, engine = "tensorrt 11.4.0.106", bundle / "quantized.tensorrt.tensorrt.engine"
    device(release)
    RUNTIMES["tensorrt"].build(bundle / "quantized.tensorrt.onnx", engine, SPEC)
    device("tensorrt 10.3.0")
    with pytest.raises(SystemExit, match="is for version 11.4.0.106, here is 10.3.0; take an ONNX file with --file"):
        classify(bundle, monkeypatch, capsys, release)
    double = device(release)
    engine.write_bytes(engine.read_bytes() + b" ")
    with pytest.raises(SystemExit, match="is not the file that its passport describes"):
        classify(bundle, monkeypatch, capsys, release)
    passports.path_of(engine).unlink()
    with pytest.raises(SystemExit, match="has no passport quantized.tensorrt.tensorrt.engine.json beside it"):
        classify(bundle, monkeypatch, capsys, release)
    assert "deserialize_cuda_engine" not in double.calls and not double.current
    assert json.loads(classify(bundle, monkeypatch, capsys, release, "--file", str(bundle / "quantized.tensorrt.onnx")))
