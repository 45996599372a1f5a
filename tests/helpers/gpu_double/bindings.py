"""TensorRT's bindings of `gpu_double`, with the names of a published release."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from gpu_double.device import Gpu, new_module

NAMES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "tensorrt_names.json").read_text())
"""Edition and release -> version, and class -> names; scripts/tensorrt_names.py writes it."""
RELEASES = tuple(NAMES)


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

    bindings = new_module(release.split()[0])
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
