"""`artifacts/infer.py` runs as it is, where numpy, Pillow and one runtime are installed and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from quantization_networks import CLASSES, SIZE, calibrated, trained

from compress import machine, models
from compress.data import images as package_images
from compress.engines import RUNTIMES, BuildSpec
from compress.files import PACKAGE
from compress.onnx_export import export, export_flavours
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.integration

SCRIPT = PACKAGE / "report" / "templates" / "infer.py"
RECIPE = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, "bilinear")
NAMES = tuple(f"thing {number}" for number in range(CLASSES))


def load_script():
    spec = importlib.util.spec_from_file_location("infer_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_input(path: Path, recipe: Preprocessing) -> np.ndarray:
    pixels = package_images.to_pixels(package_images.fit(package_images.decode(path.read_bytes()), recipe))
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (recipe.mean, recipe.std))
    return ((pixels.astype(np.float32) / np.float32(255) - mean) / std)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that a run leaves in `artifacts`, as far as the script reads them."""
    made = tmp_path_factory.mktemp("artifacts")
    models.save(trained(), made, architecture=None, preprocessing=RECIPE, class_names=NAMES)
    export_flavours(calibrated(), {"onnxruntime": made / "quantized.onnxruntime.onnx"}, input_size=SIZE)
    export(trained(), made / "pruned.onnx", input_size=SIZE)
    (made / "infer.py").write_bytes(SCRIPT.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(made / "photo.png")
    return made


def run(
    folder: Path, tmp_path: Path, *arguments: str, runtime: str = "onnxruntime"
) -> subprocess.CompletedProcess[str]:
    """In an interpreter that has numpy, Pillow, the one runtime and the standard library, and nothing else."""
    packages = tmp_path / f"only-{runtime}"
    packages.mkdir(exist_ok=True)
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", runtime):
        if (installed / name).exists() and not (packages / name).exists():
            (packages / name).symlink_to(installed / name)
    return subprocess.run(
        [sys.executable, "-S", str(folder / "infer.py"), *arguments, "--runtime", runtime], capture_output=True,
        text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(packages)},
    )  # fmt: skip


def test_the_interpreter_of_these_tests_is_as_bare_as_it_is_meant_to_be(folder, tmp_path):
    run(folder, tmp_path, "no.png")
    program = (
        "import importlib.util as u; print([n for n in ('numpy', 'onnxruntime', 'torch', 'onnx') if u.find_spec(n)])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "only-onnxruntime")},
    )  # fmt: skip
    assert done.stdout.strip() == "['numpy', 'onnxruntime']"


@pytest.mark.parametrize("file", [None, "pruned.onnx"])
def test_it_answers_what_the_runtime_answers(folder, tmp_path, file):
    done = run(folder, tmp_path, str(folder / "photo.png"), "--json", *(["--file", str(folder / file)] if file else []))
    assert done.returncode == 0, done.stderr
    top = json.loads(done.stdout)["top"]
    path = folder / (file or "quantized.onnxruntime.onnx")
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE)) as session:
        logits = session.run(expected_input(folder / "photo.png", RECIPE))[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert [name for name, _ in top] == [NAMES[k] for k in np.argsort(-shares)[:3]]
    np.testing.assert_allclose([share for _, share in top], np.sort(shares)[::-1][:3], rtol=1e-5)


def test_openvino_answers_alike_and_refuses_where_it_would_overflow(folder, tmp_path):
    photo = str(folder / "photo.png")
    done = run(folder, tmp_path, photo, "--file", str(folder / "pruned.onnx"), runtime="openvino")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(folder, tmp_path, photo, "--file", str(folder / "pruned.onnx")).stdout
    done = run(folder, tmp_path, photo, runtime="openvino")
    if machine.has_int8_dot_product():
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "use --runtime onnxruntime" in done.stderr
    assert load_script().has_int8_dot_product() == machine.has_int8_dot_product()


@pytest.mark.parametrize("size", [(SIZE, SIZE), (20, 31), (32, 8), (50, 33), (33, 50), (300, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocessing_is_the_package_s_to_the_last_bit(tmp_path, size, mode):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels, "RGBA").convert(mode).save(path)
    for recipe in (RECIPE, Preprocessing(SIZE, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 40, "bicubic")):
        assert np.array_equal(load_script().preprocess(path, recipe.as_dict()), expected_input(path, recipe))


def test_what_cannot_be_read_is_one_sentence(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    done = run(folder, tmp_path, str(tmp_path / "notes.txt"))
    assert done.returncode == 1 and "this image cannot be read" in done.stderr and "Traceback" not in done.stderr
    done = run(folder, tmp_path, str(folder / "photo.png"), "--file", "missing.onnx")
    assert done.returncode == 1 and "There is no ONNX file missing.onnx" in done.stderr
