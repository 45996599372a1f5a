"""Running TensorRT engines: CUDA buffers and streams through pycuda. Everything here needs an NVIDIA GPU and its driver."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from compress.engines.base import BuildSpec, Kernel, Session, check_images, installed, precision_of
from compress.engines.tensorrt_build import INPUT, OUTPUT
from compress.errors import HandoffError

GPU_PACKAGES = "install the packages of requirements-gpu.txt on a host with an NVIDIA GPU, or use the Docker image"


def missing_gpu(title: str) -> str | None:
    """One sentence why nothing can run on a GPU here, or None."""
    if not installed("pycuda"):
        return f"{title} runs on an NVIDIA GPU through pycuda, which is not installed: {GPU_PACKAGES}."
    try:
        driver = importlib.import_module("pycuda.driver")
    except ImportError as error:
        return _no_driver(title, error)
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        return _no_driver(title, error)
    return None if count else f"{title} finds no NVIDIA GPU; run on a host that has one."


def _no_driver(title: str, error: Exception) -> str:
    return f"{title} finds no NVIDIA driver ({error}); run on a host with an NVIDIA GPU and its driver."


@dataclass(frozen=True)
class Gpu:
    """The first GPU, with the primary context that torch uses too."""

    driver: Any
    name: str
    architecture: str
    """Its compute capability as TensorRT for RTX spells it: SM89 is 8.9."""
    context: Any

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context current in this thread for the block, and leaves the thread as it was."""
        self.context.push()
        try:
            yield
        finally:
            self.driver.Context.pop()


@functools.cache
def gpu() -> Gpu:
    """Retained once for the whole process: releasing a primary context does not take it off the thread's stack."""
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    device = driver.Device(0)
    major, minor = device.compute_capability()
    return Gpu(driver, device.name(), f"SM{major}{minor}", device.retain_primary_context())


def inspect_engine(bindings: ModuleType, logger: Any, plan: bytes) -> str:
    """What TensorRT says of each layer of an engine, as JSON."""
    with gpu().current():
        runtime = bindings.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise HandoffError(
                f"{bindings.__name__} cannot load the engine that it just built; the log has its reason."
            )
        inspector = engine.create_engine_inspector()
        text: str = inspector.get_engine_information(bindings.LayerInformationFormat.JSON)
        del inspector, engine, runtime  # in this order, while the context is current
    return text


class TensorRTSession(Session):
    """Page-locked host buffers, device buffers for the largest batch, and one stream.

    The context is current only inside the methods. Whatever fails, every allocation is given back.
    """

    def __init__(
        self, bindings: ModuleType, logger: Any, plan: bytes, spec: BuildSpec, passport: dict[str, Any]
    ) -> None:
        self._spec, self._gpu = spec, gpu()
        with self._gpu.current(), ExitStack() as undo:
            undo.callback(self._forget)
            self._runtime = bindings.Runtime(logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                built = f"{passport['runtime']} {passport['runtime_version']} for {', '.join(passport['targets'])}"
                raise HandoffError(
                    f"{passport['engine']} was built with {built}; it cannot be loaded here: `{passport['rebuild']}`."
                )
            self._execution = self._engine.create_execution_context()
            if self._execution is None:
                raise HandoffError(f"The GPU has not enough free memory to run {passport['engine']}.")
            self._stream = self._gpu.driver.Stream()
            self._allocate(int(passport["inputs"][INPUT]["profile"]["max"][0]), undo)
            self._undo = undo.pop_all()
        self._kernels = tuple(Kernel(**layer) for layer in passport["layers"])
        self.precision = precision_of(self._kernels, "fp32")

    def _allocate(self, largest_batch: int, undo: ExitStack) -> None:
        """Buffers for the largest batch of the engine's profile, and their addresses told to TensorRT."""
        driver, size = self._gpu.driver, self._spec.input_size
        classes = int(self._engine.get_tensor_shape(OUTPUT)[-1])
        self._images = driver.pagelocked_empty((largest_batch, 3, size, size), np.float32)
        self._logits = driver.pagelocked_empty((largest_batch, classes), np.float32)
        self._device_images = driver.mem_alloc(self._images.nbytes)
        undo.callback(self._device_images.free)
        self._device_logits = driver.mem_alloc(self._logits.nbytes)
        undo.callback(self._device_logits.free)
        for name, buffer in ((INPUT, self._device_images), (OUTPUT, self._device_logits)):
            if not self._execution.set_tensor_address(name, int(buffer)):
                raise HandoffError(f"The engine has no tensor {name!r}; build it again from an ONNX file of a run.")

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self._spec, None)
        count = len(images)
        if count > len(self._images):
            raise HandoffError(f"{count} images were given; this engine takes at most {len(self._images)} at once.")
        driver = self._gpu.driver
        with self._gpu.current():
            self._images[:count] = images
            if not self._execution.set_input_shape(INPUT, images.shape):
                raise HandoffError(f"TensorRT does not take a batch of {count} images of this size; build it again.")
            driver.memcpy_htod_async(self._device_images, self._images[:count], self._stream)
            done = self._execution.execute_async_v3(self._stream.handle)
            if done:
                driver.memcpy_dtoh_async(self._logits[:count], self._device_logits, self._stream)
            self._stream.synchronize()  # also after a failure: the copy still reads the host buffer
            if not done:
                raise HandoffError(f"TensorRT could not run a batch of {count} images; the log has its reason.")
        logits: np.ndarray = self._logits[:count]
        return logits.copy()

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        with self._gpu.current():
            self._undo.close()

    def _forget(self) -> None:
        """TensorRT frees an object with its last reference: what was made from another one goes first."""
        self._execution = self._engine = self._runtime = self._stream = None
        self._images = self._logits = None
