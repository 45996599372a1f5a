"""Fashion-MNIST in its native form: four gzip-compressed IDX files, read and written here.

IDX is a big-endian header (two zero bytes, a type code, the number of dimensions, one 32-bit length per dimension)
followed by the values; Fashion-MNIST uses type 0x08 (unsigned byte) for images [N, 28, 28] and labels [N].
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import DataError

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MAX_VALUES = 512 * 2**20
"""Largest number of bytes one IDX file may unpack to; the full training images are 47 MB."""


@dataclass(frozen=True)
class IdxImages:
    """Grey images uint8 [N, H, W] and labels uint8 [N] of both parts."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds all four IDX files."""
    return all((folder / name).is_file() for name in FILES.values())


def read(folder: Path) -> IdxImages:
    """Both parts of an IDX folder.

    Raises DataError when a file is damaged, or images and labels differ in number.
    """
    arrays = {key: _read_idx(folder / name) for key, name in FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"The {part} part of {folder.name} has images of shape {images.shape} and labels of shape "
                f"{labels.shape}; expected [N, height, width] and [N]: copy the four files again."
            )
    return IdxImages(**arrays)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write unsigned bytes as a gzip-compressed IDX file, the same bytes for the same values."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    packed = gzip.compress(header + np.ascontiguousarray(values, dtype=np.uint8).tobytes(), 9, mtime=0)
    path.write_bytes(packed)


def _read_idx(path: Path) -> np.ndarray:
    damaged = f"{path.name} is not a complete IDX file of unsigned bytes: copy it again from its source."
    try:
        with gzip.open(path) as file:
            raw = file.read(MAX_VALUES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(damaged) from error
    if len(raw) > MAX_VALUES:
        raise DataError(f"{path.name} unpacks to more than {MAX_VALUES >> 20} MiB, the most that is read.")
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(damaged)
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])
    if values.size != int(np.prod(shape, dtype=np.float64)):
        raise DataError(damaged)
    return values.reshape(shape)
