"""Images for a run: the bundled set, IDX folders, image folders and zips, labelled or not, or none at all.

Every image is opened once at the start, so what cannot be used is known before anything is trained. Pixels stay in
memory as bytes at the model's input size when they fit, else they are decoded again batch by batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from compress.data import fashion_mnist, images
from compress.data import layout as data_layout
from compress.data.archives import Files, open_files
from compress.data.images import Unreadable
from compress.errors import DataError
from compress.files import INSTALLATION
from compress.preprocessing import Preprocessing

ASSETS = INSTALLATION / "assets"
FASHION_MNIST, NONE = "fashion-mnist", "none"
MEMORY_BYTES = 2 * 2**30
"""Decoded pixels are kept when all of them fit into this."""
MAX_UNREADABLE = 0.05
SYNTHETIC = 256
UNKNOWN = -1
"""The label of an unlabelled image."""


Kind = Literal["labelled", "unlabelled", "none"]
R = TypeVar("R")


class Origin(Protocol):
    """Images before they are brought to a model's size."""

    def image(self, position: int) -> Image.Image: ...


@dataclass(frozen=True)
class _GreyArray:
    pixels: np.ndarray
    """uint8 [N, H, W]"""

    def image(self, position: int) -> Image.Image:
        return Image.fromarray(self.pixels[position])


@dataclass(frozen=True)
class _ImageFiles:
    files: Files
    names: tuple[str, ...]

    def image(self, position: int) -> Image.Image:
        try:
            return images.decode(self.files.read(self.names[position]))
        except Unreadable as reason:
            raise DataError(
                f"{self.names[position]} could be read before, but not any more ({reason}): leave the data as it is."
            ) from reason


