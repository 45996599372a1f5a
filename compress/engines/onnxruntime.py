"""ONNX Runtime on the CPU. The only file that imports onnxruntime."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress import machine
from compress.engines.base import BuildSpec, Built, Kernel, Runtime, Session, check_images, precision_of
from compress.errors import HandoffError, RuntimeUnavailableError

_INTEGER_KERNELS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
_FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_PRECISION = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_FUSION_SUFFIX = re.compile(r"_token_\d+$")
_NORM_SUFFIX = "_bn_nchwc"
"""Of a BatchNorm that stands alone: the library runs it as a convolution, but the file has no such layer."""
_ONLY_ERRORS = 3
_DISABLED = ["WeightBiasQuantization"]
"""It rounds biases that a file holds as floats, and quantizes weights of layers that stay float, on grids of its own."""
EXACT_NOTE = (
    "This CPU has no int8 dot product: ONNX Runtime was told to use its exact 8-bit kernels "
    "(session.x64quantprecision), because its fast ones overflow here."
)


class OnnxRuntime(Runtime):
    """Loads ONNX files as they are; nothing is built ahead of time."""

    name, title, flavour = "onnxruntime", "ONNX Runtime", "onnxruntime"

    def missing(self) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "ONNX Runtime is not installed; install it with `pip install onnxruntime`."
        return None

    @property
    def runs_here(self) -> bool:
        return self.missing() is None

    def build(self, onnx_path: Path, engine_path: Path, spec: BuildSpec) -> Built:
        with self.load(onnx_path, spec):
            return Built(path=None, ran=True, text=f"{self.title} loads {onnx_path.name} as it is.")

    def load(self, path: Path, spec: BuildSpec) -> Session:
        if reason := self.missing():
            raise RuntimeUnavailableError(reason)
        return _OnnxRuntimeSession(path, spec)


class _OnnxRuntimeSession(Session):
    def __init__(self, path: Path, spec: BuildSpec) -> None:
        self._path, self._spec = path, spec
        self._session: Any = _open(path, _options(spec))
        graph = _optimized(path, spec)
        self._kernels = _read_kernels(graph)
        self.conversions = sum(node.op_type in _CONVERSIONS for node in graph.node)
        self.precision = precision_of(self._kernels, "fp32")
        exact = self.precision == "int8" and not machine.has_int8_dot_product()
        self.notes = (EXACT_NOTE,) if exact else ()

    def run(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"images": check_images(images, self._spec, None)})[0]

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        self._session = None


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
    found = {key: tensors[name] for key, name in nodes.items() if name in tensors}
    found |= {output.name: output.name for output in model.graph.output}
    given = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(found.values()) - given))
    options = _options(BuildSpec(input_size=0, threads=threads))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = _open(path, options, model.SerializeToString())
    return lambda images: dict(zip(found, session.run(list(found.values()), {"images": images}), strict=True))


def _options(spec: BuildSpec) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec.threads, 1
    options.log_severity_level = _ONLY_ERRORS
    if not machine.has_int8_dot_product():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _open(path: Path, options: Any, content: bytes | None = None) -> Any:
    """A session of the file, or of `content` made from it."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(
            content or str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
        )
    except Exception as error:  # noqa: BLE001 - every status of the library is an exception class of its own
        raise HandoffError(f"ONNX Runtime cannot load {path.name}: {error}") from error


def _optimized(path: Path, spec: BuildSpec) -> onnx.GraphProto:
    """The graph as it is executed: load once more, with the optimized graph written to a file."""
    options = _options(spec)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        _open(path, options)
        return onnx.load(written, load_external_data=False).graph


def _read_kernels(graph: onnx.GraphProto) -> tuple[Kernel, ...]:
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        name = _FUSION_SUFFIX.sub("", node.name)
        if name.endswith(_NORM_SUFFIX):
            continue
        if node.op_type in _INTEGER_KERNELS:
            found.append(Kernel(name, node.op_type, "int8"))
        elif node.op_type in _FLOAT_KERNELS and (data_type := _weight_type(node, constants, makers)):
            found.append(Kernel(name, node.op_type, _PRECISION.get(data_type, "fp32")))
    return tuple(found)


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
