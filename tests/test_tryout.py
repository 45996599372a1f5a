"""An image of the user's through the original and the compressed model of a finished run, as they are deployed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from example_report import example_report
from PIL import Image
from places import ROOT
from quantization_networks import CLASSES, SIZE, calibrated, trained

from compress import classify, models, signing
from compress.errors import DataError, RunError, StorageError
from compress.files import sha256
from compress.onnx_export import export, export_flavours
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.integration

RECIPE = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, "bilinear")
NAMES = tuple(f"thing {number}" for number in range(CLASSES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as far as an image needs it."""
    made = tmp_path_factory.mktemp("run")
    artifacts = made / "artifacts"
    artifacts.mkdir()
    models.save(trained(), artifacts, architecture=None, preprocessing=RECIPE, class_names=NAMES)
    export_flavours(calibrated(), {"onnxruntime": artifacts / "quantized.onnxruntime.onnx"}, input_size=SIZE)
    export(trained(), artifacts / "baseline.onnx", input_size=SIZE)
    report = example_report()
    rows = {row.variant: row for row in report.measurements}
    measured = [
        rows[variant].model_copy(
            update={"runtime": "onnxruntime", "file": file, "input_size": SIZE, "precision_requested": asked}
        )
        for variant, file, asked in (
            ("baseline", "baseline.onnx", "fp32"),
            ("quantized", "quantized.onnxruntime.onnx", "int8"),
        )
    ]
    unusable = measured[0].model_copy(update={"runtime": "tensorrt", "file": "x.engine", "p50_ms": 0.001})
    (made / "report.json").write_text(report.model_copy(update={"measurements": (*measured, unusable)}).to_json())
    listed = {
        str(path.relative_to(made)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in made.rglob("*")
        if path.is_file()
    }
    (made / "manifest.json").write_text(signing.sealed("manifest.json", {"format": 1, "files": listed}))
    return made


def photo(path: Path, **options: object) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def test_both_models_answer_through_the_runtime_that_measured_them(folder: Path, tmp_path: Path) -> None:
    import torch

    found = classify.classify(folder, photo(tmp_path / "photo.png"))
    assert json.loads(json.dumps(found)) == found
    seen = Image.open(io.BytesIO(base64.b64decode(found["seen"])))
    assert (seen.size, found["input_size"]) == ((SIZE, SIZE), SIZE)
    original, compressed = found["models"]
    assert (original["file"], original["runtime"]) == ("baseline.onnx", "onnxruntime"), "no TensorRT runs here"
    assert (compressed["file"], compressed["precision"]) == ("quantized.onnxruntime.onnx", "int8")
    pixels = (np.asarray(seen, np.float32) / 255 - RECIPE.mean) / RECIPE.std
    with torch.no_grad():
        logits = trained().eval()(torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)))
    expected = logits.softmax(1)[0]
    best = int(expected.argmax())
    assert original["top"][0]["class"] == NAMES[best]
    assert original["top"][0]["share"] == pytest.approx(float(expected[best]), abs=1e-4)
    assert len(original["top"]) == classify.TOP
    assert all(model["ms"] > 0 for model in found["models"]) and 1 <= found["repeats"] <= classify.REPEATS


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"no image at all", "not a JPEG, PNG, WebP or BMP image"),
        ("b.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not a JPEG, PNG, WebP or BMP image"),
        ("c.jpg", b"", "not a JPEG, PNG, WebP or BMP image"),
    ],
)
def test_a_bad_image_gets_one_sentence(folder: Path, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        classify.classify(folder, path)
    assert str(refused.value) == (f"This image cannot be used ({reason}): choose a JPEG, PNG, WebP or BMP file.")


def test_an_image_that_is_cut_off_and_one_that_is_gone(folder: Path, tmp_path: Path) -> None:
    path = photo(tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="damaged or cut off"):
        classify.classify(folder, path)
    with pytest.raises(DataError, match="choose it again"):
        classify.classify(folder, tmp_path / "gone.jpg")


def test_a_changed_file_is_not_run_and_no_run_is_no_run(folder: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "photo.png")
    with pytest.raises(RunError, match="belongs to no finished run"):
        classify.classify(tmp_path, image)
    file = folder / "artifacts" / "quantized.onnxruntime.onnx"
    kept = file.read_bytes()
    file.write_bytes(kept + b"\0")
    try:
        with pytest.raises(StorageError, match="quantized.onnxruntime.onnx was changed or removed after the run"):
            classify.classify(folder, image)
    finally:
        file.write_bytes(kept)


def test_neither_torch_nor_nni_is_needed() -> None:
    import subprocess
    import sys

    words = "import sys; import compress.classify; sys.exit(bool({'torch', 'nni'} & set(sys.modules)))"
    root = ROOT
    assert subprocess.run([sys.executable, "-c", words], cwd=root, timeout=60).returncode == 0