@dataclass(frozen=True)
class Split(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The train or the test part; item i is (uint8 [C, size, size], label), C is 1 (grey) or 3."""

    origin: Origin
    positions: np.ndarray
    """int64 [N]: where in `origin` each image is."""
    labels: Tensor
    """int64 [N], the model's output; -1 when unlabelled."""
    preprocessing: Preprocessing
    pixels: Tensor | None
    """uint8 [N, C, size, size], or None when they are decoded batch by batch."""

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.take(torch.tensor([index]))[0], int(self.labels[index])

    def take(self, chosen: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
        """Images `chosen` (int64 [n]) as uint8 [n, C, size, size], at the size of `preprocessing` if given."""
        target = preprocessing or self.preprocessing
        if self.pixels is not None and _same_geometry(target, self.preprocessing):
            return self.pixels[chosen]
        positions = self.positions[chosen.numpy()]
        channels = len(images.to_pixels(self.origin.image(int(positions[0])))) if len(positions) else 3
        pixels = np.empty((len(positions), channels, target.input_size, target.input_size), dtype=np.uint8)

        def fill(row: int) -> None:
            pixels[row] = images.to_pixels(images.fit(self.origin.image(int(positions[row])), target))

        _in_threads(fill, range(len(positions)))
        return torch.from_numpy(pixels)

    def subset(self, chosen: Tensor) -> Split:
        """The images at the indices `chosen`, int64 of shape [n], in that order."""
        pixels = None if self.pixels is None else self.pixels[chosen]
        return replace(self, positions=self.positions[chosen.numpy()], labels=self.labels[chosen], pixels=pixels)


@dataclass(frozen=True)
class Dataset:
    """Images of a run; the test part is never trained on, calibrated on, or used to choose."""

    train: Split
    test: Split
    kind: Kind
    class_names: tuple[str, ...]
    """In the order of the model's outputs; empty when unknown."""
    source: str
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in words for the report."""
    synthetic: int = SYNTHETIC
    """Test images that are made up where there are none."""

    @property
    def has_images(self) -> bool:
        return self.kind != "none"

    @property
    def has_labels(self) -> bool:
        return self.kind == "labelled"

    def few(self, train: int, test: int, seed: int) -> Dataset:
        """At most so many images of each part, for a dry run; the training images are of different classes."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return replace(
            self,
            train=self.train.subset(order[:train].sort().values),
            test=self.test.subset(torch.arange(min(test, len(self.test)))),
            synthetic=test,
        )


def open_data(
    source: str,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    class_map: Mapping[str, int] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Open `fashion-mnist` (bundled), a folder with the four IDX files, an image folder, a zip, or `none`.

    Args:
        num_classes: outputs of the model.
        class_names: the model's own, in the order of its outputs, when known.
        class_map: class folder -> output.
        test_fraction: of each class, taken at random by `seed`, where there is no test folder.

    Raises:
        DataError: the images or labels cannot be used; the sentence says what to change.
    """
    if source == NONE:
        empty = Split(
            _GreyArray(np.zeros((0, 1, 1), np.uint8)),
            np.zeros(0, np.int64),
            torch.zeros(0, dtype=torch.int64),
            preprocessing,
            None,
        )
        return Dataset(empty, empty, "none", tuple(class_names or ()), NONE)
    outputs = _Outputs(num_classes, class_names, class_map)
    path = ASSETS / FASHION_MNIST if source == FASHION_MNIST else Path(source)
    if path.is_dir() and fashion_mnist.is_idx_folder(path):
        return _open_idx(path, source, preprocessing, outputs)
    if source == FASHION_MNIST:
        raise DataError(
            f"The bundled images are missing in {path}: restore it, or make it with scripts/make_demo_assets.py."
        )
    return _open_images(path, preprocessing, outputs, test_fraction, seed)


@dataclass(frozen=True)
class _Outputs:
    num_classes: int
    class_names: Sequence[str] | None
    class_map: Mapping[str, int] | None

    def assign(self, folders: Sequence[str], source: str) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
        return data_layout.assign_outputs(
            folders, num_classes=self.num_classes, class_names=self.class_names, class_map=self.class_map, source=source
        )


# ---- IDX files ----------------------------------------------------------------------------------------------------


def _open_idx(path: Path, source: str, preprocessing: Preprocessing, outputs: _Outputs) -> Dataset:
    """The four files' own parts; their labels are numbers, so the classes are in order already."""
    parts = fashion_mnist.read(path)
    names = (
        fashion_mnist.CLASS_NAMES
        if source == FASHION_MNIST
        else tuple(map(str, range(int(parts.train_labels.max()) + 1)))
    )
    index_of, class_names = _assign_numbers(names, source, outputs)
    of_label = torch.tensor([index_of[name] for name in names])
    tested = {image.tobytes() for image in parts.test_images}
    kept = np.array([image.tobytes() not in tested for image in parts.train_images])
    fits = (len(kept) + len(parts.test_labels)) * preprocessing.input_size**2 <= MEMORY_BYTES
    splits = []
    for pixels, numbers in (
        (parts.train_images[kept], parts.train_labels[kept]),
        (parts.test_images, parts.test_labels),
    ):
        labels = of_label[torch.from_numpy(numbers.astype(np.int64))]
        split = Split(_GreyArray(pixels), np.arange(len(pixels)), labels, preprocessing, None)
        splits.append(replace(split, pixels=_fit_grey(split)) if fits else split)
    name = source if source == FASHION_MNIST else path.name
    train, test = splits
    return Dataset(train, test, "labelled", class_names, name, _duplicate_note(int((~kept).sum())))


def _assign_numbers(names: tuple[str, ...], source: str, outputs: _Outputs) -> tuple[dict[str, int], tuple[str, ...]]:
    """Class -> output, and the name of every output. Label n is output n, unless a map or the names say otherwise."""
    known = outputs.class_names
    if outputs.class_map is None and len(names) == outputs.num_classes and set(known or ()) != set(names):
        return {name: index for index, name in enumerate(names)}, tuple(known or names)
    index_of, class_names, _ = outputs.assign(names, source)
    return index_of, class_names


def _fit_grey(split: Split) -> Tensor:
    """All pixels at the input size; small images at 32 are only padded, which needs no resizing one by one."""
    assert isinstance(split.origin, _GreyArray)
    pixels, size = torch.from_numpy(split.origin.pixels.copy())[:, None], split.preprocessing.input_size
    height, width = pixels.shape[-2:]
    if size == images.THUMBNAIL and max(height, width) <= size:
        left, top = (size - width) // 2, (size - height) // 2
        return functional.pad(pixels, (left, size - width - left, top, size - height - top))
    return split.take(torch.arange(len(split)))


# ---- image files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scanned:
    digests: dict[int, bytes]
    """SHA-256 of the decoded pixels of every usable image, by its position."""
    pixels: Tensor | None
    notes: tuple[str, ...]


def _open_images(
    path: Path, preprocessing: Preprocessing, outputs: _Outputs, test_fraction: float, seed: int
) -> Dataset:
    files = open_files(path)
    layout = data_layout.arrange(files.names, path.name)
    names = layout.train + (layout.test or ())
    index_of: dict[str, int] = {}
    class_names, notes = tuple(outputs.class_names or ()), layout.notes
    if layout.folder_of:
        index_of, class_names, more = outputs.assign(sorted(set(layout.folder_of.values())), path.name)
        notes += more
    else:
        notes += ("there are no class folders, so the images are used without labels",)
    scanned = _scan(files, names, preprocessing, path.name)
    usable = np.array(sorted(scanned.digests), dtype=np.int64)
    folders = [layout.folder_of.get(names[position], "") for position in usable]
    notes += scanned.notes + data_layout.check_counts(folders, path.name)
    labels = np.array([index_of.get(folder, UNKNOWN) for folder in folders], dtype=np.int64)
    tests = usable >= len(layout.train) if layout.test is not None else _choose_test(labels, test_fraction, seed)
    tested = {scanned.digests[position] for position in usable[tests]}
    repeated = np.array([scanned.digests[position] in tested for position in usable]) & ~tests
    origin = _ImageFiles(files, names)

    def split(chosen: np.ndarray) -> Split:
        pixels = None if scanned.pixels is None else scanned.pixels[torch.from_numpy(usable[chosen])]
        return Split(origin, usable[chosen], torch.from_numpy(labels[chosen]), preprocessing, pixels)

    train, test = split(~tests & ~repeated), split(tests)
    if not len(train) or not len(test):
        raise DataError(
            f"{path.name} leaves {len(train)} images to train on and {len(test)} to test on: add different images."
        )
    kind: Kind = "labelled" if layout.folder_of else "unlabelled"
    return Dataset(train, test, kind, class_names, path.name, notes + _duplicate_note(int(repeated.sum())))


def _scan(files: Files, names: tuple[str, ...], preprocessing: Preprocessing, source: str) -> _Scanned:
    """Open every image once: which are usable, their digests, and their pixels if all fit into memory."""
    size = preprocessing.input_size
    fits = len(names) * 3 * size * size <= MEMORY_BYTES
    pixels = torch.empty((len(names), 3, size, size), dtype=torch.uint8) if fits else None

    def look(position: int) -> bytes | Unreadable:
        try:
            image = images.decode(files.read(names[position]))
            images.refuse_unfit(image.size, preprocessing)
        except Unreadable as reason:
            return reason
        if pixels is not None:
            pixels[position] = torch.from_numpy(images.to_pixels(images.fit(image, preprocessing)))
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()

    looks = _in_threads(look, range(len(names)))
    refused = [f"{name} ({look})" for name, look in zip(names, looks, strict=True) if isinstance(look, Unreadable)]
    if len(refused) > MAX_UNREADABLE * len(names):
        raise DataError(
            f"{len(refused)} of {len(names)} images in {source} cannot be used, such as {'; '.join(refused[:3])}: at "
            "most 5 % are skipped, so remove or convert them to 8-bit JPEG, PNG, WebP or BMP."
        )
    notes: tuple[str, ...] = ()
    if refused:
        listed = "; ".join(refused[:50]) + ("; ..." if len(refused) > 50 else "")
        notes = (f"{len(refused)} unusable images were skipped: {listed}",)
    digests = {position: look for position, look in enumerate(looks) if isinstance(look, bytes)}
    return _Scanned(digests, pixels, notes)


def _choose_test(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: a random `fraction` of every class, at least one image and never all of it."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return chosen


def _duplicate_note(count: int) -> tuple[str, ...]:
    return (f"{count} training images that are also test images were left out of training",) if count else ()


def _in_threads(function: Callable[[int], R], items: Sequence[int]) -> list[R]:
    """Pillow decodes outside Python's lock, so threads help; as many as torch was told to use."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _same_geometry(one: Preprocessing, other: Preprocessing) -> bool:
    return (one.input_size, one.shorter_side, one.interpolation) == (
        other.input_size,
        other.shorter_side,
        other.interpolation,
    )
