"""A runtime that crashes, hangs or answers nonsense costs the run that runtime, and a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from faulty_runtimes import Faulty
from onnx import TensorProto, helper, numpy_helper
from places import PYTHONPATH, ROOT

from compress import processes
from compress.engines import RUNTIMES, BuildSpec
from compress.engines.benchmark import Pace
from compress.engines.processes import process, remote
from compress.engines.processes.process import RuntimeProcess
from compress.errors import EngineError

pytestmark = pytest.mark.integration

SIZE, CLASSES = 8, 3
SPEC = BuildSpec(SIZE, batch_size=2)
IMAGES = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
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
        ("compile: allocate", "ended by signal 6 (SIGABRT) while it compiled model.onnx, out of memory. End other programs on this "
         "machine, or choose another runtime."),
        ("compile: no memory", "ran out of memory while it compiled model.onnx. End other programs on this machine, or choose "
         "another runtime."),
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


def test_a_file_that_is_tried_costs_no_session_but_those_of_trials(model: Path, monkeypatch) -> None:
    remote.release()
    with Faulty().load(model, SPEC) as kept:
        monkeypatch.setenv("FAULT", "compile: abort")
        with pytest.raises(EngineError, match="signal 6"):
            Faulty().load(model, SPEC, trial=True)
        assert kept.usable and kept.run(IMAGES).shape == (2, CLASSES)


def test_threads_share_no_process(model: Path, monkeypatch) -> None:
    remote.release()
    told = []

    def crash() -> None:
        try:
            answered(model)
        except EngineError as error:
            told.append(str(error))
        remote.release()

    with Faulty().load(model, SPEC) as kept:
        monkeypatch.setenv("FAULT", "compile: segfault")
        thread = threading.Thread(target=crash)
        thread.start()
        thread.join()
        assert "signal 11" in told[0] and kept.run(IMAGES).shape == (2, CLASSES)


def test_what_was_loaded_is_gone_with_its_process_and_says_so(model: Path, monkeypatch) -> None:
    remote.release()
    monkeypatch.setenv("FAULT", "batch of 2: abort")
    with Faulty().load(model, SPEC) as first, Faulty().load(model, SPEC) as second:
        assert len(first.burst(IMAGES[:1], Pace(1.0))) >= 3
        sentence = r"ended by signal 6 \(SIGABRT\) while it was timed with model.onnx, 2 image\(s\) at once. Choose"
        with pytest.raises(EngineError, match=sentence):
            first.burst(IMAGES, Pace(1.0))
        with pytest.raises(EngineError, match=sentence):
            second.run(IMAGES)
        assert not second.usable


def test_a_process_that_holds_nothing_ends_and_the_next_order_starts_another(model: Path, monkeypatch) -> None:
    remote.release()
    monkeypatch.setattr(process, "IDLE_S", 0.1)
    expected = answered(model)
    (first,) = remote._processes.values()
    assert first._process.wait(60) == 0
    usable, once = RuntimeProcess.usable, iter([True])  # as if it had ended only after it was looked at
    monkeypatch.setattr(RuntimeProcess, "usable", property(lambda self: next(once, None) or usable.fget(self)))
    assert np.array_equal(answered(model), expected)
    monkeypatch.undo()
    remote.release()


def test_a_copy_of_this_program_does_not_use_its_processes(model: Path) -> None:
    with Faulty().load(model, SPEC) as kept:
        copy = os.fork()
        if copy == 0:
            os._exit(0 if not remote._processes and not kept.usable else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0
        assert kept.run(IMAGES).shape == (2, CLASSES)


@pytest.mark.parametrize("end", ["kill the program", "cancel the run"])
def test_a_hanging_runtime_ends_with_the_program(end: str, model: Path, tmp_path: Path) -> None:
    """Which may be killed alone, or be asked to stop with its group, as a queue does."""
    program = f"from faulty_runtimes import *; Faulty().load(Path({str(model)!r}), BuildSpec({SIZE}))"
    env = {
        **os.environ,
        "FAULT": "compile: hang",
        "HANGING": str(tmp_path / "hanging"),
        "PYTHONPATH": PYTHONPATH,
    }
    started = processes.start([sys.executable, "-c", program], folder=tmp_path, console=None, env=env)
    child = processes.identify(started.pid)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes.living(child)) == 2
    if end == "kill the program":
        os.kill(started.pid, signal.SIGKILL)
    else:
        processes.stop(child, 1.0)
    started.wait()
    deadline = time.monotonic() + 10
    while processes.living(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.living(child) == []


# ---- for real -----------------------------------------------------------------------------------------------------


def test_openvinos_compiler_may_crash_and_nothing_else_does(tmp_path: Path) -> None:
    """It does in 2026.4.1: a concatenation of integers that no ReLU comes before, and a slice that takes nothing away."""
    path = tmp_path / "ghost.onnx"
    onnx.save(ghost(), path)
    with RUNTIMES["onnxruntime"].load(path, SPEC) as session:
        assert session.run(IMAGES).shape == (2, 32)
        try:
            with RUNTIMES["openvino"].load(path, SPEC):
                pytest.skip("this version of OpenVINO compiles it")
        except EngineError as error:
            assert str(error) == (
                "OpenVINO ended by signal 11 (SIGSEGV) while it compiled ghost.onnx. Choose another runtime."
            )
        assert session.run(IMAGES).shape == (2, 32)


def ghost() -> onnx.ModelProto:
    """A convolution, a depthwise one of it, both concatenated, a slice of all channels, a convolution."""
    random, constants, nodes = np.random.default_rng(0), [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def rounded(tensor: str) -> str:
        codes = node("QuantizeLinear", [tensor, "scale", "zero"], f"{tensor}.codes")
        return node("DequantizeLinear", [codes, "scale", "zero"], f"{tensor}.rounded")

    def convolution(name: str, tensor: str, inputs: int, outputs: int, size: int, groups: int = 1) -> str:
        shape = (outputs, inputs // groups, size, size)
        codes = constant(f"{name}.weight", random.integers(-100, 100, shape, dtype=np.int8))
        scales = constant(f"{name}.scales", np.full(outputs, 0.001, np.float32))
        zeros = constant(f"{name}.zeros", np.zeros(outputs, np.int8))
        weight = node("DequantizeLinear", [codes, scales, zeros], f"{name}.floats", axis=0)
        return node("Conv", [tensor, weight], name, group=groups, pads=[size // 2] * 4)

    constant("scale", np.float32(0.02))
    constant("zero", np.uint8(128))
    ends = [constant(name, np.array(value)) for name, value in (("from", [0]), ("to", [32]), ("axis", [1]))]
    first = rounded(convolution("first", rounded("images"), 3, 16, 3))
    second = rounded(convolution("second", first, 16, 16, 3, groups=16))
    both = rounded(node("Concat", [first, second], "both", axis=1))
    all_of_it = rounded(node("Slice", [both, *ends], "all"))
    maps = node("Relu", [convolution("last", all_of_it, 32, 32, 1)], "maps")
    node("ReduceMean", [maps, constant("sides", np.array([2, 3]))], "logits", keepdims=0)
    return _model(nodes, constants, 32)


def test_the_program_of_the_web_app_loads_no_runtime() -> None:
    program = (
        "import sys, compress.ui.web.server, compress.ui.page, compress.ui.handlers, compress.ui.api\n"
        "print([name for name in ('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'pycuda') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
