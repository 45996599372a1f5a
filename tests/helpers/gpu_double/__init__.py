"""A GPU that is not there: stands for pycuda and TensorRT, holds their contract, and really answers.

Work that is put on a stream is carried out when the stream is waited for, as on a device: who reads an answer before
that reads nothing. Memory is a dictionary of buffers, so that nothing can be forgotten or overrun unseen. An engine
answers through ONNX Runtime. Objects of the bindings have the names that the published release has, and no others.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from gpu_double.bindings import NAMES, RELEASES, tensorrt_bindings
from gpu_double.device import Gpu, new_module, pycuda_driver

__all__ = ["NAMES", "RELEASES", "Gpu", "install"]


def install(monkeypatch: Any, gpu: Gpu, release: str) -> types.ModuleType:
    """Puts the double in place of the packages, with a logger and a context of its own, until the test ends."""
    from compress.engines import tensorrt, tensorrt_build, tensorrt_run

    package, driver, bindings = new_module("pycuda"), pycuda_driver(gpu), tensorrt_bindings(gpu, release)
    package.driver = driver
    for module in (package, driver, bindings):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    logger, real = tensorrt_build.logger_of.__wrapped__(bindings.__name__), tensorrt_build.logger_of
    monkeypatch.setattr(tensorrt, "logger_of", lambda module: logger if module == bindings.__name__ else real(module))

    def compile_here(runtime: Any, *rest: Any) -> Any:  # the double ends with this process
        logger.messages.clear()
        return runtime.compile(*rest)

    monkeypatch.setattr(tensorrt, "compile_apart", compile_here)
    monkeypatch.setattr(tensorrt, "load_apart", lambda runtime, path, spec, **_: runtime.open(path, spec))
    device = functools.cache(tensorrt_run.gpu.__wrapped__)
    for user in (tensorrt, tensorrt_run):
        monkeypatch.setattr(user, "gpu", device)
    return bindings
