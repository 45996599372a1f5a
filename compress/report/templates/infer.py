#!/usr/bin/env python3
"""Classify images with the files of this folder; numpy, Pillow and one runtime are all it needs.

    pip install numpy pillow onnxruntime            python infer.py IMAGE [IMAGE ...]
    pip install numpy pillow openvino               python infer.py --runtime openvino IMAGE
    pip install numpy pillow tensorrt pycuda        python infer.py --runtime tensorrt IMAGE        (NVIDIA GPU)
    pip install numpy pillow tensorrt-rtx pycuda    python infer.py --runtime tensorrt-rtx IMAGE    (NVIDIA RTX GPU)

--file takes another ONNX file of this folder. TensorRT also takes an engine (*.engine, with its passport *.engine.json);
from an ONNX file it builds one first, for the GPU and the version at hand, which takes a minute. Preprocessing and class
names are read from model.json beside this script: they are those of the measurements.
"""

import argparse
import hashlib
import importlib
import json
import platform
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
FLOAT_FILES = ("half.onnx", "pruned.onnx", "baseline.onnx")
FILES = {
    "onnxruntime": ("quantized.onnxruntime.onnx", *FLOAT_FILES),
    "openvino": ("quantized.onnxruntime.onnx", *FLOAT_FILES),
    "tensorrt": ("quantized.tensorrt.tensorrt.engine", "quantized.tensorrt.onnx", *FLOAT_FILES),
    "tensorrt-rtx": ("quantized.tensorrt.tensorrt-rtx.engine", "quantized.tensorrt.onnx", *FLOAT_FILES),
}
"""What a runtime takes by itself: the first of these that is there."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS, MAX_ASPECT = 25_000_000, 100
THUMBNAIL = 32


def preprocess(path, recipe):
    """An image file as float32 [1, 3, size, size], normalised."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS // 10**6} million pixels")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"one side is over {MAX_ASPECT} times the other")
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
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels once resized, more than {MAX_PIXELS // 10**6} million")
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


@contextmanager
def load_onnxruntime(path, size):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not has_int8_dot_product():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[
            "WeightBiasQuantization"
        ],  # as in the measurements: it would round what the file holds exactly
    )
    yield lambda images: session.run(None, {"images": images})[0]


@contextmanager
def load_openvino(path, size):
    if path.name.startswith("quantized") and not has_int8_dot_product():
        sys.exit("OpenVINO's 8-bit kernels overflow on this CPU (no int8 dot product); use --runtime onnxruntime.")
    sys.modules.setdefault("openvino_telemetry", None)  # nothing is sent or stored; OpenVINO brings a stub for it
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape([1, 3, size, size])
    compiled = core.compile_model(model, "CPU")
    yield lambda images: compiled(images)[0]


@contextmanager
def load_tensorrt(path, size, module="tensorrt"):
    import pycuda.driver as cuda

    trt = importlib.import_module(module)
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    runtime = engine = execution = None
    try:
        logger = trt.Logger(trt.Logger.ERROR)
        plan = checked_engine(path, trt) if path.suffix == ".engine" else build_engine(trt, logger, path, size)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            sys.exit(f"{path.name} cannot be loaded on this machine; take an ONNX file with --file.")
        execution, stream = engine.create_execution_context(), cuda.Stream()
        images = cuda.pagelocked_empty((1, 3, size, size), np.float32)
        logits = cuda.pagelocked_empty((1, int(engine.get_tensor_shape("logits")[-1])), np.float32)
        device_images, device_logits = cuda.mem_alloc(images.nbytes), cuda.mem_alloc(logits.nbytes)
        execution.set_input_shape("images", images.shape)
        execution.set_tensor_address("images", int(device_images))
        execution.set_tensor_address("logits", int(device_logits))

        def classify(pixels):
            images[:] = pixels
            cuda.memcpy_htod_async(device_images, images, stream)
            if not execution.execute_async_v3(stream.handle):
                sys.exit("TensorRT could not run this image; its log above has the reason.")
            cuda.memcpy_dtoh_async(logits, device_logits, stream)
            stream.synchronize()
            return logits

        yield classify
    finally:
        execution = engine = runtime = None  # freed in this order, while the context is current
        cuda.Context.pop()


def checked_engine(path, trt):
    """The engine's bytes. Loading one runs code from it, so it must be the file that its passport describes."""
    other = "take an ONNX file with --file, and an engine is built from it"
    try:
        passport = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sys.exit(f"{path.name} has no passport {path.name}.json beside it; {other}.")
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != passport["sha256"]:
        sys.exit(f"{path.name} is not the file that its passport describes (sha256); {other}.")
    if passport["runtime_version"] != trt.__version__:
        sys.exit(f"{path.name} is for version {passport['runtime_version']}, here is {trt.__version__}; {other}.")
    return plan


def build_engine(trt, logger, path, size):
    """An engine for one image per call. The file says what runs on integers; TensorRT 10 has to be told to follow it."""
    print(f"building an engine from {path.name} ...", file=sys.stderr)
    builder = trt.Builder(logger)
    old = trt.__version__.startswith("10.")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if old else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        sys.exit(f"TensorRT cannot read {path.name}: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)  # as in the measurements
    profile.set_shape("images", *[[1, 3, size, size]] * 3)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit(f"TensorRT cannot build an engine from {path.name}; its log above has the reason.")
    return bytes(plan)


def load_tensorrt_rtx(path, size):
    return load_tensorrt(path, size, "tensorrt_rtx")


RUNTIMES = {
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "tensorrt": load_tensorrt,
    "tensorrt-rtx": load_tensorrt_rtx,
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    arguments.add_argument("--file", type=Path, help="default: the smallest that the runtime runs fast")
    arguments.add_argument("--runtime", choices=sorted(RUNTIMES), default="onnxruntime")
    arguments.add_argument("--top", type=int, default=3, help="how many classes to print")
    arguments.add_argument("--json", action="store_true", help="one JSON object per image")
    options = arguments.parse_args()
    file = options.file or next((HERE / name for name in FILES[options.runtime] if (HERE / name).exists()), None)
    if file is None or not file.is_file():
        sys.exit(f"There is no ONNX file {file or f'in {HERE}'}; give one with --file.")
    if file.suffix == ".engine" and "tensorrt" not in options.runtime:
        sys.exit(f"{file.name} is an engine; take --runtime tensorrt or tensorrt-rtx, or an ONNX file.")
    model = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
    recipe, names = model["preprocessing"], model["class_names"]
    with RUNTIMES[options.runtime](file, recipe["input_size"]) as classify:
        for path in options.images:
            try:
                images = preprocess(path, recipe)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                sys.exit(f"{path}: this image cannot be read ({error}).")
            best = ranked(classify(images), names)[: options.top]
            if options.json:
                print(json.dumps({"image": str(path), "top": best}))
            else:
                print(f"{path}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in best))


def ranked(logits, names):
    """(class, share of the softmax) in falling order, of logits [1, classes]."""
    logits = np.asarray(logits)[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return [(names[k] if k < len(names) else f"class {k}", float(shares[k])) for k in np.argsort(-shares)]


if __name__ == "__main__":
    main()
