"""A small network's files for TensorRT, and what ONNX Runtime answers with them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from quantization_networks import SIZE, Mixed, images, quantized_at, scratch_folder

import compress
from compress.engines import RUNTIMES, BuildSpec, Runtime
from compress.onnx_export import export, export_flavours

LAYERS = 10
"""Convolutions and fully connected layers of the small network."""
SPEC = BuildSpec(SIZE, batch_size=2, max_batch=4)
SCRIPT = Path(compress.__file__).parent / "report" / "templates" / "infer.py"


@functools.cache
def files() -> dict[str, Path]:
    """The network with random weights as `fp32`, and quantized for TensorRT."""
    folder = scratch_folder()
    torch.manual_seed(0)
    model = Mixed().eval()
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "tensorrt", "onnxruntime")}
    flavours = {flavour: paths[flavour] for flavour in ("tensorrt", "onnxruntime")}
    export_flavours(quantized_at(model, batches=[images(32, seed=2)[0]]), flavours, input_size=SIZE)
    export(model, paths["fp32"], input_size=SIZE)
    return paths


def batch(count: int) -> np.ndarray:
    return images(count, seed=5)[0].numpy()


def answers(path: Path, given: np.ndarray) -> np.ndarray:
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE)) as session:
        return session.run(given)


def runtime_of(release: str) -> Runtime:
    """The runtime whose bindings a release of `gpu_double.RELEASES` has."""
    return RUNTIMES["tensorrt-rtx" if release == "tensorrt_rtx" else "tensorrt"]
