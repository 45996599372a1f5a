"""A runtime that crashes, hangs or answers nonsense costs the run that runtime, and a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from faulty_runtimes import Faulty
from onnx import TensorProto, helper, numpy_helper

from compress.engines import BuildSpec, process, remote
from compress.errors import EngineError

SIZE, CLASSES = 8, 3
SPEC = BuildSpec(SIZE, batch_size=2)
IMAGES = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
TESTS = Path(__file__).parent
KILLED = "was killed (signal 9) while it {}, as happens when the machine runs out of memory. End other programs on this machine, "
KILLED += "or choose another runtime."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One convolution and the mean of its channels."""
    weight = numpy_helper.from_array(
        np.random.default_rng(1).standard_normal((CLASSES, 3, 3, 3), dtype=np.float32), "w"
    )
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["maps"], "conv1"),
        helper.make_node("GlobalAveragePool", ["maps"], ["means"], "pool"),
        helper.make_node("Flatten", ["means"], ["logits"], "flat"),
    ]
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(_model(nodes, [weight], CLASSES), path)
    return path


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], classes: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SILENT_S", 6.0)
    monkeypatch.setattr(process, "LONGEST_S", 12.0)


def answered(model: Path) -> np.ndarray:
    with Faulty().load(model, SPEC) as session:
        return session.run(IMAGES)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("compile: abort", "ended by signal 6 (SIGABRT) while it compiled model.onnx. Choose another runtime."),
        ("compile: segfault", "ended by signal 11 (SIGSEGV) while it compiled model.onnx. Choose another runtime."),
        ("compile: kill", KILLED.format("compiled model.onnx")),
        ("compile: exit", "ended by exit code 0 while it compiled model.onnx. Choose another runtime."),
        ("compile: garbage", "ended by signal 6 (SIGABRT) while it compiled model.onnx. Choose another runtime."),
        ("compile: raise", "failed while it compiled model.onnx, at the layer conv1 (Conv). Choose another runtime."),
        ("compile: hang", "was ended, because it computed nothing for 0.1 minutes while it compiled model.onnx. Choose another "
         "runtime."),
        ("compile: spin", "was ended, because after 0.2 minutes it still compiled model.onnx. Choose another runtime."),
        ("run: kill", KILLED.format("answered 2 image(s) with model.onnx")),
        ("run: raise", "failed while it answered 2 image(s) with model.onnx. Choose another runtime."),
        ("shape", "answered 2 image(s) with numbers of the shape 3 from model.onnx, where one row for each image is due. Choose "
         "another runtime."),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence_of_ours(fault: str, sentence: str, model: Path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "compress")
    remote.release()
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(EngineError) as told:
        answered(model)
    assert str(told.value) == f"OpenVINO {sentence}" and told.value.runtime == "openvino"
    if "raise" in fault:
        assert "in its own words" in caplog.text
    if "garbage" in fault:
        assert caplog.text.count("garbage") == 0 and "last output of openvino: last words" in caplog.text
    remote.release()
    monkeypatch.delenv("FAULT")
    assert answered(model).shape == (2, CLASSES), "the next one works"
