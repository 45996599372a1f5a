"""One image through the deployed files of a finished run: the original and the compressed model side by side.

The files run in the runtimes that measured them; torch is not needed, and nothing of the image is kept.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress import runs
from compress.data.images import MAX_FILE_BYTES, Unreadable, decode, fit, to_pixels
from compress.engines import RUNTIMES, BuildSpec
from compress.engines.benchmark import Pace
from compress.errors import DataError, RunError, StorageError
from compress.files import sha256
from compress.preprocessing import Preprocessing
from compress.report import Measurement, Report
from compress.tasks import CLASSIFICATION

REPEATS = 15
PACE = Pace(burst_ms=2000.0, warm_calls=3, max_calls=REPEATS)
TOP = 5


def classify(folder: Path, image: Path) -> dict[str, Any]:
    """The classes that the original and the compressed model of a finished run see in `image`.

    Returns:
        input_size (pixels), seen (base64 of a PNG: the image as cropped and resized), repeats, and models, the original
        first: file, runtime, precision, ms (median of one call), top (class and share of the softmax, 0..1).

    Raises:
        DataError: the image cannot be used.
        RunError: there is no finished run in `folder`, or neither of its files can run on this machine.
        StorageError: a file was changed after the run.
    """
    report = Report.from_file(_checked(folder / "report.json"))
    recipe = json.loads(_checked(folder / "artifacts" / "model.json").read_text(encoding="utf-8"))
    preprocessing = Preprocessing.from_dict(recipe["preprocessing"])
    seen = _seen(image, preprocessing)
    images = _normalised(seen, preprocessing)
    models = [
        _answers(folder / "artifacts", row, images, recipe["class_names"])
        for row in (_runnable(report, 0, "fp32"), _runnable(report, -1, None))
    ]
    return {
        "input_size": preprocessing.input_size,
        "seen": _png(seen),
        "repeats": min(model.pop("repeats") for model in models),
        "models": models,
    }


def _checked(path: Path) -> Path:
    """The file, when it is the one that the run's manifest lists."""
    listed = runs.manifest_sha256(path)
    if listed is None:
        raise RunError(f"{path} belongs to no finished run: give the folder that `compress run` printed.")
    if not path.is_file() or sha256(path) != listed:
        raise StorageError(f"{path.name} was changed or removed after the run, so it is not used. Repeat the run.")
    return path


def _seen(path: Path, preprocessing: Preprocessing) -> Image.Image:
    try:
        with path.open("rb") as file:
            return fit(decode(file.read(MAX_FILE_BYTES + 1)), preprocessing)
    except Unreadable as error:
        raise DataError(f"This image cannot be used ({error}): choose a JPEG, PNG, WebP or BMP file.") from error
    except OSError as error:
        raise DataError(f"The image cannot be read ({error.strerror or error}): choose it again.") from error


def _normalised(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """float32 [1, 3, size, size]."""
    pixels = to_pixels(image).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray(((pixels - mean) / std)[None])


def _runnable(report: Report, variant: int, precision: str | None) -> Measurement:
    """The fastest measured file of a variant, one image at a time, of those that this machine can run."""
    name = report.variants[variant].name
    rows = [
        row
        for row in report.measurements
        if row.variant == name
        and row.batch_size == 1
        and precision in (None, row.precision)
        and RUNTIMES[row.runtime].runs_here
    ]
    chosen = [row for row in rows if row.runtime == report.verdict.runtime] if precision is None else []
    if not rows:
        raise RunError(f"No file of the {name} model that was measured can run on this machine, so it cannot be tried.")
    return min(chosen or rows, key=lambda row: row.p50_ms)


def _answers(artifacts: Path, row: Measurement, images: np.ndarray, names: list[str]) -> dict[str, Any]:
    path = _checked(artifacts / row.file)
    spec = BuildSpec.one_image(row.input_size, row.threads, row.precision_requested)  # type: ignore[arg-type]
    with RUNTIMES[row.runtime].load(path, spec) as session:
        logits = np.asarray(session.run(images), np.float64)[0]
        times = session.burst(images, PACE)
        precision = session.precision
    return {
        "file": row.file,
        "runtime": row.runtime,
        "precision": precision,
        "ms": statistics.median(times),
        "repeats": len(times),
        "top": [{"class": row.label, "share": row.share} for row in CLASSIFICATION.show(logits, names, TOP)],
    }


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
