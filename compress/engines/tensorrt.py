"""TensorRT, data-centre edition (10 and 11) and "for RTX": one implementation.

`tensorrt_build` makes engines, each in a process of its own (`remote.compile_apart`), `tensorrt_run` executes them, `passport`
decides whether one may be loaded. Only these files import tensorrt, tensorrt_rtx and pycuda. TensorRT for RTX builds
without a GPU; everything else needs one.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.engines import passport as passports
from compress.engines.base import BuildSpec, Built, Kernel, Runtime, Session, installed
from compress.engines.processes.remote import compile_apart
from compress.engines.processes.remote import load as load_apart
from compress.engines.tensorrt_build import (
    INPUT,
    OUTPUT,
    build_plan,
    check_targets,
    layers_of_build_log,
    layers_of_inspector,
    logger_of,
    offered_targets,
    profile_shapes,
)
from compress.engines.tensorrt_run import GPU_PACKAGES, TensorRTSession, gpu, inspect_engine, missing_gpu
from compress.errors import RuntimeUnavailableError
from compress.files import atomic, sha256


class TensorRTRuntime(Runtime):
    """What the two editions share."""

    module: str
    needs_gpu_to_build: bool
    how_to_install: str
    oldest: int
    """Major version."""
    layers_source: str
    """Where the layers of an engine are read, for its passport."""

    def missing(self) -> str | None:
        return self._missing_package() or (missing_gpu(self.title) if self.needs_gpu_to_build else None)

    @property
    def runs_here(self) -> bool:
        return self._missing_package() is None and missing_gpu(self.title) is None and self._takes(gpu().architecture)

    def build(self, onnx_path: Path, engine_path: Path, spec: BuildSpec) -> Built:
        if reason := self.missing():
            raise RuntimeUnavailableError(reason)
        if self.needs_gpu_to_build:
            # it builds for the GPU that is present; the targets are for the other edition
            spec = replace(spec, targets=())
        self.check_targets(spec.targets)
        with atomic(engine_path) as partial:
            kernels = compile_apart(self, onnx_path, partial, spec)
        passport = passports.write(engine_path, self._facts(onnx_path, spec, kernels))
        return Built(path=engine_path, ran=self.runs_here, text=passport["state"], passport=passport)

    def compile(self, onnx_path: Path, plan_path: Path, spec: BuildSpec) -> tuple[Kernel, ...]:
        """Writes the engine to `plan_path` and returns its layers with their precision; for a process that builds nothing
        else. Raises `HandoffError` with TensorRT's reason."""
        bindings, logger = importlib.import_module(self.module), logger_of(self.module)
        plan = build_plan(bindings, logger, onnx_path, spec)
        plan_path.write_bytes(plan)
        return self._layers(bindings, logger, plan)

    def load(self, path: Path, spec: BuildSpec, *, trial: bool = False) -> Session:
        """`path` is an engine that `build` wrote; see `passport.checked_engine` for those that are refused."""
        self._require_gpu()
        _, passport = passports.checked_engine(path, self.name)
        return load_apart(self, path, spec, trial=trial, trusted=passport["sha256"])

    def open(self, path: Path, spec: BuildSpec) -> Session:
        self._require_gpu()
        plan, passport = passports.checked_engine(path, self.name)
        bindings = importlib.import_module(self.module)
        return TensorRTSession(bindings, logger_of(self.module), plan, spec, passport)

    def unfit(self, passport: dict[str, Any]) -> list[str]:
        if reason := self._missing_package():
            return [reason]
        reasons = []
        if passport["platform"] != (here := passports.this_platform()):
            reasons.append(f"It was built on {passport['platform']}, and this machine is {here}.")
        version = str(importlib.import_module(self.module).__version__)
        if passport["runtime_version"] != version:
            reasons.append(
                f"It was built with {self.title} {passport['runtime_version']}, and {version} is installed here: only "
                "the version that built an engine loads it."
            )
        return [*reasons, *self._unfit_gpu(passport)]

    def _unfit_gpu(self, passport: dict[str, Any]) -> list[str]:
        if reason := missing_gpu(self.title):
            return [reason]
        here, reasons = gpu(), []
        if here.architecture not in passport["targets"]:
            reasons.append(
                f"It is for {', '.join(passport['targets'])}, and the {here.name} here is {here.architecture}."
            )
        elif passport["gpu"] not in (None, here.name):
            reasons.append(
                f"It was built on an {passport['gpu']}, and this machine has an {here.name}: {self.title} does not support "
                "an engine on another model of GPU."
            )
        return reasons

    def _require_gpu(self) -> None:
        if reason := self._missing_package() or missing_gpu(self.title):
            raise RuntimeUnavailableError(reason)

    def _missing_package(self) -> str | None:
        if not installed(self.module):
            return f"{self.title} is not installed: {self.how_to_install}."
        try:
            version = str(importlib.import_module(self.module).__version__)
        except (ImportError, OSError) as error:
            return f"{self.title} is installed but cannot be imported ({error}): {self.how_to_install}."
        if int(version.split(".")[0]) < self.oldest:
            return f"{self.title} {version} is installed, and {self.oldest} or newer is needed: {self.how_to_install}."
        return None

    @abstractmethod
    def _layers(self, bindings: ModuleType, logger: Any, plan: bytes) -> tuple[Kernel, ...]:
        """The engine's layers, read from `layers_source`."""

    def _facts(self, onnx_path: Path, spec: BuildSpec, kernels: tuple[Kernel, ...]) -> dict[str, Any]:
        bindings = importlib.import_module(self.module)
        integer = sum(kernel.precision == "int8" for kernel in kernels)
        state = "runs on this machine's GPU" if self.runs_here else "built, not run: this machine has no GPU for it"
        return {
            "runtime": self.name,
            "runtime_version": str(bindings.__version__),
            "built_from": onnx_path.name,
            "built_from_sha256": sha256(onnx_path),
            "gpu": gpu().name if self.needs_gpu_to_build else None,
            "targets": self._targets(bindings, spec),
            "inputs": {INPUT: {"dtype": "float32", "profile": profile_shapes(spec)}},
            "outputs": {OUTPUT: {"dtype": "float32"}},
            "strongly_typed": True,
            "integer_layers": integer,
            "candidate_layers": len(kernels),
            "layers": [asdict(kernel) for kernel in kernels],
            "layers_source": self.layers_source,
            "rebuild": passports.rebuild_command(onnx_path.name, self.name, spec),
            "state": f"{self.title}: {state}; {integer} of {len(kernels)} layers on int8.",
        }

    def _takes(self, architecture: str) -> bool:
        """Whether it runs on a GPU of this architecture; TensorRT for RTX does not on those of data centres."""
        return True

    @abstractmethod
    def _targets(self, bindings: ModuleType, spec: BuildSpec) -> list[str]:
        """Architectures of the GPUs that can run the engine."""


