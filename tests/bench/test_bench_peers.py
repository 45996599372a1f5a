"""The benchmark against the peers: what dominates what, what is kept, what the page says. A peer of a few lines stands in."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bench.accuracy import RECIPE
from bench.peers import driver, environments, measure, study, table
from bench.peers.driver import Conditions, compress_row, finished, user_lines
from bench.peers.front import Point, dominators, front
from bench.peers.rows import OURS, ROWS, Row
from compress.data.dataset import Dataset, Split

FAKE = '''"""A peer that copies a file."""
# told to
import json
import sys
from pathlib import Path

path = Path(sys.argv[1])
job = json.loads(path.read_text())
if job["options"].get("breaks"):
    raise RuntimeError("this peer takes no such network")
from helper import write
write(job, path.parent)
'''
HELPER = '''"""Counted as well."""
import handover
import json
import shutil
from pathlib import Path


def write(job, folder):
    """Not counted."""
    shutil.copy(Path(job["weights"]).parent / "small.onnx", folder / "model.onnx")
    (folder / "used.json").write_text(json.dumps(job["budget"]))
'''


def point(row: str, accuracy: float, ms: float, runtime: str = "onnxruntime") -> Point:
    return Point(row, runtime, accuracy, ms)


# ---- the front ----------------------------------------------------------------------------------------------------


def test_a_point_dominates_when_it_is_as_good_in_both_and_better_in_one():
    ours = point("ours", 0.90, 1.0)
    assert point("peer", 0.90, 0.9).dominates(ours) and point("peer", 0.91, 1.0).dominates(ours)
    assert not point("peer", 0.90, 1.0).dominates(ours), "an equal point dominates nothing"
    assert not point("peer", 0.92, 1.1).dominates(ours), "more accurate, and slower"
    assert not point("peer", 0.89, 0.5).dominates(ours), "faster, and less accurate"


def test_the_front_is_what_nothing_dominates():
    points = [point("a", 0.90, 1.0), point("b", 0.88, 0.5), point("c", 0.87, 0.6), point("d", 0.91, 1.0)]
    assert [one.row for one in front(points)] == ["b", "d"]


def test_a_row_is_dominated_when_each_of_its_runtimes_is():
    ours = [point("x", 0.90, 1.0), point("x", 0.90, 2.0, "openvino"), point("y", 0.80, 0.2), point("y", 0.85, 0.4)]
    peers = [point("p", 0.91, 0.9), point("q", 0.82, 0.1), point("r", 0.90, 1.5)]
    found = dominators(ours, peers)
    assert [one.row for one in found["x"]] == ["p"], "those that dominate its fastest point"
    assert found["y"] == [], "one of its points stands"


# ---- the driver ---------------------------------------------------------------------------------------------------


@pytest.fixture
def conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conditions:
    """A fake peer, thirty images, and a file that it leaves."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "handover.py").write_text("KEY = 1\n", encoding="utf-8")
    (scripts / "fake.py").write_text(FAKE, encoding="utf-8")
    (scripts / "helper.py").write_text(HELPER, encoding="utf-8")
    monkeypatch.setattr(driver, "SCRIPTS", scripts)
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "fakes.txt").write_text("fake==1\n", encoding="utf-8")
    (tmp_path / "torch.txt").write_text("torch==1\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", pixels=rng.integers(0, 256, (30, 1, 32, 32), np.uint8), labels=np.arange(30) % 10)
    onnx.save(_classifier(), tmp_path / "small.onnx")
    return Conditions(
        model="resnet18", weights=tmp_path / "weights.safetensors", images=tmp_path / "images.npz", data="here",
        mean=0.5, std=0.5, input_size=32, budget=70, int8_dot_product=False,
    )  # fmt: skip


