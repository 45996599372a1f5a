"""A whole run on a host with a GPU, as far as a machine without one can tell: the double executes the engines."""

from __future__ import annotations

import json

import gpu_double
import pytest
import torch
from quantization_networks import SIZE, Mixed

import compress
from compress import pipeline
from compress.engines import RUNTIMES
from compress.engines.tensorrt import TensorRTForRTX
from compress.errors import HandoffError, RequestError

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("short_run")]


def ask(**changes) -> compress.Request:
    values = {
        "model": "custom", "data": "none", "input_size": SIZE, "mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 2,
        "calibration_images": 32, "runtime": "tensorrt",
    }  # fmt: skip
    return compress.Request(**(values | changes))


def network() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def test_every_variant_is_built_compared_and_measured_on_the_gpu(monkeypatch, tmp_path):
    double = gpu_double.Gpu()
    gpu_double.install(monkeypatch, double, "tensorrt 11.4.0.106")
    monkeypatch.setattr(TensorRTForRTX, "runs_here", False)  # the real one, which would look for a real GPU
    report = compress.run(ask(engine_targets=("SM89",)), model=network(), out=tmp_path)
    engines = {row.variant: row for row in report.engines if row.runtime == "tensorrt"}
    assert set(engines) == {"baseline", "pruned", "quantized"} and all(row.ran for row in engines.values())
    assert engines["quantized"].layer_precisions["int8"] >= 8
    assert all(h.passed for h in report.handoffs if "on tensorrt" in h.target)
    rows = [row for row in report.measurements if row.runtime == "tensorrt"]
    assert {(row.variant, row.precision) for row in rows} == {
        ("baseline", "fp32"), ("pruned", "fp32"), ("quantized", "int8"),
    }  # fmt: skip
    assert report.verdict.runtime == "tensorrt" and double.holds_nothing(), double.problems
    manifest = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert manifest["artifacts/pruned.tensorrt.engine"]["parent"] == "artifacts/pruned.onnx"
    passport = json.loads((tmp_path / "artifacts" / "quantized.tensorrt.tensorrt-rtx.engine.json").read_text())
    assert passport["targets"] == ["SM89"] and pipeline.verify(tmp_path) == []


def test_a_runtime_that_refuses_the_file_ends_the_run_only_where_it_was_asked_for(monkeypatch, tmp_path):
    def refuse(*arguments: object) -> None:
        raise HandoffError("this operator is not known")

    monkeypatch.setattr(type(RUNTIMES["openvino"]), "build", refuse)
    left_out = {name: "the test leaves it out" for name in RUNTIMES if name not in ("onnxruntime", "openvino")}
    for name in left_out:
        monkeypatch.setattr(type(RUNTIMES[name]), "missing", lambda runtime: left_out[runtime.name])
    report = compress.run(ask(runtime="auto", pruner="none"), model=network(), out=tmp_path / "auto")
    assert "openvino was left out: this operator is not known" in report.notes
    assert f"Left out: {', '.join(left_out)}. the test leaves it out" in report.notes
    assert {row.runtime for row in report.measurements} == {"onnxruntime"}
    with pytest.raises(HandoffError, match="this operator is not known"):
        compress.run(ask(runtime="openvino", pruner="none"), model=network(), out=tmp_path / "asked")


def test_an_architecture_that_is_not_offered_is_refused_before_anything_is_spent(tmp_path):
    with pytest.raises(RequestError, match="engine_targets: got 'SM90', expected each at most once of SM75, SM80"):
        compress.run(ask(runtime="auto", engine_targets=("SM90",)), model=network(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
