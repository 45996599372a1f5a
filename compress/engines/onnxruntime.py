"""ONNX Runtime on the CPU. The only file that imports onnxruntime."""

from __future__ import annotations

import importlib.util
import re
import tempfile
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
_PRECISION = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_FUSION_SUFFIX = re.compile(r"_token_\d+$")
_NORM_SUFFIX = "_bn_nchwc"
"""Of a BatchNorm that stands alone: the library runs it as a convolution, but the file has no such layer."""
_ONLY_ERRORS = 3
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
        self._kernels = _read_kernels(path, spec)
        self.precision = precision_of(self._kernels, "fp32")
        exact = self.precision == "int8" and not machine.has_int8_dot_product()
        self.notes = (EXACT_NOTE,) if exact else ()

    def run(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"images": check_images(images, self._spec, None)})[0]

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        self._session = None


def _options(spec: BuildSpec) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec.threads, 1
    options.log_severity_level = _ONLY_ERRORS
    if not machine.has_int8_dot_product():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _open(path: Path, options: Any) -> Any:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - every status of the library is an exception class of its own
        raise HandoffError(f"ONNX Runtime cannot load {path.name}: {error}") from error


def _read_kernels(path: Path, spec: BuildSpec) -> tuple[Kernel, ...]:
    """Load once more with the optimized graph written to a file, and list its layers."""
    options = _options(spec)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        _open(path, options)
        graph = onnx.load(written, load_external_data=False).graph
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
