"""OpenVINO on the CPU. The only file that imports openvino."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from compress import machine
from compress.engines.base import (
    LARGEST_SAFE_WEIGHT,
    BuildSpec,
    Kernel,
    OnnxLoader,
    Session,
    check_images,
    failing_part,
    precision_of,
)
from compress.engines.processes import remote
from compress.errors import EngineError
from compress.methods.runtimes import Precision

_LAYERS = frozenset({"Convolution", "FullyConnected"})
_PRECISION = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_KEEP_CODES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})


class OpenVino(OnnxLoader, name="openvino"):
    """Compiles the ONNX file while it loads it; static shapes unless asked otherwise.

    It gets the `onnxruntime` flavour: measured on AVX2, that one fuses the residual additions into the convolutions
    and stays closer to the trained model.
    """

    module, how_loaded = "openvino", "and compiles it for the CPU it finds"

    @property
    def half_precision(self) -> Precision | None:
        return remote.half_precision(self)

    def half_precision_here(self) -> Precision | None:
        """In this process, for the runtime's own."""
        offered = _import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "bf16" if "BF16" in offered else "fp16" if "FP16" in offered else None

    def open(self, path: Path, spec: BuildSpec) -> Session:
        return _ThroughputSession(path, spec) if spec.hint == "throughput" else _OpenVinoSession(path, spec)


class _OpenVinoSession(Session):
    def __init__(self, path: Path, spec: BuildSpec) -> None:
        self._spec = spec
        self._batch = self._compiled_batch()
        try:
            self._compiled, narrowed = _compile(path, spec, self._batch)
            self._request = self._make_request()
        except (RuntimeError, DecodeError) as error:
            raise EngineError(OpenVino.name, f"OpenVINO cannot compile {failing_part(path, str(error))}.") from error
        self._kernels = _read_kernels(self._compiled)
        rest = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = precision_of(self._kernels, _PRECISION.get(rest, rest))
        self.notes = (_narrowed_note(narrowed),) if narrowed else ()

    def _compiled_batch(self) -> int | None:
        """Images per request; None compiles for any number."""
        return self._spec.batch_size if self._spec.static else None

    def _make_request(self) -> Any:
        return self._compiled.create_infer_request()

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self._spec, self._batch)
        logits: np.ndarray = self._request.infer({0: images}, share_inputs=True, share_outputs=True)[0]
        return logits.copy()

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        self._request = self._compiled = None


class _ThroughputSession(_OpenVinoSession):
    """Every image is a request of its own, and as many run side by side as OpenVINO finds best for the threads.

    Answers are waited for in turn. OpenVINO's own queue calls back into Python from its threads, and once closed a model
    while such a call was still returning: each of the two waited for the other for ever.
    """

    def __init__(self, path: Path, spec: BuildSpec) -> None:
        super().__init__(path, spec)
        self.notes += (f"Compiled for throughput: {len(self._request)} request(s) of one image run side by side.",)

    def _compiled_batch(self) -> int | None:
        return 1

    def _make_request(self) -> Any:
        count = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return [self._compiled.create_infer_request() for _ in range(count)]

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self._spec, None)
        answers: list[np.ndarray] = []
        working: deque[Any] = deque()
        for index in range(len(images)):
            if len(working) == len(self._request):
                answers.append(_answer(working.popleft()))
            request = self._request[index % len(self._request)]
            request.start_async({0: images[index : index + 1]}, share_inputs=True)
            working.append(request)
        return np.concatenate([*answers, *map(_answer, working)])


def _answer(request: Any) -> np.ndarray:
    request.wait()
    logits: np.ndarray = request.get_output_tensor(0).data
    return logits.copy()


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which otherwise writes an identifier into the home folder on import."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # makes its import fail; OpenVINO has a stub
    import openvino

    return openvino


def _compile(path: Path, spec: BuildSpec, batch: int | None) -> tuple[Any, list[str]]:
    """The model for `batch` images a call (None: any number), and the layers that got narrow weights."""
    openvino = _import_openvino()
    core = openvino.Core()
    narrowed: list[str] = []
    own_format = path.suffix != ".onnx"  # written by OpenVINO's tools, which reckon with the CPU themselves
    if own_format or machine.has_int8_dot_product():
        model = core.read_model(str(path))
    else:
        content, narrowed = without_overflow(path)
        model = core.read_model(content) if narrowed else core.read_model(str(path))
    if batch is not None:
        model.reshape([batch, 3, spec.input_size, spec.input_size])
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": spec.threads, "PERFORMANCE_HINT": spec.hint.upper()}
    if spec.precision in _HINT:
        settings["INFERENCE_PRECISION_HINT"] = _HINT[spec.precision]
    return core.compile_model(model, "CPU", settings), narrowed


def _read_kernels(compiled: Any) -> tuple[Kernel, ...]:
    kernels = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in _LAYERS:
            precision = facts["runtimePrecision"].astype(str)
            name = node.get_friendly_name().removesuffix("/WithoutBiases")
            kernels.append(Kernel(name, kind, _PRECISION.get(precision, precision)))
    return tuple(kernels)


def without_overflow(path: Path) -> tuple[bytes, list[str]]:
    """The ONNX file with 7-bit weights in every layer that reads signed activations, and those layers' names.

    For CPUs without an int8 dot product. Signed activations occupy all 256 codes there, and two products with full
    8-bit weights overflow 16 bits; activations behind a ReLU stay at 127 and below, but for the rare value beyond the
    calibrated range. Weights that are small enough (7 bits or fewer) are left as they are.
    """
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    makers = {output: node for node in model.graph.node for output in node.output}
    narrowed: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        data, weight = (_dequantize_before(name, makers) for name in node.input[:2])
        if data is None or weight is None or weight.input[0] not in constants:
            continue
        signed = numpy_helper.to_array(constants[data.input[2]]).any()
        codes = numpy_helper.to_array(constants[weight.input[0]])
        if signed and np.abs(codes.astype(np.int16)).max() > LARGEST_SAFE_WEIGHT:
            _halve(constants, weight)
            narrowed[weight.input[0]] = node.name
    return (model.SerializeToString(), list(narrowed.values())) if narrowed else (b"", [])


def _dequantize_before(name: str, makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = makers.get(name)
    while node is not None and node.op_type in _KEEP_CODES:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" and len(node.input) > 2 else None


def _halve(constants: dict[str, onnx.TensorProto], weight: onnx.NodeProto) -> None:
    codes, scales = (constants[name] for name in weight.input[:2])
    halved = np.rint(numpy_helper.to_array(codes) / 2).astype(np.int8)
    codes.CopyFrom(numpy_helper.from_array(halved, codes.name))
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(2), scales.name))


def _narrowed_note(layers: list[str]) -> str:
    return (
        f"This CPU has no int8 dot product: OpenVINO got 7-bit weights for the {len(layers)} layer(s) that read signed "
        "values, because its 8-bit kernels overflow here; --weight-bits 7 trains the model on such weights."
    )
