"""Images, class folders and zips for tests."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from compress.data import dataset
from compress.preprocessing import Preprocessing

RECIPE = Preprocessing(24, (0.5, 0.4, 0.3), (0.25, 0.3, 0.35))


def photo(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, counts: dict[str, int], start: int = 0) -> None:
    """`counts` images in each folder, all different."""
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number:03}.png").write_bytes(encoded(photo(start + 1000 * index + number)))


def open_at(path: Path | str, classes: int = 2, **options: object) -> dataset.Dataset:
    return dataset.open_data(str(path), RECIPE, num_classes=classes, **options)


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def class_entries(root: str = "") -> dict[str, bytes]:
    return {
        f"{root}{name}/{number}.png": encoded(photo(50 * index + number))
        for index, name in enumerate(("cat", "dog"))
        for number in range(12)
    }


def replaced(split: dataset.Split) -> dataset.Split:
    """The same part, decoded image by image."""
    return dataset.Split(split.origin, split.positions, split.labels, split.preprocessing, None)