class TensorRT(TensorRTRuntime, name="tensorrt"):
    """The data-centre edition, 10 or 11: builds for, and runs on, the GPU that is present."""

    module, needs_gpu_to_build = "tensorrt", True
    how_to_install, oldest = GPU_PACKAGES, 10
    layers_source = "the engine inspector"

    def _layers(self, bindings: ModuleType, logger: Any, plan: bytes) -> tuple[Kernel, ...]:
        return layers_of_inspector(inspect_engine(bindings, logger, plan))

    def _targets(self, bindings: ModuleType, spec: BuildSpec) -> list[str]:
        return [gpu().architecture]


class TensorRTForRTX(TensorRTRuntime, name="tensorrt-rtx"):
    """The RTX edition: builds ahead of time for every supported RTX GPU or for those asked for, without one present."""

    module, needs_gpu_to_build = "tensorrt_rtx", False
    how_to_install, oldest = "install it with `pip install tensorrt-rtx`", 1
    layers_source = "the builder's verbose log"

    def check_targets(self, targets: tuple[str, ...]) -> None:
        if reason := self.missing():
            raise RuntimeUnavailableError(reason)
        check_targets(importlib.import_module(self.module), targets)

    def _takes(self, architecture: str) -> bool:
        return architecture in offered_targets(importlib.import_module(self.module))

    def _layers(self, bindings: ModuleType, logger: Any, plan: bytes) -> tuple[Kernel, ...]:
        return layers_of_build_log("\n".join(logger.messages))

    def _targets(self, bindings: ModuleType, spec: BuildSpec) -> list[str]:
        return list(spec.targets or offered_targets(bindings))
