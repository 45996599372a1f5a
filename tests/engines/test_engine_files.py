"""`engine check` and `engine build`, on finished runs made of a few files."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_double
import pytest
from tensorrt_files import SPEC, files
from typer.testing import CliRunner

from compress import runs, signing
from compress.cli.main import cli
from compress.engines import RUNTIMES
from compress.engines import passport as passports
from compress.engines import rebuild as engine_rebuild
from compress.errors import HandoffError, RequestError, RunError
from compress.files import sha256

TENSORRT = "tensorrt 11.4.0.106"


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run with one file and its manifest."""
    path = tmp_path / "artifacts" / "quantized.tensorrt.onnx"
    path.parent.mkdir()
    path.write_bytes(files()["tensorrt"].read_bytes())
    listed = {"artifacts/quantized.tensorrt.onnx": {"sha256": sha256(path), "bytes": path.stat().st_size}}
    (tmp_path / "manifest.json").write_text(signing.sealed("manifest.json", {"format": 1, "files": listed}))
    return path


def put(monkeypatch, release: str = TENSORRT, **options) -> gpu_double.Gpu:
    double = gpu_double.Gpu(**options)
    gpu_double.install(monkeypatch, double, release)
    return double


def build(path: Path, runtime: str = "tensorrt") -> Path:
    return engine_rebuild.build(path, runtime, batch_size=2, max_batch=4, targets=()).path


def test_a_built_engine_joins_the_manifest_and_can_run(finished, monkeypatch):
    double = put(monkeypatch)
    engine = build(finished)
    assert engine == finished.with_name("quantized.tensorrt.tensorrt.engine")
    assert runs.verify(finished.parents[1]) == [] and engine_rebuild.check(engine) == []
    listed = json.loads((finished.parents[1] / "manifest.json").read_text())["files"]
    assert listed[f"artifacts/{engine.name}"]["parent"] == "artifacts/quantized.tensorrt.onnx"
    monkeypatch.setattr(passports, "_built_by_this_process", set())
    RUNTIMES["tensorrt"].load(engine, SPEC).close()
    assert double.holds_nothing(), double.problems


def test_each_reason_why_an_engine_cannot_run_here(finished, monkeypatch):
    double = put(monkeypatch, name="NVIDIA L4")
    engine = build(finished)
    loads = double.calls.count("deserialize_cuda_engine")

    def problems(release: str = TENSORRT, failing: str = "", **options) -> list[str]:
        found = put(monkeypatch, release, **options)
        found.failing.add(failing)
        *reasons, rebuild = engine_rebuild.check(engine)
        assert "deserialize_cuda_engine" not in found.calls
        assert rebuild.endswith(
            "python -m compress engine build quantized.tensorrt.onnx --runtime tensorrt --batch-size 2 --max-batch 4"
        )
        return reasons

    assert problems("tensorrt 10.3.0", name="NVIDIA L4") == [
        "It was built with TensorRT 11.4.0.106, and 10.3.0 is installed here: only the version that built an engine loads it."
    ]
    assert problems(name="NVIDIA A10", capability=(8, 6)) == ["It is for SM89, and the NVIDIA A10 here is SM86."]
    assert problems(name="NVIDIA L40")[0].startswith("It was built on an NVIDIA L4, and this machine has an NVIDIA L40")
    assert problems(failing="init")[0].startswith("TensorRT finds no NVIDIA driver")
    assert double.calls.count("deserialize_cuda_engine") == loads
    put(monkeypatch, name="NVIDIA L4")
    monkeypatch.setattr(passports, "this_platform", lambda: "Linux aarch64")
    assert engine_rebuild.check(engine)[0].endswith("and this machine is Linux aarch64.")


def test_a_changed_or_unknown_engine_is_told(finished, monkeypatch):
    put(monkeypatch)
    engine = build(finished)
    (finished.parents[1] / "manifest.json").rename(finished.parents[1] / "elsewhere.json")
    assert engine_rebuild.check(engine)[0].startswith(f"No manifest of a run lists {engine.name} with this hash")
    (finished.parents[1] / "elsewhere.json").rename(finished.parents[1] / "manifest.json")
    engine.write_bytes(engine.read_bytes() + b" ")
    assert engine_rebuild.check(engine)[0] == "It is not the file that its passport describes: the sha256 differs."
    passports.path_of(engine).unlink()
    assert "has no readable passport" in engine_rebuild.check(engine)[0]
    with pytest.raises(RunError, match="There is no file"):
        engine_rebuild.check(finished.with_name("none.engine"))


def test_what_cannot_be_built_is_refused(finished, monkeypatch, tmp_path):
    double = put(monkeypatch)
    with pytest.raises(
        RequestError, match="runtime: got 'openvino', expected one that has engines: tensorrt, tensorrt-rtx"
    ):
        build(finished, "openvino")
    with pytest.raises(RequestError, match="target: got 'SM89', expected nothing, because tensorrt builds for the GPU"):
        engine_rebuild.build(finished, "tensorrt", batch_size=2, max_batch=4, targets=("SM89",))
    stranger = files()["tensorrt"]
    with pytest.raises(RunError, match="belongs to no finished run"):
        build(stranger)
    monkeypatch.setattr(engine_rebuild, "TOLERANCE", -1.0)
    with pytest.raises(HandoffError, match="answer differently: root mean square .* The engine was not kept"):
        build(finished)
    assert [path.name for path in finished.parent.iterdir()] == [finished.name] and double.holds_nothing()
    finished.write_bytes(finished.read_bytes() + b" ")
    with pytest.raises(RunError, match="was changed after the run"):
        build(finished)


def test_the_shell_says_the_same_and_fails_where_it_cannot_run(finished):
    """For real: TensorRT for RTX builds here."""
    shell = CliRunner()
    made = shell.invoke(
        cli, ["engine", "build", str(finished), "--runtime", "tensorrt-rtx", "--target", "SM86", "--target", "SM89"]
    )
    assert made.exit_code == 0, made.output
    engine = finished.with_name("quantized.tensorrt.tensorrt-rtx.engine")
    assert str(engine) in made.output and passports.read(engine)["targets"] == ["SM86", "SM89"]
    told = shell.invoke(cli, ["engine", "check", str(engine), "--json"])
    facts = json.loads(told.output)
    assert facts["can_run"] == (not facts["problems"]) and told.exit_code == (0 if facts["can_run"] else 1)
    if not RUNTIMES["tensorrt-rtx"].runs_here:
        assert "which is not installed" in facts["problems"][0] or "NVIDIA" in facts["problems"][0]
        text = shell.invoke(cli, ["engine", "check", str(engine)]).output
        assert text.startswith(f"{engine} cannot run here.\n") and "--target SM86 --target SM89" in text
