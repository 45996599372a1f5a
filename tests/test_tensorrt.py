"""TensorRT 10, 11 and for RTX: what is built without a GPU for real, and everything else on a GPU that is not there."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import gpu_double
import numpy as np
import pytest
import torch
from gpu_double import NAMES, RELEASES, Gpu
from PIL import Image
from quantization_networks import CLASSES, SIZE, Mixed, images, quantized_at, scratch_folder

import compress.engines
from compress import models
from compress.engines import RUNTIMES, BuildSpec
from compress.engines import passport as passports
from compress.engines.tensorrt_build import layers_of_build_log, layers_of_inspector
from compress.errors import HandoffError, RequestError, RuntimeUnavailableError
from compress.files import sha256
from compress.images import Preprocessing
from compress.onnx_export import export, export_flavours

LAYERS = 10
"""Convolutions and fully connected layers of the small network."""
SPEC = BuildSpec(SIZE, batch_size=2, max_batch=4)
SOURCES = sorted(Path(compress.engines.__file__).parent.glob("tensorrt*.py"))
SCRIPT = Path(compress.engines.__file__).parents[1] / "templates" / "infer.py"
CLASS_OF = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "execution": "IExecutionContext",
    "inspector": "EngineInspector", "BuilderFlag": "BuilderFlag", "ComputeCapability": "ComputeCapability",
    "ProfilingVerbosity": "ProfilingVerbosity", "LayerInformationFormat": "LayerInformationFormat", "Logger": "Logger",
    "NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
}  # fmt: skip
"""What a variable of this name holds in the files that use the bindings."""
ONLY_RTX = {"ComputeCapability", "__members__", "num_compute_capabilities", "set_compute_capability"}


@functools.cache
def files() -> dict[str, Path]:
    """The network with random weights as `fp32`, and quantized for TensorRT."""
    folder = scratch_folder()
    torch.manual_seed(0)
    model = Mixed().eval()
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "tensorrt", "onnxruntime")}
    flavours = {flavour: paths[flavour] for flavour in ("tensorrt", "onnxruntime")}
    export_flavours(quantized_at(model, batches=[images(32, seed=2)[0]]), flavours, input_size=SIZE)
    export(model, paths["fp32"], input_size=SIZE)
    return paths


def batch(count: int) -> np.ndarray:
    return images(count, seed=5)[0].numpy()


def answers(path: Path, given: np.ndarray) -> np.ndarray:
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE)) as session:
        return session.run(given)


def runtime_of(release: str):
    return RUNTIMES["tensorrt-rtx" if release == "tensorrt_rtx" else "tensorrt"]


@pytest.fixture
def device(monkeypatch):
    """`device(release)` puts the double in place and returns it."""

    def put(release: str, **options) -> Gpu:
        double = Gpu(**options)
        gpu_double.install(monkeypatch, double, release)
        return double

    return put


# ---- names --------------------------------------------------------------------------------------------------------


def used_names(path: Path) -> set[tuple[str, str]]:
    """(class, attribute) for each attribute of a variable that holds an object of the bindings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner in ("bindings", "trt"):
                found.add(("module", node.attr))
            elif (name := CLASS_OF.get(owner.lstrip("_"))) is not None:
                found.add((name, node.attr))
    return found


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("path", [*SOURCES, SCRIPT], ids=lambda path: path.stem)
def test_only_names_of_the_published_bindings_are_used(path, release):
    names = NAMES[release]["names"]
    for owner, name in used_names(path):
        if name in ONLY_RTX and release != "tensorrt_rtx" or name.startswith("__"):
            continue
        assert name in (names if owner == "module" else names[owner]), f"{path.name}: {owner}.{name} in {release}"


def test_the_search_for_names_finds_them():
    used = set().union(*map(used_names, SOURCES))
    assert {("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3")} <= used
    assert {("ICudaEngine", "get_tensor_shape"), ("module", "OnnxParser"), ("BuilderFlag", "TF32")} <= used
    assert ("IBuilderConfig", "set_compute_capability") in used and len(used) > 25


def test_the_table_of_names_holds_for_the_bindings_installed_here():
    bindings = importlib.import_module("tensorrt_rtx")
    assert bindings.__version__ == NAMES["tensorrt_rtx"]["version"]
    for owner, names in NAMES["tensorrt_rtx"]["names"].items():
        assert names == [name for name in dir(getattr(bindings, owner)) if not name.startswith("_")]


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


