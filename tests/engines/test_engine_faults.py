"""Whole runs in which a runtime fails: the report has a note, and the others' figures."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from faulty_runtimes import Faulty
from torch import nn

import compress
from compress import pipeline
from compress.engines import RUNTIMES, benchmark
from compress.engines.processes import remote
from compress.errors import EngineError, HandoffError
from compress.stages.results import MeasureResult

pytestmark = pytest.mark.integration

SIZE = 16
FILE = "quantized.onnxruntime.onnx"


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def ask(runtime: str = "auto") -> compress.Request:
    return compress.Request(
        model="custom", data="none", input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=2,
        calibration_images=32, pruner="none", runtime=runtime,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_runtimes() -> Iterator[None]:
    """ONNX Runtime, and the faulty one in OpenVINO's place."""
    with pytest.MonkeyPatch.context() as patch:
        for name, runtime in RUNTIMES.items():
            if name != "onnxruntime":
                patch.setattr(type(runtime), "missing", lambda self: "the test leaves it out")
        patch.setitem(RUNTIMES, "openvino", Faulty())
        patch.setattr(Faulty, "missing", lambda self: None)
        patch.setattr(benchmark, "race", functools.partial(benchmark.race, rounds=1, burst_ms=1.0, max_calls=3))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    report = compress.run(ask(), model=network(), out=folder)
    assert {row.runtime for row in report.measurements} == {"onnxruntime", "openvino"}
    return folder


def again(finished: Path, folder: Path, runtime: str = "auto", first: str = "build") -> compress.Report:
    """Resumes a copy of the finished run at the stage `first`, as if another runtime had been asked for."""
    shutil.copytree(finished, folder)
    stages = ("export", "build", "measure", "report")
    for name in stages[stages.index(first) :]:
        (folder / "stages" / f"{name}.json").unlink()
    (folder / "manifest.json").unlink()
    (folder / "request.json").write_text(ask(runtime).to_json())
    return compress.run(ask(runtime), model=network(), out=folder, resume=True)


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("compile: segfault", f"OpenVINO ended by signal 11 (SIGSEGV) while it compiled {FILE}. Choose another runtime."),
        ("run: abort", f"OpenVINO ended by signal 6 (SIGABRT) while it answered 32 image(s) with {FILE}. Choose another "
         "runtime."),
        ("classes", f"OpenVINO answers an image with 3 numbers from {FILE}, where the model has 4 logits. Choose another "
         "runtime."),
        ("nan", f"OpenVINO answers an image with numbers that are not finite from {FILE}, where the model has 4 logits. Choose "
         "another runtime."),
        ("batch of 2: segfault", "OpenVINO ended by signal 11 (SIGSEGV) while it was timed with baseline.onnx, 2 image(s) at "
         "once. Choose another runtime."),
    ],
)  # fmt: skip
def test_the_run_goes_on_without_a_runtime_that_fails(fault, note, finished, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FAULT", fault)
    report = again(finished, tmp_path / "run")
    assert f"openvino was left out: {note}" in report.notes
    assert {row.runtime for row in report.measurements} == {"onnxruntime"} == {row.runtime for row in report.worth}
    assert report.verdict.runtime == "onnxruntime" and pipeline.verify(tmp_path / "run") == []
    assert remote._processes == {}, "nothing is left of them"


@pytest.mark.parametrize("fault", ["compile: segfault", "batch of 2: segfault"])
def test_it_ends_where_the_runtime_was_asked_for_and_keeps_what_is_finished(
    fault, finished, monkeypatch, tmp_path
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FAULT", fault)
        with pytest.raises(
            EngineError, match=r"^OpenVINO ended by signal 11 \(SIGSEGV\) while it .* Choose another runtime.$"
        ):
            again(finished, tmp_path / "run", "openvino")
    stages = []
    compress.run(
        ask("openvino"), model=network(), out=tmp_path / "run", resume=True,
        notify=lambda event: stages.append(event.get("message")),
    )  # fmt: skip
    assert stages.count("done in an earlier attempt") == (5 if fault.startswith("compile") else 6)


def test_a_file_that_cannot_be_proved_is_not_handed_on(finished, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FAULT", "compile: segfault")
    monkeypatch.setitem(RUNTIMES, "onnxruntime", Faulty())
    with pytest.raises(
        HandoffError,
        match=r"^baseline.onnx cannot be proved equal to the model that it was made from: OpenVINO ended by signal 11 .* while it "
        r"compiled baseline.onnx. Please report this model.$",
    ):
        again(finished, tmp_path / "run", first="export")


def test_when_no_runtime_is_left_the_run_ends_with_the_last_ones_sentence(finished, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FAULT", "batch of 1: kill")
    real = pipeline.measure

    def measure(run, workload, quantized, exported, built) -> MeasureResult:
        engines = tuple(row for row in built.engines if row.runtime != "onnxruntime")
        return real(run, workload, quantized, exported, built.model_copy(update={"engines": engines}))

    monkeypatch.setattr(pipeline, "measure", measure)
    with pytest.raises(EngineError, match=r"^OpenVINO was killed \(signal 9\) while it was timed with baseline.onnx"):
        again(finished, tmp_path / "run", first="measure")


def test_two_runs_at_once_lose_it_each_for_itself(finished, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FAULT", "compile: abort")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda name: again(finished, tmp_path / name), ("first", "second")))
    for report in reports:
        assert [note for note in report.notes if "signal 6" in note and "left out" in note]
        assert {row.runtime for row in report.measurements} == {"onnxruntime"}
    assert remote._processes == {}