def _classifier(batch: str | int = "batch", images: str = "images") -> onnx.ModelProto:
    """The mean of each of three channels times a matrix: images [batch, 3, ?, ?] -> logits [batch, 10]."""
    weights = numpy_helper.from_array(np.eye(3, 10, dtype=np.float32), "weights")
    nodes = [
        helper.make_node("GlobalAveragePool", [images], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    shape = [batch, 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(images, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def row(name: str = "fake", **options: object) -> Row:
    return Row(name, name.title(), "fakes", "fake", dict(options))


def run(one: Row, conditions: Conditions) -> dict:
    return compress_row(one, conditions, conditions.images.parent / "out" / one.name, Path(sys.executable))


def test_a_script_leaves_a_file_and_says_what_it_used(conditions):
    result = run(row(), conditions)
    assert "error" not in result and result["images"] == 70 and result["seconds"] > 0
    assert result["files"] == {"onnxruntime": "model.onnx", "openvino": "model.onnx"}


def test_a_failure_is_a_result_with_its_reason_and_leaves_no_file_behind(conditions):
    folder = conditions.images.parent / "out" / "fake"
    run(row(), conditions)
    result = run(row(breaks=True), conditions)
    assert result["error"] == "RuntimeError: this peer takes no such network" and "files" not in result
    assert not (folder / "model.onnx").exists()


def test_a_script_without_end_is_ended(conditions):
    (driver.SCRIPTS / "fake.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    folder = conditions.images.parent / "out"
    result = compress_row(row(), conditions, folder, Path(sys.executable), limit_s=0.5)
    assert result["error"] == "it was ended after 0 minutes"


def test_only_the_same_row_under_the_same_conditions_is_finished(conditions):
    folder = conditions.images.parent / "out" / "fake"
    assert finished(row(), conditions, folder) is None
    result = run(row(), conditions)
    assert finished(row(), conditions, folder) == result
    assert finished(row(share=0.5), conditions, folder) is None
    assert finished(row(), replace(conditions, budget=71), folder) is None
    with (driver.SCRIPTS / "helper.py").open("a", encoding="utf-8") as helper_file:
        helper_file.write("# another\n")
    assert finished(row(), conditions, folder) is None, "what its script imports has changed"


@pytest.mark.parametrize("name", ["fakes", "torch"])
def test_a_row_made_with_other_packages_is_not_finished(conditions, name):
    folder = conditions.images.parent / "out" / "fake"
    run(row(), conditions)
    assert finished(row(), conditions, folder) is not None
    (environments.REQUIREMENTS / f"{name}.txt").write_text(f"{name}==2\n", encoding="utf-8")
    assert finished(row(), conditions, folder) is None


def test_espaliers_rows_are_made_anew_when_its_code_has_changed_and_those_of_peers_are_not(conditions, monkeypatch):
    root = conditions.images.parent / "root"
    code = root / "compress" / "pruning" / "plan.py"
    code.parent.mkdir(parents=True)
    code.write_text("ROUNDED = 8\n", encoding="utf-8")
    (root / "requirements.txt").write_text("torch==1\n", encoding="utf-8")
    monkeypatch.setattr(driver, "ROOT", root)
    folder, rows = conditions.images.parent / "out", [row(), replace(row("ours"), environment=OURS)]
    for one in rows:
        run(one, conditions)
    assert all(finished(one, conditions, folder / one.name) for one in rows)
    code.write_text("ROUNDED = 4\n", encoding="utf-8")
    assert [finished(one, conditions, folder / one.name) is not None for one in rows] == [True, False]


def test_an_environment_is_made_anew_when_the_torch_of_all_has_changed(tmp_path, monkeypatch):
    installed = []

    def call(command: list[str], environment: dict | None = None) -> str:
        if "venv" in command:
            (Path(command[-1]) / "lib" / "python3.12" / "site-packages").mkdir(parents=True, exist_ok=True)
        if "install" in command:
            installed.append(Path(command[-1]).stem)
        return "[]"

    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(environments, "_call", call)
    (tmp_path / "torch.txt").write_text("torch==1\n", encoding="utf-8")
    (tmp_path / "fakes.txt").write_text("fake==1\n", encoding="utf-8")
    for _ in range(2):
        environments.prepare("fakes", tmp_path / "home")
    assert installed == ["torch", "fakes"]
    (tmp_path / "torch.txt").write_text("torch==2\n", encoding="utf-8")
    environments.prepare("fakes", tmp_path / "home")
    assert installed == ["torch", "fakes"] * 2


def test_the_lines_of_a_user_are_code_with_what_it_imports_and_without_the_handover(conditions):
    assert user_lines("fake") == 9 + 7


# ---- one model ----------------------------------------------------------------------------------------------------


def dataset(shade: int) -> Dataset:
    """Three grey images of that shade to train on; the test part is of no matter."""
    images, labels = torch.full((3, 1, 32, 32), shade, dtype=torch.uint8), torch.arange(3)
    split = Split(None, np.arange(3), labels, RECIPE, images)
    return Dataset(split, split, "labelled", (), "somewhere")


def test_other_data_are_kept_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "dense_checkpoint", lambda model, images, out, *, epochs: out / "weights.safetensors")

    def pixels_of_peers(shade: int, source: str = "a") -> int:
        folder = study.folder_of(tmp_path, "resnet18", source, 70, dataset(shade))
        folder.mkdir(exist_ok=True)
        with np.load(study.conditions_of("resnet18", source, 70, dataset(shade), folder).images) as arrays:
            return int(arrays["pixels"].max())

    assert [pixels_of_peers(shade) for shade in (7, 9, 7)] == [7, 9, 7], "files of the same folder were replaced"
    assert len(list(tmp_path.iterdir())) == 2
    pixels_of_peers(7, "b")
    assert len(list(tmp_path.iterdir())) == 3


def test_dense_weights_that_are_trained_otherwise_are_kept_in_another_folder(tmp_path, monkeypatch):
    before = study.folder_of(tmp_path, "resnet18", "a", 70, dataset(7))
    assert study.folder_of(tmp_path, "resnet18", "a", 70, dataset(7)) == before
    assert study.folder_of(tmp_path, "resnet18", "a", 71, dataset(7)) != before
    monkeypatch.setitem(study.DENSE_EPOCHS, "resnet18", 9.0)
    assert study.folder_of(tmp_path, "resnet18", "a", 70, dataset(7)) != before


def test_what_is_finished_is_not_done_again_and_failures_on_request(conditions, capsys):
    folder, made = conditions.images.parent / "out", {"fakes": study.Environment(Path(sys.executable), {})}
    rows = [row(), row("broken", breaks=True), row("absent")]
    asked = ["fake", "broken"]
    found = study.results(conditions, folder, made, asked, rows=rows)
    assert [one["row"] for one in found] == asked
    assert found[0]["large_files"] and found[0]["large_error"] is None
    assert len(capsys.readouterr().out.splitlines()) == 3, "one row at two sizes, one that failed at the first"
    assert study.results(conditions, folder, made, [], rows=rows) == found
    assert capsys.readouterr().out == "", "and what is there is told though it was not asked for"
    study.results(conditions, folder, made, asked, rows=rows, retry=True)
    assert capsys.readouterr().out.splitlines() == ["resnet18 at 32 px: broken"]


def test_only_what_is_asked_for_is_tried_again_and_the_reasons_of_others_stay(conditions, capsys):
    folder, made = conditions.images.parent / "out", {"fakes": study.Environment(Path(sys.executable), {})}
    rows = [row(), replace(row("other", breaks=True), environment="others")]
    (environments.REQUIREMENTS / "others.txt").write_text("other==1\n", encoding="utf-8")
    study.results(conditions, folder, made | {"others": made["fakes"]}, ["fake", "other"], rows=rows)
    capsys.readouterr()
    for there in (made, made | {"others": made["fakes"]}):
        found = study.results(conditions, folder, there, ["fake"], rows=rows, retry=True)
        assert found[1]["error"] == "RuntimeError: this peer takes no such network"
    assert capsys.readouterr().out == ""


def test_a_structure_that_fails_at_the_larger_size_is_told_there(conditions):
    folder, made = conditions.images.parent / "out", {"fakes": study.Environment(Path(sys.executable), {})}
    script = driver.SCRIPTS / "fake.py"
    script.write_text(FAKE.replace('job["options"].get("breaks")', 'job["input_size"] > 32'), encoding="utf-8")
    found = study.results(conditions, folder, made, ["fake"], rows=[row()])
    (entry, _) = study.deployed(found, folder, dataset(255).test, rows=[])
    assert entry["accuracy"] == pytest.approx(1 / 3) and entry["large_ms"] is None
    assert entry["large_error"] == "RuntimeError: this peer takes no such network"


def test_a_peer_that_cannot_be_installed_is_a_row_with_its_reason(conditions):
    made = {"fakes": study.Environment(None, {"error": "ERROR: No matching distribution"})}
    (result,) = study.results(conditions, conditions.images.parent / "out", made, ["fake"], rows=[row()])
    assert result["error"] == "not installed: ERROR: No matching distribution"


def test_files_are_raced_and_answered_through_the_runtimes(conditions):
    folder = conditions.images.parent
    one = measure.Deployed("fake", "onnxruntime", folder / "small.onnx")
    (folder / "broken.onnx").write_bytes(b"no model")
    broken = replace(one, row="broken", path=folder / "broken.onnx")
    found = measure.latencies([one, broken, replace(one, runtime="openvino")], 32)
    assert found[one.key]["p50_ms"] > 0 and found["fake", "openvino", "int8"]["p50_ms"] > 0
    assert "broken.onnx" in found[broken.key]["error"]


def test_a_file_that_a_runtime_breaks_on_is_told_and_the_others_are_measured(conditions):
    folder = conditions.images.parent
    files = {"fake": _classifier(), "one image a call": _classifier(batch=1), "renamed": _classifier(images="pixels")}
    for name, model in files.items():
        for place in (folder / name, folder / name / "large"):
            place.mkdir(parents=True)
            onnx.save(model, place / "model.onnx")
    listed = {"onnxruntime": "model.onnx"}
    found = [{"row": name, "files": listed, "large_files": listed} for name in files]
    whole, fixed, renamed = study.deployed(found, folder, dataset(255).test, rows=[])
    assert whole["accuracy"] == pytest.approx(1 / 3) and "error" not in whole
    assert fixed["small_ms"] > 0 and "accuracy" not in fixed and fixed["error"].startswith("InvalidArgument: ")
    assert "small_ms" not in renamed or renamed["small_ms"] is None
    assert "pixels" in renamed["error"] and renamed["large_error"] == renamed["error"]


def test_openvinos_file_counts_its_weights(tmp_path):
    (tmp_path / "model.xml").write_bytes(b"12345")
    (tmp_path / "model.bin").write_bytes(b"123")
    assert measure.Deployed("a", "openvino", tmp_path / "model.xml").file_bytes == 8


# ---- the page -----------------------------------------------------------------------------------------------------


def entry(name: str, runtime: str, accuracy: float, small: float, large: float, precision: str = "int8") -> dict:
    return {
        "row": name, "runtime": runtime, "asked": "int8", "file_bytes": 2_850_000, "precision": precision,
        "kernels": {precision: 20, "fp32": 1}, "notes": [], "accuracy": accuracy, "ci95": [accuracy - 0.003, accuracy + 0.003],
        "n": 10_000, "small_ms": small, "large_ms": large, "small_noisy": True, "large_noisy": False,
    }  # fmt: skip


def test_the_page_keeps_losing_and_failing_rows_and_says_who_dominates():
    result = {"images": 60_000, "seconds": 120.4, "lines": 12}
    names = ("dense", "espalier-50", "nncf-ptq", "ort-advised")
    document = {
        "made_on": "Made here.",
        "models": [
            {
                "model": "resnet18", "small": 32, "large": 224, "budget": 60_000, "n_test": 10_000,
                "results": [{"row": name, **result} for name in names]
                + [{"row": "inc-ptq", "error": "ValueError: a | b", "lines": 30}],
                "deployed": [
                    entry("dense", "openvino", 0.91, 2.0, 20.0, "fp32"),
                    entry("espalier-50", "openvino", 0.905, 0.4, 5.0),
                    entry("nncf-ptq", "openvino", 0.91, 0.5, 4.0) | {"accuracy": 0.906},
                    entry("nncf-ptq", "onnxruntime", 0.9, 0.6, 0) | {"large_ms": None, "large_error": "Fail: too | large"},
                    entry("ort-advised", "openvino", 0.9, 0.1, 0.1) | {"error": "RuntimeError: no", "accuracy": None},
                ],
            }
        ],
        "environments": {"nncf": {"versions": {"nncf": "3.4.0"}, "megabytes": 479.2}, "x": {"error": "no such thing"}},
    }  # fmt: skip
    text = table.page(document)
    assert (
        "| **Espalier 50 % + QAT** | OpenVINO | int8 (20 of 21) | 90.50 % ± 0.30 | 2.85 MB | ~0.400 ms (5.00x) | "
        "5.000 ms (4.00x) | 60,000 | 120 | 12 |"
    ) in text
    assert "| ~0.600 ms (3.33x) | Fail: too / large | 60,000 |" in text
    assert "| ONNX Runtime PTQ, as advised for the CPU | OpenVINO |  | **refused**: RuntimeError: no |" in text
    assert "| Neural Compressor PTQ | | | **failed**: ValueError: a / b | | | | | | 30 |" in text
    assert "- At 32 px no peer's point dominates a row of Espalier's." in text
    assert "**Espalier 50 % + QAT** is **dominated** at 224 px by NNCF PTQ on OpenVINO (90.60 %, 4.000 ms)." in text
    assert "Front at 224 px, the fastest first: NNCF PTQ (OpenVINO)." in text
    assert "refits what stays to the dense model on 1,024 more training images" in text
    assert "those of Espalier leave out its own measuring and reporting" in text
    assert "| nncf | nncf 3.4.0 | 479 MB |" in text and "| x | **could not be installed**: no such thing | |" in text


# ---- what is there ------------------------------------------------------------------------------------------------


def test_every_row_has_its_script_and_its_pinned_requirements():
    assert len({one.name for one in ROWS}) == len(ROWS)
    for one in ROWS:
        compile((driver.SCRIPTS / f"{one.script}.py").read_text(encoding="utf-8"), one.script, "exec")
        assert user_lines(one.script) > 0
        if one.environment != OURS:
            pins = (environments.REQUIREMENTS / f"{one.environment}.txt").read_text(encoding="utf-8").splitlines()
            assert pins and all("==" in pin for pin in pins)


def test_the_reason_of_a_failure_is_its_last_words():
    assert environments.reason("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert environments.reason("in x\nTypeError: two\n    lines\n") == "TypeError: two lines"
    assert environments.reason("\n") == "it ended without a word"
