"""A GPU that is not there: stands for pycuda and TensorRT, holds their contract, and really answers.

Work that is put on a stream is carried out when the stream is waited for, as on a device: who reads an answer before
that reads nothing. Memory is a dictionary of buffers, so that nothing can be forgotten or overrun unseen. An engine
answers through ONNX Runtime. Objects of the bindings have the names that the published release has, and no others.
"""

from __future__ import annotations

import functools
import importlib.machinery
import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

NAMES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "tensorrt_names.json").read_text())
"""Edition and release -> version, and class -> names; scripts/tensorrt_names.py writes it."""
RELEASES = tuple(NAMES)


class Gpu:
    """The device: what is allocated and current on it, and what was called, in order."""

    def __init__(self, name: str = "Example GPU", capability: tuple[int, int] = (8, 9), count: int = 1) -> None:
        self.name, self.capability, self.count = name, capability, count
        self.memory: dict[int, bytearray] = {}
        self.pinned: list[np.ndarray] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.current = self.retained = 0
        self.calls: list[str] = []
        self.problems: list[str] = []
        self.failing: set[str] = set()
        self.addresses = itertools.count(4096, 4096)

    def call(self, name: str, needs_context: bool = True) -> None:
        if needs_context and not self.current:
            self.problems.append(f"{name} without a current context")
        self.calls.append(name)

    def holds_nothing(self) -> bool:
        return not self.memory and not self.current and self.retained <= 1 and not self.problems

    def buffer(self, address: int, nbytes: int) -> memoryview:
        """The first bytes of an allocation; overrunning it is an error here, on a device it is not."""
        if len(self.memory[address]) < nbytes:
            raise AssertionError(f"{nbytes} bytes at an allocation of {len(self.memory[address])}")
        return memoryview(self.memory[address])[:nbytes]


