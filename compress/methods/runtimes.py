"""The runtimes on offer. To add one, write its module in `compress.engines` and its entry here.

`compress.engines.RUNTIMES` makes the runtimes of this table; a class says which entry is its own:
`class OpenVino(OnnxLoader, name="openvino")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Flavour = Literal["tensorrt", "onnxruntime"]
"""The two Q/DQ conventions of a quantized ONNX file; see `compress.quantization.flavours`."""
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
Hint = Literal["latency", "throughput"]
"""One batch as soon as possible, or the most images per second with several requests under way."""


@dataclass(frozen=True)
class RuntimeEntry:
    """What can be said of a runtime without importing it."""

    name: str
    title: str
    """How it is called in text."""
    summary: str
    """One sentence."""
    implementation: str
    """`module:class`, below `compress.engines`."""
    flavour: Flavour
    """The Q/DQ convention that it executes fastest."""
    needs_gpu: bool
    """An NVIDIA GPU, to execute anything."""
    integer_kernels: bool
    """Executes quantized files with 8-bit integer kernels, and says so."""
    packages: tuple[str, ...]
    """What pip installs to run a delivered file with it, beside NumPy and Pillow."""
    infer_name: str
    """The runtime of the delivered `infer.py` that runs its file."""
    ahead_of_time: bool = False
    """Loads an engine that was built before, never the ONNX file itself."""
    builds_for_targets: bool = False
    """Builds engines for chosen GPU architectures, without such a GPU."""
    hints: tuple[Hint, ...] = ("latency",)
    """What it can be tuned for."""


RUNTIMES: dict[str, RuntimeEntry] = {
    entry.name: entry
    for entry in (
        RuntimeEntry(
            "onnxruntime", "ONNX Runtime", "Loads the ONNX file as it is, on the CPU.", "onnxruntime:OnnxRuntime",
            "onnxruntime", needs_gpu=False, integer_kernels=True, packages=("onnxruntime",), infer_name="onnxruntime",
        ),
        RuntimeEntry(
            "openvino", "OpenVINO", "Compiles the ONNX file for the CPU while loading it.", "openvino:OpenVino",
            "onnxruntime", needs_gpu=False, integer_kernels=True, packages=("openvino",), infer_name="openvino",
            hints=("latency", "throughput"),
        ),
        RuntimeEntry(
            "onnxruntime-cuda", "ONNX Runtime on CUDA", "Computes quantized layers in floating point on the GPU.",
            "onnxruntime:OnnxRuntimeCuda", "onnxruntime", needs_gpu=True, integer_kernels=False,
            packages=("onnxruntime",), infer_name="onnxruntime",
        ),
        RuntimeEntry(
            "onnxruntime-tensorrt", "ONNX Runtime on TensorRT", "Builds a TensorRT engine while loading the ONNX file.",
            "onnxruntime:OnnxRuntimeTensorRT", "tensorrt", needs_gpu=True, integer_kernels=False,
            packages=("onnxruntime",), infer_name="onnxruntime",
        ),
        RuntimeEntry(
            "tensorrt", "TensorRT", "Builds an engine for the GPU that is present.", "tensorrt:TensorRT", "tensorrt",
            needs_gpu=True, integer_kernels=True, packages=("tensorrt", "pycuda"), infer_name="tensorrt",
            ahead_of_time=True,
        ),
        RuntimeEntry(
            "tensorrt-rtx", "TensorRT for RTX", "Builds an engine for chosen RTX GPUs, also where there is none.",
            "tensorrt:TensorRTForRTX", "tensorrt", needs_gpu=True, integer_kernels=True,
            packages=("tensorrt-rtx", "pycuda"), infer_name="tensorrt-rtx", ahead_of_time=True, builds_for_targets=True,
        ),
    )
}  # fmt: skip
"""In the order in which they are listed and measured."""

REFERENCE = "onnxruntime"
"""The runtime that others are compared with: it executes a file as it is written, on any CPU."""
