"""ONNX Runtime on the CPU and, through its execution providers, on a GPU. The only file that imports onnxruntime."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress import machine
from compress.engines.base import (
    BuildSpec,
    Kernel,
    OnnxLoader,
    Session,
    check_images,
    failing_part,
    precision_of,
)
from compress.errors import EngineError, HandoffError

log = logging.getLogger("compress")

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_INTEGER_KERNELS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
_FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_PRECISION: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_FUSION_SUFFIX = re.compile(r"_token_\d+$")
_ONLY_ERRORS = 3
_RENAMING = "NchwcTransformer"
"""Changes the memory layout of float layers, and no precision; but it takes their names, and makes a convolution of a
BatchNorm that stands alone. Left out where the graph is only read."""
_DISABLED = ["WeightBiasQuantization"]
"""It rounds biases that a file holds as floats, and quantizes weights of layers that stay float, on grids of its own."""
UNREADABLE_NOTE = (
    "ONNX Runtime does not say in which precision its TensorRT provider executes a layer; build with tensorrt for that."
)


class OnnxRuntime(OnnxLoader, name="onnxruntime"):
    """Loads ONNX files as they are; nothing is built ahead of time."""

    module, how_loaded = "onnxruntime", "as it is"
    provider = _CPU

    def open(self, path: Path, spec: BuildSpec) -> Session:
        return _OnnxRuntimeSession(path, spec) if self.provider == _CPU else _GpuSession(path, spec, self.provider)

    def recorder(
        self, path: Path, nodes: Mapping[str, str], threads: int
    ) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        return recorder(path, nodes, threads)


class _OnnxRuntimeOnGpu(OnnxRuntime):
    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            log.info("import of onnxruntime: %s", error)
            return f"{self.title} is installed but cannot be imported: install onnxruntime-gpu again."
        available = onnxruntime.get_available_providers()
        if self.provider in available:
            return None
        return (
            f"The installed ONNX Runtime offers only {', '.join(available)}; on a host with an NVIDIA GPU install "
            "onnxruntime-gpu in its place."
        )


class OnnxRuntimeCuda(_OnnxRuntimeOnGpu, name="onnxruntime-cuda"):
    """Quantized files run there in floating point between their Q/DQ pairs; the kernels read back say so."""

    provider = _CUDA


class OnnxRuntimeTensorRT(_OnnxRuntimeOnGpu, name="onnxruntime-tensorrt"):
    """TensorRT inside ONNX Runtime: the engine is built while the file is loaded, and not kept."""

    provider = _TENSORRT


class _OnnxRuntimeSession(Session):
    def __init__(self, path: Path, spec: BuildSpec) -> None:
        self._spec = spec
        self._session: Any = _load(path, _options(spec))
        graph = _optimized(path, _options(spec))
        self._kernels, widened = _read_kernels(graph), _widened(graph)
        self.conversions = sum(node.op_type in _CONVERSIONS for node in graph.node)
        self.precision = precision_of(self._kernels, "fp32")
        self.notes = (_widened_note(widened),) if widened else ()

    def run(self, images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._session.run(None, {"images": check_images(images, self._spec, None)})[0]
        return logits

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        self._session = None


class _GpuSession(_OnnxRuntimeSession):
    """ONNX Runtime falls back to the CPU in silence, whole or node by node: here it is refused or told."""

    def __init__(self, path: Path, spec: BuildSpec, provider: str) -> None:
        self._spec = spec
        providers = gpu_providers(provider, spec, _read(path))
        self._session = _load(path, _options(spec), providers)
        if (used := self._session.get_providers())[0] != provider:
            raise HandoffError(
                f"ONNX Runtime was asked for its {provider} and fell back to {used[0]}: install the CUDA or TensorRT "
                "library that the log of the run names, or choose onnxruntime."
            )
        nodes = nodes_by_provider(path, _options(spec), providers, spec)
        if not nodes[provider]:
            raise HandoffError(f"The {provider} of ONNX Runtime executes no node of {path.name}; choose onnxruntime.")
        elsewhere = {name: count for name, count in nodes.items() if name != provider}
        notes = [f"{count} node(s) run on {name} instead of {provider}." for name, count in elsewhere.items()]
        if provider == _TENSORRT:
            self._kernels, self.precision = (), "not reported"
            notes.append(UNREADABLE_NOTE)
        else:
            self._kernels = _read_kernels(_optimized(path, _options(spec), providers))
            self.precision = precision_of(self._kernels, "fp32")
        self.notes = tuple(notes)


def gpu_providers(provider: str, spec: BuildSpec, model: onnx.ModelProto) -> list[tuple[str, dict[str, str]]]:
    """Providers in order of preference with their options: real fp32, and TensorRT for every batch up to the largest."""
    cuda = (_CUDA, {"use_tf32": "0"})
    if provider == _CUDA:
        return [cuda]
    image = f"3x{spec.input_size}x{spec.input_size}"
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    options = {
        "trt_profile_min_shapes": f"images:1x{image}",
        "trt_profile_opt_shapes": f"images:{spec.batch_size}x{image}",
        "trt_profile_max_shapes": f"images:{max(spec.max_batch, spec.batch_size)}x{image}",
        "trt_int8_enable": str(int(quantized)),
        "trt_fp16_enable": str(int(half)),
    }
    return [(_TENSORRT, options), cuda]


def nodes_by_provider(path: Path, options: Any, providers: list[Any], spec: BuildSpec) -> Counter[str]:
    """How many nodes each execution provider executes: one profiled run, because nothing else tells."""
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = _load(path, options, providers)
        session.run(None, {"images": np.zeros((spec.batch_size, 3, spec.input_size, spec.input_size), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    executed = {event["name"]: event["args"]["provider"] for event in events if event.get("args", {}).get("provider")}
    return Counter(executed.values())


def recorder(path: Path, nodes: Mapping[str, str], threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """What stands inside an ONNX file: images float32 [N, 3, H, W] -> values float32 of some nodes, and of its output.

    Every operator is executed as the file spells it, one by one: fused kernels have no values in between to look at.

    Args:
        nodes: key in the result -> name of the node whose first output is asked for; those that are not in the file
            are left out. The file's own output comes under its own name.

    Raises:
        HandoffError: ONNX Runtime cannot load the file.
    """
    import onnxruntime

    model = onnx.load(path, load_external_data=False)
    tensors = {node.name: node.output[0] for node in model.graph.node}
    outputs = {key: tensors[name] for key, name in nodes.items() if name in tensors}
    outputs |= {output.name: output.name for output in model.graph.output}
    declared = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(outputs.values()) - declared))
    options = _options(BuildSpec(input_size=0, threads=threads))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = _load(path, options, content=model.SerializeToString())
    return lambda images: dict(zip(outputs, session.run(list(outputs.values()), {"images": images}), strict=True))


def _options(spec: BuildSpec) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec.threads, 1
    options.log_severity_level = _ONLY_ERRORS
    if not machine.has_int8_dot_product():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _load(
    path: Path,
    options: Any,
    providers: Sequence[Any] = (_CPU,),
    content: bytes | None = None,
    disabled: Sequence[str] = _DISABLED,
) -> Any:
    """A session of the file, or of `content` made from it."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(
            content or str(path), options, providers=list(providers), disabled_optimizers=list(disabled)
        )
    except Exception as error:  # noqa: BLE001 - every status of the library is an exception class of its own
        raise EngineError(OnnxRuntime.name, f"ONNX Runtime cannot load {failing_part(path, str(error))}.") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - protobuf's decoding error differs from version to version
        raise HandoffError(f"{path.name} is not an ONNX file: export it again.") from error