def pycuda_driver(gpu: Gpu) -> types.ModuleType:  # noqa: C901 - classes, not branches
    """The part of pycuda.driver 2026.1 that may be used, as its source has it."""

    class Error(Exception):
        pass

    class Context:
        def push(self) -> None:
            gpu.call("push", needs_context=False)
            gpu.current += 1

        @staticmethod
        def pop() -> None:
            gpu.call("pop")
            gpu.current -= 1

    class Device:
        def __init__(self, number: int) -> None:
            assert 0 <= number < gpu.count

        @staticmethod
        def count() -> int:
            return gpu.count

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, int]:
            return gpu.capability

        def retain_primary_context(self) -> Context:
            gpu.retained += 1
            return Context()

    class Stream:
        def __init__(self) -> None:
            gpu.call("Stream")
            self.handle = next(gpu.addresses)
            gpu.streams[self.handle] = []

        def synchronize(self) -> None:
            gpu.call("synchronize")
            waiting, gpu.streams[self.handle] = gpu.streams[self.handle], []
            for work in waiting:
                work()

    class DeviceAllocation:
        def __init__(self, nbytes: int) -> None:
            self.address = next(gpu.addresses)
            gpu.memory[self.address] = bytearray(nbytes)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            gpu.call("free")
            del gpu.memory[self.address]

    def mem_alloc(nbytes: int) -> DeviceAllocation:
        gpu.call("mem_alloc")
        if f"mem_alloc {gpu.calls.count('mem_alloc')}" in gpu.failing:
            raise Error("cuMemAlloc failed: out of memory")
        return DeviceAllocation(nbytes)

    def pagelocked_empty(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        gpu.call("pagelocked_empty")
        gpu.pinned.append(np.full(shape, np.nan, dtype))
        return gpu.pinned[-1]

    def check_host(array: np.ndarray) -> None:
        if not any(array is whole or array.base is whole for whole in gpu.pinned) or not array.flags.c_contiguous:
            gpu.problems.append("an asynchronous copy needs contiguous page-locked memory")

    def memcpy_htod_async(dest: DeviceAllocation, src: np.ndarray, stream: Stream) -> None:
        gpu.call("memcpy_htod_async")
        check_host(src)
        gpu.buffer(int(dest), src.nbytes)

        def copy() -> None:
            gpu.buffer(int(dest), src.nbytes)[:] = src.tobytes()

        gpu.streams[stream.handle].append(copy)

    def memcpy_dtoh_async(dest: np.ndarray, src: DeviceAllocation, stream: Stream) -> None:
        gpu.call("memcpy_dtoh_async")
        check_host(dest)
        gpu.buffer(int(src), dest.nbytes)

        def copy() -> None:
            dest[:] = np.frombuffer(gpu.buffer(int(src), dest.nbytes), dest.dtype).reshape(dest.shape)

        gpu.streams[stream.handle].append(copy)

    def init() -> None:
        if "init" in gpu.failing:
            raise Error("cuInit failed: no CUDA-capable device is detected")

    driver = _module("pycuda.driver")
    for part in (
        Error,
        Context,
        Device,
        Stream,
        mem_alloc,
        pagelocked_empty,
        memcpy_htod_async,
        memcpy_dtoh_async,
        init,
    ):
        setattr(driver, part.__name__, part)
    return driver


def tensorrt_bindings(gpu: Gpu, release: str) -> types.ModuleType:  # noqa: C901 - classes, not branches
    """The classes of `tensorrt` or `tensorrt_rtx` in one release; a plan is the name of its ONNX file and its profile."""
    names, version = NAMES[release]["names"], NAMES[release]["version"]

    class Bound:
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_") and name not in names[type(self).__name__]:
                raise AttributeError(f"{release} has no {type(self).__name__}.{name}")
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_") and name not in names[type(self).__name__]:
                raise AttributeError(f"{release} has no {type(self).__name__}.{name}")
            super().__setattr__(name, value)

    class ILogger:
        pass

    class Logger(ILogger):
        ERROR = 1

        def __init__(self, severity: int) -> None:
            self.severity = severity

        def log(self, severity: int, message: str) -> None:
            pass

    class ParserError(Bound):
        def node_name(self) -> str:
            return "conv1"

        def desc(self) -> str:
            return "the example's reason"

    class INetworkDefinition(Bound):
        _path = ""

    class OnnxParser(Bound):
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network = network

        num_errors = 1

        def parse_from_file(self, path: str) -> bool:
            self._network._path = path
            return "parse_from_file" not in gpu.failing

        def get_error(self, index: int) -> ParserError:
            return ParserError()

    class IOptimizationProfile(Bound):
        def set_shape(self, name: str, *shapes: list[int]) -> None:
            assert name == "images" and len(shapes) == 3
            self._shapes = shapes

    class IBuilderConfig(Bound):
        def __init__(self) -> None:
            self._targets: dict[int, str] = {}
            self._cleared: list[str] = []

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._profile = profile._shapes
            return 0

        def clear_flag(self, flag: str) -> None:
            self._cleared.append(flag)

        def set_compute_capability(self, target: str, index: int) -> bool:
            assert index < self.num_compute_capabilities
            self._targets[index] = target
            return True

    class Builder(Bound):
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            gpu.calls.append(f"create_network({flags})")
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            if "build_serialized_network" in gpu.failing:
                self._logger.log(1, "Error Code 1: the example's build failed")
                return None
            assert config._cleared == ["TF32"]
            for name, precision in layers(network._path):
                inputs = f"[ {{ Name: x, Dimensions: [1], Datatype: {precision} }}]"
                self._logger.log(4, f"Name: {name}, LayerType: correlation, Inputs: {inputs}, Constants: []")
            plan = {"onnx": network._path, "profile": config._profile, "version": version, "targets": config._targets}
            return json.dumps(plan).encode()

    class IExecutionContext(Bound):
        def __init__(self, plan: dict[str, Any]) -> None:
            gpu.call("create_execution_context")
            self._session = onnxruntime.InferenceSession(plan["onnx"], providers=["CPUExecutionProvider"])
            self._profile, self._addresses, self._shape = plan["profile"], {}, None

        def __del__(self) -> None:
            gpu.call("del execution")

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return name in ("images", "logits") and "set_tensor_address" not in gpu.failing

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            gpu.call("set_input_shape")
            low, _, high = self._profile
            self._shape = tuple(shape)
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def execute_async_v3(self, stream: int) -> bool:
            gpu.call("execute_async_v3")
            if "execute_async_v3" in gpu.failing or len(self._addresses) != 2 or self._shape is None:
                return False
            shape, addresses, session = self._shape, dict(self._addresses), self._session

            def compute() -> None:
                images = np.frombuffer(gpu.buffer(addresses["images"], 4 * int(np.prod(shape))), np.float32)
                logits = session.run(None, {"images": images.reshape(shape)})[0]
                gpu.buffer(addresses["logits"], logits.nbytes)[:] = logits.tobytes()

            gpu.streams[stream].append(compute)
            return True

    class EngineInspector(Bound):
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan

        def get_engine_information(self, form: str) -> str:
            assert form == "JSON"
            words = {
                "Int8": "Thirty-two wide channel vectorized row major Int8 format",
                "Float": "Row major linear FP32",
            }
            rows = [
                {
                    "Name": name,
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Dimensions": [1], "Format/Datatype": words[precision]}],
                    "ParameterType": "Convolution",
                }
                for name, precision in layers(self._plan["onnx"])
            ]
            reformat = {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": words["Float"]}]}
            return json.dumps({"Layers": [reformat, *rows], "Bindings": ["images", "logits"]})

    class ICudaEngine(Bound):
        def __init__(self, plan: dict[str, Any]) -> None:
            self._plan = plan

        def __del__(self) -> None:
            gpu.call("del engine")

        def create_execution_context(self) -> IExecutionContext | None:
            return None if "create_execution_context" in gpu.failing else IExecutionContext(self._plan)

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector(self._plan)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            outputs = onnx.load(self._plan["onnx"]).graph.output
            return -1, outputs[0].type.tensor_type.shape.dim[-1].dim_value

    class Runtime(Bound):
        def __init__(self, logger: ILogger) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
            gpu.call("deserialize_cuda_engine")
            facts = json.loads(plan)
            return ICudaEngine(facts) if facts["version"] == version else None

    bindings = _module(release.split()[0])
    bindings.__version__ = version
    for part in (
        Builder, EngineInspector, IBuilderConfig, ICudaEngine, IExecutionContext, ILogger, INetworkDefinition,
        IOptimizationProfile, Logger, OnnxParser, ParserError, Runtime,
    ):  # fmt: skip
        setattr(bindings, part.__name__, part)
    for enum in ("BuilderFlag", "ComputeCapability", "LayerInformationFormat", "ProfilingVerbosity"):
        if enum in names:
            members = {name: name for name in names[enum] if name not in ("name", "value")}
            setattr(bindings, enum, types.SimpleNamespace(**members, __members__=members))
    if "STRONGLY_TYPED" in names["NetworkDefinitionCreationFlag"]:
        bindings.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    return bindings


def layers(onnx_path: str) -> list[tuple[str, str]]:
    """(name, Int8 or Float) of each convolution and fully connected layer of a file."""
    graph = onnx.load(onnx_path).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    return [
        (node.name, "Int8" if makers.get(node.input[0]) == "DequantizeLinear" else "Float")
        for node in graph.node
        if node.op_type in ("Conv", "Gemm")
    ]


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def install(monkeypatch: Any, gpu: Gpu, release: str) -> types.ModuleType:
    """Puts the double in place of the packages, with a logger and a context of its own, until the test ends."""
    from compress.engines import tensorrt, tensorrt_build, tensorrt_run

    package, driver, bindings = _module("pycuda"), pycuda_driver(gpu), tensorrt_bindings(gpu, release)
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
