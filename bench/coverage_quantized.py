"""The second stage of a row of docs/coverage.md: the pruned model on 8-bit integers, through every runtime.

The model is pruned as in the first stage, learns ten patterns for a moment (see bench/patterns.py) and is quantized by
calibration alone.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bench import patterns
from bench.coverage import SPARSITY, Row, subject
from compress import onnx_export, pruning, quantization
from compress.engines import RUNTIMES, BuildSpec, Kernel
from compress.equality import outputs
from compress.errors import CompressError
from compress.tasks import CLASSIFICATION

IMAGES, CALIBRATION_IMAGES, BATCH = 256, 128, 32


def measure(name: str, folder: Path) -> Row:
    """The quantized part of the row `name`, in this process; files are left in `folder`.

    Raises:
        CompressError: the model cannot be pruned, quantized or exported. What a runtime refuses stands in the row.
    """
    tested = subject(name)
    model = tested.build()
    images = tested.images()
    small = pruning.prune(model, images, pruning.plan(model, images, sparsity=SPARSITY), "l1-norm").model.eval()
    started = time.perf_counter()
    patterns.learn(small, tested.input_size)
    seen, _ = patterns.images(CALIBRATION_IMAGES, tested.input_size, seed=1001)
    prepared = quantization.prepare(small)
    plan = quantization.assign_bits(prepared, 8, 8)
    quantized = quantization.quantize(prepared, plan, quantizer="ptq", calibration=seen.split(BATCH), train=None)
    paths = {flavour: folder / f"quantized.{flavour}.onnx" for flavour in quantization.FLAVOURS}
    onnx_export.export_flavours(quantized, paths, input_size=tested.input_size)

    images, labels = patterns.images(IMAGES, tested.input_size, seed=1002)
    wanted = {
        flavour: _answers(outputs.torch_answer(quantization.fake_quantized(quantized, flavour)), images)
        for flavour in paths
    }
    return {
        "images": len(images),
        "right": {
            "float": _right(_answers(outputs.torch_answer(small), images), labels),
            "fake_quantized": _right(wanted["onnxruntime"], labels),
        },
        "layers": len(quantization.quantized_layers(prepared)),
        "files": {flavour: _file_facts(path, wanted[flavour], images) for flavour, path in paths.items()},
        "runtimes": {name: _runtime_facts(name, paths, wanted, images) for name in ("openvino", "tensorrt-rtx")},
        "left_float": _left_float(prepared),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _file_facts(path: Path, wanted: np.ndarray, images: Tensor) -> Row:
    """How near a file's answers through ONNX Runtime, which executes either flavour exactly, are to torch's."""
    size = images.shape[-1]
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(size, static=False)) as session:
        return _agreement(wanted, _answers(session.run, images)) | _kernel_facts(session.kernels())


def _runtime_facts(name: str, paths: dict[Any, Path], wanted: dict[Any, np.ndarray], images: Tensor) -> Row:
    runtime = RUNTIMES[name]
    path, size = paths[runtime.flavour], images.shape[-1]
    if reason := runtime.missing():
        return {"error": reason}
    try:
        if not runtime.runs_here:
            built = runtime.build(path, path.with_suffix(".engine"), BuildSpec(size, 1, BATCH))
            return _kernel_facts(tuple(Kernel(**layer) for layer in built.passport["layers"]))
        with runtime.load(path, BuildSpec(size, BATCH, BATCH)) as session:
            got = _answers(session.run, images)
            notes = {"notes": list(session.notes)} if session.notes else {}
            return _agreement(wanted[runtime.flavour], got) | _kernel_facts(session.kernels()) | notes
    except CompressError as error:
        return {"error": str(error)}


def _answers(answer: outputs.Answer, images: Tensor) -> np.ndarray:
    return outputs.of_batches(answer, images.split(BATCH))


def _right(answers: np.ndarray, labels: Tensor) -> float:
    return CLASSIFICATION.score(answers, labels.numpy()).value


def _agreement(wanted: np.ndarray, got: np.ndarray) -> Row:
    difference = CLASSIFICATION.compare(wanted, got)
    rms = float(np.sqrt(np.mean(np.square(wanted - got))))
    return {"top1": difference.top1_agreement, "relative_rms": rms / difference.reference_scale}


def _kernel_facts(kernels: tuple[Kernel, ...]) -> Row:
    floats = [kernel.name for kernel in kernels if kernel.precision != "int8"]
    return {"integer": len(kernels) - len(floats), "candidates": len(kernels), "float": floats}


def _left_float(prepared: Any) -> list[list[Any]]:
    """[type, reason, how many] of the parts that stay float by design."""
    parts = Counter((part["type"], part["reason"]) for part in quantization.left_float(prepared))
    return [[*part, count] for part, count in parts.items()]
