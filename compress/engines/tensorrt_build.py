"""Building with TensorRT: ONNX with explicit Q/DQ into a strongly typed network, and that into an engine.

TensorRT 10, TensorRT 11 and TensorRT for RTX share every name used here; where they differ, a function says so.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.engines.base import BuildSpec, Kernel, failing_part
from compress.errors import EngineError, RequestError

INPUT, OUTPUT = "images", "logits"
_LAYER_LINE = re.compile(
    r"^Name: (?P<name>[^,]+), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\](?:, Outputs:|$)",
    re.MULTILINE,
)
_LAYERS = frozenset({"correlation", "gemm"})
"""Convolutions and fully connected layers, in the words of the engine's layer list."""
_TENSOR_OF_WEIGHTS = re.compile(r"Dimensions: \[[\d,]*(?:[2-9]|\d\d)")
"""A constant of more than one number."""
_FUSED_LAYER = re.compile(r"^__myl_\w*Fc")
_OTHER_LAYER = re.compile(r"Conv|Gemm|MatrixMultiply|FullyConnected")
"""The same in the words of the kernels that are not compiled by TensorRT's own code generator, such as CaskConvolution."""
_ENGINE_SUFFIX = re.compile(r"_myl\d+_\d+$")
_PRECISIONS = (
    ("int8", "int8"),
    ("bfloat16", "bf16"),
    ("bf16", "bf16"),
    ("half", "fp16"),
    ("fp16", "fp16"),
    ("float", "fp32"),
    ("fp32", "fp32"),
)
"""Words of a layer's data type (`Int8`, `Row major linear FP32`), looked for in this order, and what they mean."""


@functools.cache
def logger_of(module: str) -> Any:
    """TensorRT keeps the first logger of a process for good, so there is one per edition; it collects the build log."""
    base: Any = importlib.import_module(module).ILogger

    class Collector(base):  # type: ignore[misc]  # the class comes from the edition that is installed
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)
            if "rror" in message:
                sys.stderr.write(f"{message}\n")  # the last one is kept, see `engines.process`

    return Collector()


def profile_shapes(spec: BuildSpec) -> dict[str, list[int]]:
    """Smallest, usual and largest input shape."""
    image = [3, spec.input_size, spec.input_size]
    largest = max(spec.max_batch, spec.batch_size)
    return {"min": [1, *image], "opt": [spec.batch_size, *image], "max": [largest, *image]}


def build_plan(bindings: ModuleType, logger: Any, onnx_path: Path, spec: BuildSpec) -> bytes:
    """The serialized engine. Raises `EngineError`, caused by TensorRT's own words, when it refuses the file."""
    builder = bindings.Builder(logger)
    network = builder.create_network(_network_flags(bindings))
    parser = bindings.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(dict.fromkeys(f"{error.node_name()} : {error.desc()}" for error in errors))
        raise _refusal(bindings, f"read {failing_part(onnx_path, reasons)}", reasons)
    config = builder.create_builder_config()
    config.profiling_verbosity = bindings.ProfilingVerbosity.DETAILED
    config.clear_flag(bindings.BuilderFlag.TF32)  # fp32 is really fp32: TF32 keeps 10 of its 23 bits
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *profile_shapes(spec).values())
    config.add_optimization_profile(profile)
    _set_targets(bindings, config, spec.targets)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = next((message for message in reversed(logger.messages) if "rror" in message), "it gives no reason")
        targets = f" for {', '.join(spec.targets)}" if spec.targets else ""
        raise _refusal(bindings, f"build an engine{targets} from {failing_part(onnx_path, last)}", last)
    return bytes(plan)


def _refusal(bindings: ModuleType, what: str, reason: str) -> EngineError:
    name = bindings.__name__.replace("_", "-")
    error = EngineError(name, f"{name} cannot {what}.")
    error.__cause__ = RuntimeError(reason)
    return error


def _network_flags(bindings: ModuleType) -> int:
    """TensorRT 10 types weakly unless told otherwise; TensorRT 11 and for RTX always type strongly, and drop the flag."""
    if not bindings.__version__.startswith("10."):
        return 0
    return 1 << int(bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def offered_targets(bindings: ModuleType) -> tuple[str, ...]:
    """The GPU architectures that this version compiles for ahead of time; only TensorRT for RTX has them."""
    names = (name for name in bindings.ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(sorted(names, key=lambda name: int(name.removeprefix("SM"))))


def check_targets(bindings: ModuleType, targets: tuple[str, ...]) -> None:
    """Raises `RequestError` for an architecture that this version does not compile for, or one given twice."""
    offered = offered_targets(bindings)
    for position, target in enumerate(targets):
        if target not in offered or target in targets[:position]:
            allowed = (
                f"each at most once of {', '.join(offered)}, which {bindings.__name__} {bindings.__version__} offers"
            )
            raise RequestError("engine_targets", target, allowed)


def _set_targets(bindings: ModuleType, config: Any, targets: tuple[str, ...]) -> None:
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(bindings.ComputeCapability, target), index)


def layers_of_build_log(log: str) -> tuple[Kernel, ...]:
    """The convolutions and fully connected layers that the verbose log lists for the finished engine."""
    kernels = []
    for line in _LAYER_LINE.finditer(log):
        if line["type"] == "gemm" and not _TENSOR_OF_WEIGHTS.search(line["constants"]):
            continue  # attention, which multiplies two activations
        types = re.findall(r"Datatype: (\w+)", line["inputs"])
        if kernel := _kernel(line["name"], line["type"], types):
            kernels.append(kernel)
    return tuple(kernels)


def layers_of_inspector(text: str) -> tuple[Kernel, ...]:
    """The same from what TensorRT's engine inspector says of a loaded engine (JSON, detailed profiling verbosity)."""
    kernels = []
    for layer in json.loads(text)["Layers"]:
        inputs = layer.get("Inputs", [])
        types = [operand.get("Datatype") or operand.get("Format/Datatype", "") for operand in inputs]
        if kernel := _kernel(layer["Name"], layer["LayerType"], types):
            kernels.append(kernel)
    return tuple(kernels)


def _kernel(name: str, kind: str, input_types: list[str]) -> Kernel | None:
    """None for what is no convolution or fully connected layer."""
    if kind not in _LAYERS and not _FUSED_LAYER.match(name) and not _OTHER_LAYER.search(kind):
        return None
    return Kernel(_ENGINE_SUFFIX.sub("", name), kind, _precision(input_types[0]) if input_types else "unknown")


def _precision(data_type: str) -> str:
    words = data_type.lower()
    return next((precision for word, precision in _PRECISIONS if word in words), words)
