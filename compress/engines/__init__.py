"""The runtimes behind one small interface. Only the module of a runtime imports that runtime, and only when used.

A runtime compiles and executes in a process of its own, because a crash of its native code would end this one: see `remote`
for how files are loaded there, `process` for how it fails, `worker` for what it does.

runtime = RUNTIMES["onnxruntime"]
with runtime.load(path, BuildSpec(input_size=224, threads=1)) as session:
    logits, kernels = session.run(images), session.kernels()
"""

from __future__ import annotations

from compress.engines.base import BuildSpec, Built, Hint, Kernel, Precision, Runtime, Session
from compress.engines.onnxruntime import OnnxRuntime, OnnxRuntimeCuda, OnnxRuntimeTensorRT
from compress.engines.openvino import OpenVino
from compress.engines.tensorrt import TensorRT, TensorRTForRTX

__all__ = ["RUNTIMES", "BuildSpec", "Built", "Hint", "Kernel", "Precision", "Runtime", "Session"]

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        OnnxRuntime(),
        OpenVino(),
        OnnxRuntimeCuda(),
        OnnxRuntimeTensorRT(),
        TensorRT(),
        TensorRTForRTX(),
    )
}
"""In the order in which they are listed and measured."""
