"""The runtimes behind one small interface. Only the module of a runtime imports that runtime, and only when used.

A runtime compiles and executes in a process of its own, because a crash of its native code would end this one: see `remote`
for how files are loaded there, `process` for how it fails, `worker` for what it does.

runtime = RUNTIMES["onnxruntime"]
with runtime.load(path, BuildSpec(input_size=224, threads=1)) as session:
    logits, kernels = session.run(images), session.kernels()
"""

from __future__ import annotations

import importlib

from compress.engines.base import BuildSpec, Built, Kernel, Runtime, Session
from compress.methods import runtimes
from compress.methods.runtimes import Hint, Precision, RuntimeEntry

__all__ = ["RUNTIMES", "BuildSpec", "Built", "Hint", "Kernel", "Precision", "Runtime", "Session"]


def _implementation(entry: RuntimeEntry) -> Runtime:
    module, _, name = entry.implementation.partition(":")
    runtime = getattr(importlib.import_module(f"compress.engines.{module}"), name)()
    assert isinstance(runtime, Runtime)
    return runtime


RUNTIMES: dict[str, Runtime] = {name: _implementation(entry) for name, entry in runtimes.RUNTIMES.items()}
"""In the order in which they are listed and measured."""
