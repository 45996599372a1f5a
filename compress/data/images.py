"""One untrusted image file becomes upright RGB pixels, and those the size that a model wants."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from compress.preprocessing import Preprocessing

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Decoders that may run; Pillow's others (EPS, PSD, FITS, ...) have had the memory errors of recent years."""
MAX_PIXELS = 25_000_000
MAX_FILE_BYTES = 20 * 2**20
MAX_ASPECT = 100
"""Longer over shorter side. Resizing keeps it, so a strip of 14 x 990,000 pixels would become one of gigabytes."""
MAX_SCANS = 100
"""Of a JPEG file. A progressive one has about ten, and each is a walk over all of its pixels."""
THUMBNAIL = 32
"""Largest side, in pixels, of an image that is padded instead of cropped; see `Preprocessing`."""

_SCAN = b"\xff\xda"
"""Begins a scan of a JPEG file; within one, 255 is never followed by this."""
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Unreadable(Exception):
    """Why one image is not used."""


def decode(data: bytes) -> Image.Image:
    """The pixels of an image file, upright, RGB, 8 bits per channel.

    Raises:
        Unreadable: not JPEG, PNG, WebP or BMP, damaged, animated, 16 bits per channel, over 25 million pixels, or over
            100 times as long as wide.
    """
    if len(data) > MAX_FILE_BYTES:
        raise Unreadable(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_unsuitable(image)
            if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS:
                raise Unreadable(f"a JPEG file of more than {MAX_SCANS} scans")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise Unreadable("not a JPEG, PNG, WebP or BMP image") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except Unreadable:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise a dozen types on damaged bytes
        raise Unreadable("damaged or cut off") from error


def _refuse_unsuitable(image: Image.Image) -> None:
    """By the header alone, before any pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"more than {MAX_PIXELS // 10**6} million pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Unreadable(f"one side is over {MAX_ASPECT} times the other")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a JPEG with a preview behind it, as phones write
        raise Unreadable("animated")
    if image.mode not in _EIGHT_BIT_MODES:
        raise Unreadable("more than 8 bits per channel")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The image at `input_size` x `input_size`, by rule 2 of `Preprocessing`; L stays L and RGB stays RGB.

    Raises Unreadable, before anything is allocated, as `refuse_unfit` does.
    """
    size = preprocessing.input_size
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    if image.size == (size, size):
        return image
    if max(image.size) <= THUMBNAIL:
        canvas = Image.new(image.mode, (THUMBNAIL, THUMBNAIL))
        canvas.paste(image, ((THUMBNAIL - image.width) // 2, (THUMBNAIL - image.height) // 2))
        return canvas if size == THUMBNAIL else canvas.resize((size, size), resample)
    refuse_unfit(image.size, preprocessing)
    width, height = _resized(image.size, preprocessing)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def refuse_unfit(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    """Raises Unreadable when an image of `size` (width, height) would have over 25 million pixels before the crop.

    Pillow's intermediate image is no larger than the larger of what goes in and what comes out.
    """
    width, height = _resized(size, preprocessing)
    if max(size) > THUMBNAIL and size != (preprocessing.input_size,) * 2 and width * height > MAX_PIXELS:
        raise Unreadable(
            f"{width:,} x {height:,} pixels once its shorter side has {preprocessing.shorter_side}, more than "
            f"{MAX_PIXELS // 10**6} million"
        )


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height before the centre crop."""
    shorter, side = min(size), preprocessing.shorter_side
    width, height = (side if length == shorter else int(side * length / shorter) for length in size)
    return width, height


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [channels, height, width]; one channel for mode L."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
