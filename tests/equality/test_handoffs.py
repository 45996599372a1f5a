"""The hand-offs of a run: every step from one form of the model to the next is compared, and the report lists it."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from places import ROOT
from user_modules_quantization import SIZE, InPlaceSkip, built

import compress
from compress import equality
from compress.errors import HandoffError
from compress.quantization import fake_quantized
from compress.runs import open_run
from compress.stages.build import _Builder, build
from compress.stages.results import Answers, ExportResult
from compress.stages.workspace import load_model, load_quantized, prove_rebuilt
from compress.workload import Workload, open_workload

pytestmark = pytest.mark.integration

REQUEST = compress.Request(
    model="custom", checkpoint="random", data="none", input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3,
    pruner="none", quantizer="ptq", calibration_images=16, finetune_epochs=0, qat_epochs=0,
)  # fmt: skip
DOCUMENT = ROOT / "docs" / "handoffs.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    compress.run(REQUEST, model=built(InPlaceSkip), out=path)
    return path


@pytest.fixture(scope="module")
def source() -> Workload:
    return open_workload(REQUEST, built(InPlaceSkip))


def test_a_run_lists_every_step(folder):
    rows = compress.Report.from_file(folder / "report.json").handoffs
    assert all(row.passed for row in rows)
    assert [row.target for row in rows if " on " not in row.target] == [
        "baseline, saved and rebuilt",
        "baseline, saved and rebuilt",
        "traced graph, torch",
        "folded graph, torch",
        "prepared graph, torch",
        "fake-quantized, torch",
        "baseline, BatchNorm folded",
        "baseline.onnx",
        "fake-quantized, saved and rebuilt",
        "quantized.tensorrt.onnx",
        "quantized.onnxruntime.onnx",
    ]
    assert any(row.target == "quantized.onnxruntime.onnx on onnxruntime" for row in rows)


def recorded(folder, stage: str) -> Answers:
    return Answers(**json.loads((folder / "stages" / f"{stage}.json").read_text())["facts"]["ledger"][-1])


def test_a_model_that_is_rebuilt_differently_is_not_handed_on(folder, source):
    run = open_run(folder, REQUEST, lambda event: None, resume=True)
    model = load_model(run, source, "artifacts")
    assert prove_rebuilt(run, source, recorded(folder, "baseline"), model).passed
    model.stem.weight.data.mul_(1.01)
    with pytest.raises(HandoffError, match="baseline, torch and baseline, saved and rebuilt answer differently"):
        prove_rebuilt(run, source, recorded(folder, "baseline"), model)


def test_a_quantized_model_that_is_restored_differently_is_not_handed_on(folder, source):
    run = open_run(folder, REQUEST, lambda event: None, resume=True)
    model = fake_quantized(load_quantized(run, source))
    assert prove_rebuilt(run, source, recorded(folder, "quantize"), model, quantized=True).passed
    model.get_submodule("head.4").weight.data.mul_(-1)
    with pytest.raises(HandoffError, match="fake-quantized, saved and rebuilt answer differently"):
        prove_rebuilt(run, source, recorded(folder, "quantize"), model, quantized=True)


def test_reports_of_older_versions_have_fewer_rows(folder):
    """Stages that compared nothing said nothing of hand-offs."""
    report = compress.Report.from_file(folder / "report.json")
    assert compress.Report(**(report.model_dump() | {"handoffs": ()})).handoffs == ()


def test_few_images_are_at_least_two_and_not_many():
    assert len(equality.few(torch.zeros(1, 3, 8, 8))) == 2
    assert len(equality.few(torch.zeros(100, 3, 96, 96))) == 16 and len(equality.few(torch.zeros(100, 3, 97, 97))) == 4


def test_numbers_that_are_not_finite_agree_only_with_each_other():
    one = equality.answers(built(InPlaceSkip), torch.zeros(2, 3, SIZE, SIZE))
    broken = copy.deepcopy(one)
    broken[0, 0] = float("nan")
    assert equality.same_function("a", "b", broken, broken.copy()).passed
    with pytest.raises(HandoffError, match="a and b answer differently"):
        equality.same_function("a", "b", broken, one)


@pytest.mark.parametrize(
    ("precision", "error", "passes"),
    [("fp32", 9e-4, True), ("fp32", 1.1e-3, False), ("fp16", 1.9e-2, True), ("fp16", 2.1e-2, False),
     ("int8", 1.9e-2, True), ("int8", 2.1e-2, False)],
)  # fmt: skip
def test_a_file_beyond_its_tolerance_is_not_handed_on(precision, error, passes):
    expected = np.tile(np.array([1.0, 1.0 - 1e-6], np.float32), (8, 1))
    got = expected + np.array([-error, error], np.float32)
    row = equality.judge("model, torch", "file.onnx", expected, got, precision)
    assert row.passed == passes
    if not passes:
        with pytest.raises(HandoffError, match=f"and file.onnx answer differently: .* {re.escape(row.tolerance)} is allowed"):
            equality.checked(row)


def test_a_runtime_that_answers_differently_ends_the_run_that_asked_for_it(folder, source, monkeypatch):
    run = open_run(folder, REQUEST, lambda event: None, resume=True)
    exported = ExportResult(**json.loads((folder / "stages" / "export.json").read_text())["facts"])

    real = _Builder.__init__

    def wrong(self, run, workload, images, reference):
        real(self, run, workload, images, lambda variant, flavour: -reference(variant, flavour))

    monkeypatch.setattr(_Builder, "__init__", wrong)
    run.request = REQUEST.model_copy(update={"runtime": "onnxruntime"})
    with pytest.raises(HandoffError, match="onnxruntime answers differently from the model it was given"):
        build(run, source, exported)


# ---- the document -------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_file_and_test_that_the_document_names_exists():
    folder = DOCUMENT.parents[1]
    assert len(rows()) > 20
    for step, where, comparison, tolerance, test in rows():
        assert step and comparison and tolerance
        for file, name in re.findall(r"`(compress/[\w/]+\.py)(?:::(\w+))?`", where):
            text = (folder / file).read_text(encoding="utf-8")
            assert not name or re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), (step, file, name)
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", test)
        assert named or test.startswith("none:"), step
        for file, name in named:
            text = next((folder / "tests").rglob(file)).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\b", text, re.MULTILINE), (step, file, name)
