"""TensorRT, data-centre edition and "for RTX". The only file that imports tensorrt, tensorrt_rtx and pycuda.

Both editions read explicit Q/DQ ONNX into a strongly typed network: the file alone decides what runs on integers. Only
names that the published bindings of TensorRT 10.16, 11.4 and TensorRT for RTX 1.7 all have are used. TensorRT for
RTX builds without a GPU; everything else here needs one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from compress.engines.base import BuildSpec, Built, Flavour, Kernel, Runtime, Session, check_images, precision_of
from compress.errors import HandoffError, RuntimeUnavailableError
from compress.files import atomic, sha256, write_text

_INPUT, _OUTPUT = "images", "logits"
_PRECISION = {"Int8": "int8", "Float": "fp32", "Half": "fp16", "BFloat16": "bf16"}
_LAYER_LINE = re.compile(
    r"^Name: (?P<name>[^,]+), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants:", re.MULTILINE
)
_LAYERS = frozenset({"correlation", "gemm"})
"""Convolutions and fully connected layers, in the words of the engine's layer list."""
_FUSED_LAYER = re.compile(r"^__myl_\w*Fc")
_ENGINE_SUFFIX = re.compile(r"_myl\d+_\d+$")
_GPU_PACKAGES = "install the packages of requirements-gpu.txt on a host with an NVIDIA GPU, or use the Docker image"


class _TensorRTRuntime(Runtime):
    """What the two editions share."""

    flavour: Flavour = "tensorrt"
    module: str
    needs_gpu_to_build: bool

    def missing(self) -> str | None:
        if not _installed(self.module):
            return f"{self.title} is not installed: {self._how_to_install()}."
        return _missing_gpu(self.title) if self.needs_gpu_to_build else None

    @property
    def runs_here(self) -> bool:
        return _installed(self.module) and _missing_gpu(self.title) is None

    def build(self, onnx_path: Path, engine_path: Path, spec: BuildSpec) -> Built:
        if reason := self.missing():
            raise RuntimeUnavailableError(reason)
        bindings = importlib.import_module(self.module)
        logger = _logger(self.module)
        logger.messages.clear()
        plan = _build_plan(bindings, logger, onnx_path, spec)
        kernels = layers_of_build_log("\n".join(logger.messages))
        with atomic(engine_path) as partial:
            partial.write_bytes(plan)
        passport = self._passport(bindings, onnx_path, engine_path, spec, kernels)
        write_text(_passport_path(engine_path), json.dumps(passport, indent=1) + "\n")
        return Built(path=engine_path, ran=self.runs_here, text=passport["state"], passport=passport)

    def load(self, path: Path, spec: BuildSpec) -> Session:
        """`path` is an engine that `build` wrote; its passport must stand beside it and hold its hash."""
        if not _installed(self.module):
            raise RuntimeUnavailableError(f"{self.title} is not installed: {self._how_to_install()}.")
        if reason := _missing_gpu(self.title):
            raise RuntimeUnavailableError(reason)
        passport = _checked_passport(path, self.name)
        return _TensorRTSession(importlib.import_module(self.module), _logger(self.module), path, spec, passport)

    def _passport(
        self, bindings: ModuleType, onnx_path: Path, engine_path: Path, spec: BuildSpec, kernels: tuple[Kernel, ...]
    ) -> dict[str, Any]:
        integer = sum(kernel.precision == "int8" for kernel in kernels)
        shapes = dict(zip(("min", "opt", "max"), _profile(spec), strict=True))
        state = "runs on this machine's GPU" if self.runs_here else "built, not run: this machine has no NVIDIA GPU"
        return {
            "runtime": self.name,
            "runtime_version": str(bindings.__version__),
            "built_from": onnx_path.name,
            "built_from_sha256": sha256(onnx_path),
            "sha256": sha256(engine_path),
            "size_bytes": engine_path.stat().st_size,
            "targets": self._targets(),
            "inputs": {_INPUT: {"dtype": "float32", "profile": shapes}},
            "outputs": {_OUTPUT: {"dtype": "float32"}},
            "strongly_typed": True,
            "integer_layers": integer,
            "candidate_layers": len(kernels),
            "layers": [{"name": kernel.name, "type": kernel.type, "precision": kernel.precision} for kernel in kernels],
            "layers_source": "the builder's verbose log",
            "state": f"{self.title}: {state}; {integer} of {len(kernels)} layers on int8 by its build log.",
        }

    def _how_to_install(self) -> str:
        raise NotImplementedError

    def _targets(self) -> list[str]:
        raise NotImplementedError


