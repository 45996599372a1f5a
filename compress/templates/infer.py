#!/usr/bin/env python3
"""Classify images with an ONNX file of this folder; numpy, Pillow and one runtime are all it needs.

    pip install numpy pillow onnxruntime      (or openvino)
    python infer.py IMAGE [IMAGE ...] [--file quantized.onnxruntime.onnx] [--runtime onnxruntime|openvino]

Preprocessing and class names are read from model.json beside this script: they are those of the measurements.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
FILES = ("quantized.onnxruntime.onnx", "half.onnx", "pruned.onnx", "baseline.onnx")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 25_000_000
THUMBNAIL = 32


def preprocess(path, recipe):
    """An image file as float32 [1, 3, size, size], normalised."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS // 10**6} million pixels")
        image.load()
        image = fit(to_rgb(ImageOps.exif_transpose(image)), recipe)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(recipe[name], dtype=np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[np.newaxis])


def to_rgb(image):
    """Transparency is put on white."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def fit(image, recipe):
    """Thumbnails are centred on a black canvas; photographs are resized by their shorter side and cropped."""
    size = recipe["input_size"]
    resample = Image.Resampling[recipe["interpolation"].upper()]
    if image.size == (size, size):
        return image
    if max(image.size) <= THUMBNAIL:
        canvas = Image.new("RGB", (THUMBNAIL, THUMBNAIL))
        canvas.paste(image, ((THUMBNAIL - image.width) // 2, (THUMBNAIL - image.height) // 2))
        return canvas if size == THUMBNAIL else canvas.resize((size, size), resample)
    shorter, side = min(image.size), recipe["resize_size"] or round(size * 256 / 224)
    width, height = (side if length == shorter else int(side * length / shorter) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def has_int8_dot_product():
    """Whether 8-bit kernels add products in 32 bits (VNNI, AMX, Arm); those of older x86 CPUs overflow 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(flags)


def load_onnxruntime(path, size):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not has_int8_dot_product():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def load_openvino(path, size):
    if path.name.startswith("quantized") and not has_int8_dot_product():
        sys.exit("OpenVINO's 8-bit kernels overflow on this CPU (no int8 dot product); use --runtime onnxruntime.")
    sys.modules.setdefault("openvino_telemetry", None)  # nothing is sent or stored; OpenVINO brings a stub for it
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape([1, 3, size, size])
    compiled = core.compile_model(model, "CPU")
    return lambda images: compiled(images)[0]


RUNTIMES = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    first = next((HERE / name for name in FILES if (HERE / name).exists()), None)
    parser.add_argument("--file", type=Path, default=first)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), default="onnxruntime")
    parser.add_argument("--top", type=int, default=3, help="how many classes to print")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    options = parser.parse_args()
    if options.file is None or not options.file.is_file():
        sys.exit(f"There is no ONNX file {options.file or f'in {HERE}'}; give one with --file.")
    model = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
    recipe, names = model["preprocessing"], model["class_names"]
    classify = RUNTIMES[options.runtime](options.file, recipe["input_size"])
    for path in options.images:
        try:
            images = preprocess(path, recipe)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            sys.exit(f"{path}: this image cannot be read ({error}).")
        logits = np.asarray(classify(images))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        order = np.argsort(-shares)[: options.top]
        best = [(names[k] if k < len(names) else f"class {k}", float(shares[k])) for k in order]
        if options.json:
            print(json.dumps({"image": str(path), "top": best}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in best))


if __name__ == "__main__":
    main()