def _optimized(path: Path, options: Any, providers: Sequence[Any] = (_CPU,)) -> onnx.GraphProto:
    """The graph as it is executed but for the memory layout: load once more, with the optimized graph written to a file."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        _load(path, options, providers, disabled=(*_DISABLED, _RENAMING))
        return onnx.load(written, load_external_data=False).graph


def _widened(graph: onnx.GraphProto) -> int:
    """How many layers got unsigned weights, whose products are added in 32 bits."""
    unsigned = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    layers = (node for node in graph.node if node.op_type in _INTEGER_KERNELS)
    return sum(not unsigned.isdisjoint(node.input[3:4]) for node in layers)


def _read_kernels(graph: onnx.GraphProto) -> tuple[Kernel, ...]:
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    kernels = []
    for node in graph.node:
        name = _FUSION_SUFFIX.sub("", node.name)
        if node.op_type in _INTEGER_KERNELS:
            kernels.append(Kernel(name, node.op_type, "int8"))
        elif node.op_type in _FLOAT_KERNELS and (data_type := _weight_type(node, constants, makers)):
            kernels.append(Kernel(name, node.op_type, _PRECISION.get(data_type, "fp32")))
    return tuple(kernels)


def _widened_note(layers: int) -> str:
    return (
        f"This CPU has no int8 dot product: ONNX Runtime runs {layers} layer(s) on its exact 8-bit kernels "
        "(session.x64quantprecision), because its fast ones overflow with weights beyond 64. With --weight-bits 7 all run "
        "on the fast ones, exactly."
    )


def _weight_type(node: onnx.NodeProto, constants: dict[str, int], makers: dict[str, onnx.NodeProto]) -> int | None:
    """Element type of the second operand; None when it is not a weight (attention multiplies two activations)."""
    name = node.input[1]
    if name in constants:
        return constants[name]
    maker = makers.get(name)
    if maker is None or not maker.input or maker.input[0] not in constants:
        return None
    target = next((attribute.i for attribute in maker.attribute if attribute.name == "to"), onnx.TensorProto.FLOAT)
    return int(target)
