"""TensorRT 10, 11 and for RTX: what is built without a GPU for real, and everything else on a GPU that is not there."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_double import RELEASES
from quantization_networks import CLASSES, SIZE
from tensorrt_files import LAYERS, SPEC, answers, batch, files, runtime_of

from compress import signing
from compress.engines import RUNTIMES, BuildSpec
from compress.engines import passport as passports
from compress.engines.processes.remote import compile_apart
from compress.engines.tensorrt_build import layers_of_build_log, layers_of_inspector
from compress.errors import HandoffError, RequestError, RuntimeUnavailableError
from compress.files import sha256

pytestmark = pytest.mark.integration

# ---- TensorRT for RTX, for real -----------------------------------------------------------------------------------


def test_an_rtx_engine_is_built_without_a_gpu_and_labelled_so(tmp_path):
    runtime, engine = RUNTIMES["tensorrt-rtx"], tmp_path / "model.engine"
    assert runtime.missing() is None
    built = runtime.build(files()["tensorrt"], engine, BuildSpec(SIZE, batch_size=4, max_batch=16))
    passport = json.loads((tmp_path / "model.engine.json").read_text())
    assert built.path == engine and built.passport == passport
    assert passport["sha256"] == sha256(engine) and passport["size_bytes"] == engine.stat().st_size
    profile = passport["inputs"]["images"]["profile"]
    assert [shape[0] for shape in (profile["min"], profile["opt"], profile["max"])] == [1, 4, 16]
    assert (passport["integer_layers"], passport["candidate_layers"]) == (LAYERS, LAYERS)
    assert {layer["precision"] for layer in passport["layers"]} == {"int8"}
    assert {"SM80", "SM89", "SM120"} <= set(passport["targets"]) and passport["gpu"] is None
    assert passport["rebuild"] == (
        "python -m compress engine build tensorrt.onnx --runtime tensorrt-rtx --batch-size 4 --max-batch 16"
    )
    if not runtime.runs_here:
        assert not built.ran and "built, not run" in built.text
        with pytest.raises(RuntimeUnavailableError, match="NVIDIA"):
            runtime.load(engine, BuildSpec(SIZE))


def test_a_float_engine_has_no_integer_layers(tmp_path):
    built = RUNTIMES["tensorrt-rtx"].build(files()["fp32"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert built.passport["integer_layers"] == 0 and built.passport["candidate_layers"] >= 8


def test_the_wrong_flavour_is_refused_by_the_layers_name_and_tensorrts_words_go_to_the_log(tmp_path, caplog):
    caplog.set_level("INFO", "compress")
    with pytest.raises(
        HandoffError,
        match=r"^tensorrt-rtx cannot read the layer \S+ \(\w+\) of onnxruntime.onnx. Choose another runtime.$",
    ):
        RUNTIMES["tensorrt-rtx"].build(files()["onnxruntime"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert list(tmp_path.iterdir()) == []
    assert "zero point" in caplog.text


def test_an_rtx_engine_is_for_the_architectures_asked_for(tmp_path):
    runtime, engine = RUNTIMES["tensorrt-rtx"], tmp_path / "model.engine"
    built = runtime.build(files()["tensorrt"], engine, BuildSpec(SIZE, targets=("SM86", "SM120")))
    assert built.passport["targets"] == ["SM86", "SM120"]
    assert built.passport["rebuild"].endswith("--target SM86 --target SM120")
    with pytest.raises(
        RequestError, match="got 'SM90', expected each at most once of SM75, .*SM121, which tensorrt_rtx"
    ):
        runtime.build(files()["tensorrt"], engine, BuildSpec(SIZE, targets=("SM86", "SM90")))
    with pytest.raises(RequestError, match="engine_targets: got 'SM86', expected each at most once"):
        runtime.check_targets(("SM86", "SM86"))
    with pytest.raises(
        HandoffError, match="^tensorrt-rtx cannot build an engine for SM75 from .*fp32.onnx. Choose another"
    ):
        runtime.build(files()["fp32"], tmp_path / "turing.engine", BuildSpec(SIZE, targets=("SM75",)))
    assert not (tmp_path / "turing.engine").exists()


def test_no_build_leaves_its_mark_on_the_next_one(tmp_path):
    runtime = RUNTIMES["tensorrt-rtx"]
    runtime.build(files()["tensorrt"], tmp_path / "ampere.engine", BuildSpec(SIZE, targets=("SM86",)))
    with pytest.raises(HandoffError):
        runtime.build(files()["fp32"], tmp_path / "turing.engine", BuildSpec(SIZE, targets=("SM75",)))
    built = runtime.build(files()["tensorrt"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert (built.passport["integer_layers"], built.passport["candidate_layers"]) == (LAYERS, LAYERS)


def test_a_builder_that_dies_is_a_sentence_and_leaves_no_file(monkeypatch, tmp_path):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(
        HandoffError,
        match=r"^TensorRT for RTX was killed \(signal 9\) while it built an engine from fp32.onnx, as happens when the machine "
        r"runs out of memory. End other programs on this machine, or choose another runtime.$",
    ):
        RUNTIMES["tensorrt-rtx"].build(files()["fp32"], tmp_path / "engines" / "model.engine", BuildSpec(SIZE))
    assert list((tmp_path / "engines").iterdir()) == []


def test_an_engine_that_cannot_be_written_is_the_disks_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        compile_apart(RUNTIMES["tensorrt-rtx"], files()["fp32"], tmp_path / "missing" / "model.engine", BuildSpec(SIZE))


# ---- on a GPU that is not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["fp32", "tensorrt"])
def test_built_loaded_and_run_it_answers_like_its_file(release, name, device, tmp_path):
    double, runtime = device(release), runtime_of(release)
    assert runtime.missing() is None and runtime.runs_here
    built = runtime.build(files()[name], tmp_path / "model.engine", SPEC)
    assert built.ran and "runs on this machine's GPU" in built.text
    with runtime.load(built.path, SPEC) as session:
        for count in (1, 4, 3):
            assert np.array_equal(session.run(batch(count)), answers(files()[name], batch(count)))
        assert session.precision == ("int8" if name == "tensorrt" else "fp32")
        assert len(session.kernels()) == LAYERS
    assert double.holds_nothing(), double.problems


@pytest.mark.parametrize("release", RELEASES)
def test_strong_typing_is_asked_for_where_it_is_a_choice(release, device, tmp_path):
    double = device(release)
    runtime_of(release).build(files()["tensorrt"], tmp_path / "model.engine", SPEC)
    assert f"create_network({1 << 1 if release.startswith('tensorrt 10') else 0})" in double.calls


def test_an_rtx_engine_is_not_for_the_gpus_of_data_centres(device, tmp_path):
    device("tensorrt_rtx", name="NVIDIA H100", capability=(9, 0))
    runtime = RUNTIMES["tensorrt-rtx"]
    built = runtime.build(files()["tensorrt"], tmp_path / "model.engine", SPEC)
    assert not runtime.runs_here and not built.ran
    assert runtime.unfit(built.passport)[0].endswith("SM121, and the NVIDIA H100 here is SM90.")


def loaded(device, folder: Path, release: str = "tensorrt 11.4.0.106"):
    double, runtime = device(release), runtime_of(release)
    runtime.build(files()["tensorrt"], folder / "model.engine", SPEC)
    return double, runtime.load(folder / "model.engine", SPEC)


def test_a_call_copies_runs_and_waits_in_this_order(device, tmp_path):
    double, session = loaded(device, tmp_path)
    double.calls.clear()
    session.run(batch(3))
    assert double.calls == [
        "push", "set_input_shape", "memcpy_htod_async", "execute_async_v3", "memcpy_dtoh_async", "synchronize", "pop",
    ]  # fmt: skip
    double.calls.clear()
    session.close()
    assert double.calls == ["push", "free", "free", "del execution", "del engine", "pop"]
    assert double.retained == 1 and double.holds_nothing()


def test_what_the_engine_cannot_take_is_refused(device, tmp_path):
    double, session = loaded(device, tmp_path)
    with pytest.raises(HandoffError, match="5 images were given; this engine takes at most 4 at once"):
        session.run(batch(5))
    with pytest.raises(HandoffError, match="does not take a batch of 0 images"):
        session.run(batch(1)[:0])
    with pytest.raises(HandoffError, match="the session takes any number x 3 x 24 x 24"):
        session.run(np.zeros((1, 3, 8, 8), np.float32))
    double.failing.add("execute_async_v3")
    with pytest.raises(HandoffError, match="could not run a batch of 2 images"):
        session.run(batch(2))
    assert not any(double.streams.values()), "a failed call leaves nothing on the stream"
    double.failing.clear()
    assert np.array_equal(session.run(batch(2)), answers(files()["tensorrt"], batch(2)))
    session.close()
    assert double.holds_nothing(), double.problems


@pytest.mark.parametrize(
    ("failing", "text"),
    [
        ("create_execution_context", "not enough free memory"),
        ("set_tensor_address", "has no tensor 'images'"),
        ("mem_alloc 1", "out of memory"),
        ("mem_alloc 2", "out of memory"),
    ],
)
def test_a_session_that_cannot_start_gives_everything_back(failing, text, device, tmp_path):
    double, runtime = device("tensorrt 11.4.0.106"), RUNTIMES["tensorrt"]
    runtime.build(files()["tensorrt"], tmp_path / "model.engine", SPEC)
    double.failing.add(failing)
    with pytest.raises(Exception, match=text):
        runtime.load(tmp_path / "model.engine", SPEC)
    assert double.holds_nothing(), double.problems


def test_an_engine_of_another_version_is_refused_with_the_command_that_builds_it_again(device, tmp_path):
    device("tensorrt 10.3.0")
    RUNTIMES["tensorrt"].build(files()["tensorrt"], tmp_path / "model.engine", SPEC)
    double = device("tensorrt 11.4.0.106")
    with pytest.raises(
        HandoffError, match="was built with tensorrt 10.3.0 for SM89; .*`python -m compress engine build"
    ):
        RUNTIMES["tensorrt"].load(tmp_path / "model.engine", SPEC)
    assert double.holds_nothing(), double.problems


@pytest.mark.parametrize("failing", ["parse_from_file", "build_serialized_network"])
def test_tensorrts_refusal_is_a_sentence_of_ours(failing, device, tmp_path):
    device("tensorrt 10.16.1.11").failing.add(failing)
    with pytest.raises(HandoffError, match="^tensorrt cannot .*fp32.onnx. Choose another runtime.$"):
        RUNTIMES["tensorrt"].build(files()["fp32"], tmp_path / "model.engine", SPEC)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_one_sentence(device, monkeypatch):
    runtime = RUNTIMES["tensorrt"]
    if runtime.missing():
        assert runtime.missing() == (
            "TensorRT is not installed: install the packages of requirements-gpu.txt on a host with an NVIDIA GPU, or use "
            "the Docker image."
        )
        assert not runtime.runs_here
        with pytest.raises(RuntimeUnavailableError, match="TensorRT is not installed"):
            runtime.build(files()["tensorrt"], Path("model.engine"), SPEC)
    double = device("tensorrt 11.4.0.106")
    double.failing.add("init")
    assert runtime.missing().startswith("TensorRT finds no NVIDIA driver (cuInit failed: no CUDA-capable device")
    double.failing.clear()
    double.count = 0
    assert runtime.missing() == "TensorRT finds no NVIDIA GPU; run on a host that has one."
    device("tensorrt 10.3.0")
    monkeypatch.setattr(importlib.import_module("tensorrt"), "__version__", "8.6.1")
    assert runtime.missing().startswith("TensorRT 8.6.1 is installed, and 10 or newer is needed: ")


# ---- reading layers -----------------------------------------------------------------------------------------------


def test_attention_is_no_layer_because_it_multiplies_two_activations():
    line = (
        "Name: {name}_myl0_1, LayerType: gemm, Inputs: [ {{ Name: a, Dimensions: [-1,96], Datatype: Int8 }}], "
        "Constants: [ {constants}{{ Name: alpha, Dimensions: [1], Strides: [1], Datatype: Float }}], Outputs: [ {{ }}]"
    )
    weight = "{ Name: w, Dimensions: [96,192], Strides: [1,96], Datatype: Int8 }, "
    log = "\n".join([line.format(name="fc", constants=weight), line.format(name="attention", constants="")])
    assert [(kernel.name, kernel.precision) for kernel in layers_of_build_log(log)] == [("fc", "int8")]


def test_layers_are_read_in_the_words_of_both_editions():
    log = (
        "Name: conv1_myl0_2, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [1], Datatype: Int8, Format: x }], "
        "Constants: [], Outputs: []\nName: __myl_Move_myl0_1, LayerType: kgen, Inputs: [ { Datatype: Float }], "
        "Constants: []\nName: __myl_AddFc_myl0_9, LayerType: kgen, Inputs: [ { Name: b, Datatype: Half }], Constants: []"
    )
    assert [(k.name, k.precision) for k in layers_of_build_log(log)] == [("conv1", "int8"), ("__myl_AddFc", "fp16")]
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "conv1 + relu",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Format/Datatype": "Channel major Int8 format where channel % 4 == 0"}],
                },
                {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Datatype": "BFloat16"}]},
                {
                    "Name": "head",
                    "LayerType": "CaskGemmMatrixMultiply",
                    "Inputs": [{"Format/Datatype": "Row major FP16"}],
                },
                {"Name": "pool", "LayerType": "CaskPooling", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
            ]
        }
    )
    found = [(kernel.name, kernel.precision) for kernel in layers_of_inspector(text)]
    assert found == [("conv1 + relu", "int8"), ("fc", "bf16"), ("head", "fp16")]


# ---- trust --------------------------------------------------------------------------------------------------------


def test_an_engine_is_only_loaded_as_its_passport_describes_it(device, tmp_path):
    device("tensorrt 11.4.0.106")
    runtime, engine = RUNTIMES["tensorrt"], tmp_path / "model.engine"
    runtime.build(files()["tensorrt"], engine, SPEC)
    passport_path = passports.path_of(engine)
    passport = passport_path.read_text()
    with pytest.raises(HandoffError, match="is not the file that its passport describes"):
        passports.checked_engine(engine, "tensorrt-rtx")
    passport_path.unlink()
    with pytest.raises(HandoffError, match="has no readable passport .*; build the engine again"):
        runtime.load(engine, SPEC)
    passport_path.write_text('{"sha256": "0"}')
    with pytest.raises(HandoffError, match="has no readable passport .* is missing"):
        runtime.load(engine, SPEC)
    passport_path.write_text(passport)
    engine.write_bytes(engine.read_bytes() + b" ")
    with pytest.raises(HandoffError, match="is not the file that its passport describes"):
        runtime.load(engine, SPEC)


def test_an_engine_of_another_process_needs_a_manifest_that_lists_it(device, monkeypatch, tmp_path):
    device("tensorrt 11.4.0.106")
    runtime, engine = RUNTIMES["tensorrt"], tmp_path / "artifacts" / "model.engine"
    runtime.build(files()["tensorrt"], engine, SPEC)
    monkeypatch.setattr(passports, "_built_by_this_process", set())
    with pytest.raises(HandoffError, match="No manifest of a run lists model.engine with this hash"):
        runtime.load(engine, SPEC)
    hashes = {f"artifacts/{path.name}": sha256(path) for path in engine.parent.iterdir()}
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "build.json").write_text(signing.sealed("stage build", {"sha256": hashes}))
    runtime.load(engine, SPEC).close()
    listed = {name: {"sha256": digest} for name, digest in hashes.items()}
    os.unlink(tmp_path / "stages" / "build.json")
    (tmp_path / "manifest.json").write_text(signing.sealed("manifest.json", {"files": listed}))
    runtime.load(engine, SPEC).close()
    listed["artifacts/model.engine.json"]["sha256"] = "another"
    (tmp_path / "manifest.json").write_text(signing.sealed("manifest.json", {"files": listed}))
    with pytest.raises(HandoffError, match="No manifest of a run lists model.engine.json with this hash"):
        runtime.load(engine, SPEC)


def test_the_small_network_has_the_classes_that_the_buffers_are_made_for():
    assert answers(files()["fp32"], batch(2)).shape == (2, CLASSES)