class TensorRT(_TensorRTRuntime):
    """The data-centre edition: builds for, and runs on, the GPU that is present."""

    name, title = "tensorrt", "TensorRT"
    module, needs_gpu_to_build = "tensorrt", True

    def _how_to_install(self) -> str:
        return _GPU_PACKAGES

    def _targets(self) -> list[str]:
        device = _cuda().Device(0)
        major, minor = device.compute_capability()
        return [f"{device.name()} (compute capability {major}.{minor})"]


class TensorRTForRTX(_TensorRTRuntime):
    """The RTX edition: builds ahead of time for every supported RTX GPU, without one present."""

    name, title = "tensorrt-rtx", "TensorRT for RTX"
    module, needs_gpu_to_build = "tensorrt_rtx", False

    def _how_to_install(self) -> str:
        return "install it with `pip install tensorrt-rtx`"

    def _targets(self) -> list[str]:
        return ["any GPU that this version of TensorRT for RTX supports; kernels are compiled at the first load"]


# ---- building -----------------------------------------------------------------------------------------------------


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _logger(module: str) -> Any:
    """TensorRT keeps the first logger of a process for good, so there is one per edition; it collects the build log."""
    bindings = importlib.import_module(module)

    class Collector(bindings.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)

    return Collector()


def _profile(spec: BuildSpec) -> tuple[list[int], list[int], list[int]]:
    """Smallest, usual and largest input shape."""
    image = [3, spec.input_size, spec.input_size]
    largest = max(spec.max_batch, spec.batch_size)
    return [1, *image], [spec.batch_size, *image], [largest, *image]