def test_the_wrong_flavour_is_refused_with_tensorrts_reason(tmp_path):
    with pytest.raises(HandoffError, match="cannot read onnxruntime.onnx: .*"):
        RUNTIMES["tensorrt-rtx"].build(files()["onnxruntime"], tmp_path / "model.engine", BuildSpec(SIZE))
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(HandoffError, match="cannot build an engine from fp32.onnx: .*FP32 GEMM is not supported"):
        runtime.build(files()["fp32"], tmp_path / "turing.engine", BuildSpec(SIZE, targets=("SM75",)))
    assert not (tmp_path / "turing.engine").exists()


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
def test_tensorrts_refusal_is_handed_on(failing, device, tmp_path):
    device("tensorrt 10.16.1.11").failing.add(failing)
    with pytest.raises(HandoffError, match="tensorrt cannot .*fp32.onnx: .*the example's"):
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
    (tmp_path / "stages" / "build.json").write_text(json.dumps({"sha256": hashes}))
    runtime.load(engine, SPEC).close()
    listed = {name: {"sha256": digest} for name, digest in hashes.items()}
    os.unlink(tmp_path / "stages" / "build.json")
    (tmp_path / "manifest.json").write_text(json.dumps({"files": listed}))
    runtime.load(engine, SPEC).close()
    listed["artifacts/model.engine.json"]["sha256"] = "another"
    (tmp_path / "manifest.json").write_text(json.dumps({"files": listed}))
    with pytest.raises(HandoffError, match="No manifest of a run lists model.engine.json with this hash"):
        runtime.load(engine, SPEC)


def test_the_small_network_has_the_classes_that_the_buffers_are_made_for():
    assert answers(files()["fp32"], batch(2)).shape == (2, CLASSES)


# ---- the script of the bundle -------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path) -> Path:
    """What a user downloads, without an engine."""
    recipe = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, "bilinear")
    names = tuple(f"thing {number}" for number in range(CLASSES))
    models.save(Mixed().eval(), tmp_path, architecture=None, preprocessing=recipe, class_names=names)
    (tmp_path / "quantized.tensorrt.onnx").write_bytes(files()["tensorrt"].read_bytes())
    (tmp_path / "infer.py").write_bytes(SCRIPT.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path


def classify(folder: Path, monkeypatch, capsys, release: str, *arguments: str) -> str:
    """What the script prints, run in this process, where the double can stand for its imports."""
    spec = importlib.util.spec_from_file_location("infer_script", folder / "infer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = ["--runtime", runtime_of(release).name, "--json", *arguments]
    monkeypatch.setattr(sys, "argv", ["infer.py", str(folder / "photo.png"), *options])
    script.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("from_engine", [False, True])
def test_infer_py_answers_through_tensorrt(release, from_engine, device, bundle, monkeypatch, capsys):
    double, runtime = device(release), runtime_of(release)
    if from_engine:
        runtime.build(bundle / "quantized.tensorrt.onnx", bundle / f"quantized.tensorrt.{runtime.name}.engine", SPEC)
        double.calls.clear()
    top = json.loads(classify(bundle, monkeypatch, capsys, release))["top"]
    assert ("create_network(0)" in double.calls or "create_network(2)" in double.calls) == (not from_engine)
    pixels = np.asarray(Image.open(bundle / "photo.png"), np.float32) / np.float32(255)
    mean, std = np.array((0.4, 0.5, 0.6), np.float32), np.array((0.2, 0.25, 0.3), np.float32)
    logits = answers(files()["tensorrt"], ((pixels - mean) / std).transpose(2, 0, 1)[None])[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert [name for name, _ in top] == [f"thing {k}" for k in np.argsort(-shares)[:3]]
    np.testing.assert_allclose([share for _, share in top], np.sort(shares)[::-1][:3], rtol=1e-6)
    assert not double.current and not double.problems


def test_infer_py_loads_no_other_engine_than_the_passports(device, bundle, monkeypatch, capsys):
    release, engine = "tensorrt 11.4.0.106", bundle / "quantized.tensorrt.tensorrt.engine"
    device(release)
    RUNTIMES["tensorrt"].build(bundle / "quantized.tensorrt.onnx", engine, SPEC)
    device("tensorrt 10.3.0")
    with pytest.raises(SystemExit, match="is for version 11.4.0.106, here is 10.3.0; take an ONNX file with --file"):
        classify(bundle, monkeypatch, capsys, release)
    double = device(release)
    engine.write_bytes(engine.read_bytes() + b" ")
    with pytest.raises(SystemExit, match="is not the file that its passport describes"):
        classify(bundle, monkeypatch, capsys, release)
    passports.path_of(engine).unlink()
    with pytest.raises(SystemExit, match="has no passport quantized.tensorrt.tensorrt.engine.json beside it"):
        classify(bundle, monkeypatch, capsys, release)
    assert "deserialize_cuda_engine" not in double.calls and not double.current
    assert json.loads(classify(bundle, monkeypatch, capsys, release, "--file", str(bundle / "quantized.tensorrt.onnx")))
