"""One image file at a time: what is decoded, what is refused, and how it is brought to the model's size."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from image_files import RECIPE, encoded, photo
from PIL import Image

from compress.data import images
from compress.data.images import Unreadable
from compress.errors import RequestError
from compress.preprocessing import Preprocessing


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "LA", {}),
        ("PNG", "RGBA", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
    ],
)
def test_every_supported_kind_becomes_rgb(kind, mode, options):
    picture = Image.new("RGB", (6, 5), (204, 204, 204)).convert(mode)
    decoded = images.decode(encoded(picture, kind, **options))
    expected = 255 if mode == "1" else 204
    assert (decoded.mode, decoded.size) == ("RGB", (6, 5))
    assert np.abs(np.median(np.asarray(decoded).astype(int), (0, 1)) - expected).max() <= 3


def test_transparency_is_put_on_white_and_rotation_is_undone():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert images.decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert images.decode(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    upright = Image.new("RGB", (8, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(encoded(upright, "JPEG", exif=exif)).size == (16, 8)


def deep_png() -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)))


def huge_png() -> bytes:
    """Header of a 6000 x 6000 image; nothing behind it needs to be decoded."""
    data_bytes = bytearray(encoded(Image.new("1", (8, 8))))
    data_bytes[16:24] = struct.pack(">II", 6000, 6000)
    data_bytes[29:33] = struct.pack(">I", zlib.crc32(bytes(data_bytes[12:29])))
    return bytes(data_bytes)


def many_scans() -> bytes:
    """The last scan of a progressive JPEG, again and again: 20 MB of them take minutes."""
    content = encoded(photo(0, (64, 64)), "JPEG", progressive=True)
    assert 3 < content.count(b"\xff\xda") < 20 and images.decode(content).size == (64, 64)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 200 + content[-2:]


def animated() -> bytes:
    return encoded(photo(0), "WEBP", save_all=True, append_images=[photo(1)])


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda: b"", "not a JPEG, PNG, WebP or BMP"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG"),
        (lambda: encoded(photo(0), "GIF"), "not a JPEG"),
        (lambda: encoded(photo(0), "TIFF"), "not a JPEG"),
        (lambda: encoded(photo(0), "JPEG")[:-300], "damaged or cut off"),
        (lambda: encoded(photo(0))[:-300], "damaged or cut off"),
        (deep_png, "more than 8 bits"),
        (huge_png, "more than 25 million pixels"),
        (animated, "animated"),
        (many_scans, "a JPEG file of more than 100 scans"),
        (lambda: b"\xff" * (20 * 2**20 + 1), "larger than 20 MiB"),
    ],
)
def test_unsuitable_images_are_refused_by_their_content(content, reason):
    with pytest.raises(Unreadable, match=reason):
        images.decode(content())


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (47, 33), (224, 500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_are_resized_and_cropped_as_torchvision_does_it(size, interpolation):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as published

    recipe = Preprocessing(64, RECIPE.mean, RECIPE.std, 73, interpolation)
    image = photo(3, size)
    expected = published.center_crop(published.resize(image, [73], InterpolationMode(interpolation)), [64])
    assert np.array_equal(np.asarray(images.fit(image, recipe)), np.asarray(expected))
    assert Preprocessing(64, RECIPE.mean, RECIPE.std).shorter_side == 73


def test_small_images_are_centred_on_black_and_fitting_ones_stay():
    small = Image.new("L", (28, 27), 255)
    padded = np.asarray(images.fit(small, Preprocessing(32, RECIPE.mean, RECIPE.std)))
    assert padded.shape == (32, 32) and padded.sum() == 255 * 28 * 27
    assert padded[2, 2] == 255 and padded[1].max() == padded[:, 1].max() == padded[29].max() == 0
    assert images.fit(small, Preprocessing(64, RECIPE.mean, RECIPE.std)).size == (64, 64)
    exact = photo(1, (64, 64))
    assert images.fit(exact, Preprocessing(64, RECIPE.mean, RECIPE.std)) is exact


@pytest.mark.parametrize(
    "change, words",
    [
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.1,)}, "three finite numbers"),
        ({"input_size": 0}, "input_size"),
        ({"resize_size": 20}, "at least the input size, 24"),
        ({"interpolation": "magic"}, "bilinear or bicubic"),
    ],
)
def test_impossible_preprocessing_is_refused(change, words):
    with pytest.raises(RequestError, match=words):
        Preprocessing.from_dict(RECIPE.as_dict() | change)