def _build_plan(bindings: ModuleType, logger: Any, onnx_path: Path, spec: BuildSpec) -> bytes:
    builder = bindings.Builder(logger)
    network = builder.create_network(1 << int(bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = bindings.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = "; ".join(dict.fromkeys(parser.get_error(index).desc() for index in range(parser.num_errors)))
        raise HandoffError(f"{bindings.__name__} cannot read {onnx_path.name}: {reasons}")
    config = builder.create_builder_config()
    config.profiling_verbosity = bindings.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape(_INPUT, *_profile(spec))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = next((message for message in reversed(logger.messages) if "rror" in message), "it gives no reason")
        raise HandoffError(f"{bindings.__name__} cannot build an engine from {onnx_path.name}: {last}")
    return bytes(plan)


def layers_of_build_log(log: str) -> tuple[Kernel, ...]:
    """The convolutions and fully connected layers that the verbose log lists for the finished engine."""
    found = []
    for line in _LAYER_LINE.finditer(log):
        if line["type"] in _LAYERS or _FUSED_LAYER.match(line["name"]):
            types = re.findall(r"Datatype: (\w+)", line["inputs"])
            precision = _PRECISION.get(types[0], types[0].lower()) if types else "unknown"
            found.append(Kernel(_ENGINE_SUFFIX.sub("", line["name"]), line["type"], precision))
    return tuple(found)


def _passport_path(engine_path: Path) -> Path:
    return engine_path.with_name(f"{engine_path.name}.json")


def _checked_passport(engine_path: Path, runtime: str) -> dict[str, Any]:
    """Deserializing an engine runs code from it, so only one with our own passport and an equal hash is loaded."""
    try:
        passport = json.loads(_passport_path(engine_path).read_text(encoding="utf-8"))
        expected = passport["sha256"], passport["runtime"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HandoffError(f"{engine_path.name} has no readable passport ({error}); build the engine again.") from error
    if (sha256(engine_path), runtime) != expected:
        raise HandoffError(f"{engine_path.name} is not the file that its passport describes; build the engine again.")
    return passport


# ---- running (needs a GPU) ----------------------------------------------------------------------------------------


def _cuda() -> Any:
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    return driver


def _missing_gpu(title: str) -> str | None:
    """One sentence why nothing can run on a GPU here, or None."""
    if not _installed("pycuda"):
        return f"{title} runs on an NVIDIA GPU through pycuda, which is not installed: {_GPU_PACKAGES}."
    try:
        count = _cuda().Device.count()
    except (ImportError, RuntimeError) as error:  # pycuda's own errors derive from RuntimeError
        return f"{title} finds no NVIDIA driver ({error}); run on a host with an NVIDIA GPU and its driver."
    return None if count else f"{title} finds no NVIDIA GPU; run on a host that has one."


class _TensorRTSession(Session):
    """Page-locked host buffers, device buffers for the largest batch, and one stream.

    The device's primary context is used, the one that torch uses too, and is current only inside the methods.
    """

    def __init__(
        self, bindings: ModuleType, logger: Any, path: Path, spec: BuildSpec, passport: dict[str, Any]
    ) -> None:
        self._spec, self._cuda = spec, _cuda()
        self._context = self._cuda.Device(0).retain_primary_context()
        self._context.push()
        try:
            self._runtime = bindings.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                built = f"{passport['runtime']} {passport['runtime_version']} for {'; '.join(passport['targets'])}"
                raise HandoffError(f"{path.name} was built with {built}; it cannot be loaded here: build it again.")
            self._execution = self._engine.create_execution_context()
            self._stream = self._cuda.Stream()
            self._allocate(max(spec.max_batch, spec.batch_size))
        finally:
            self._cuda.Context.pop()
        self._kernels = tuple(Kernel(**layer) for layer in passport["layers"])
        self.precision = precision_of(self._kernels, "fp32")

    def _allocate(self, largest_batch: int) -> None:
        classes = int(self._engine.get_tensor_shape(_OUTPUT)[-1])
        image = (3, self._spec.input_size, self._spec.input_size)
        self._images = self._cuda.pagelocked_empty((largest_batch, *image), np.float32)
        self._logits = self._cuda.pagelocked_empty((largest_batch, classes), np.float32)
        self._device_images = self._cuda.mem_alloc(self._images.nbytes)
        self._device_logits = self._cuda.mem_alloc(self._logits.nbytes)
        self._execution.set_tensor_address(_INPUT, int(self._device_images))
        self._execution.set_tensor_address(_OUTPUT, int(self._device_logits))

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self._spec, None)
        count = len(images)
        if count > len(self._images):
            raise HandoffError(f"{count} images were given; this engine takes at most {len(self._images)} at once.")
        self._context.push()
        try:
            self._images[:count] = images
            self._execution.set_input_shape(_INPUT, images.shape)
            self._cuda.memcpy_htod_async(self._device_images, self._images[:count], self._stream)
            if not self._execution.execute_async_v3(self._stream.handle):
                raise HandoffError(f"TensorRT could not run a batch of {count} images; its log has the reason.")
            self._cuda.memcpy_dtoh_async(self._logits[:count], self._device_logits, self._stream)
            self._stream.synchronize()
        finally:
            self._cuda.Context.pop()
        return self._logits[:count].copy()

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        self._context.push()
        try:
            self._execution = self._engine = self._runtime = self._stream = None
            for buffer in (self._device_images, self._device_logits):
                buffer.free()
        finally:
            self._cuda.Context.pop()
            self._context.detach()
