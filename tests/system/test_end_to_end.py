"""The whole path on the bundled model and images, once, from a shell; then everything that it promises is checked."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from places import ROOT

import compress
from compress import machine
from compress.data import fashion_mnist
from compress.data.dataset import ASSETS
from compress.report import Report

pytestmark = pytest.mark.integration
COMMAND = [
    "run",
    "--model",
    "resnet18",
    "--data",
    "fashion-mnist",
    "--finetune-epochs",
    "0.5",
    "--qat-epochs",
    "0.1",
    "--batch-size",
    "8",
    "--calibration-images",
    "128",
]
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def shell(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)], capture_output=True, text=True, cwd=ROOT, **kwargs
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = shell(*COMMAND, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def report(run):
    return Report.from_file(run[0] / "report.json")


def test_the_shell_prints_verdict_table_and_places(run, report):
    printed = run[1].stdout
    assert report.verdict.text in printed
    assert re.search(r"baseline\s+11\.18 M", printed) and re.search(r"quantized\s+2\.\d\d M", printed)
    assert "report.html" in printed and "[8/8] report" in run[1].stderr


def test_exactly_the_promised_files(run):
    folder = run[0]
    found = {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] != "stages"
    }
    artifacts = {
        "baseline.onnx",
        "pruned.onnx",
        "quantized.tensorrt.onnx",
        "quantized.onnxruntime.onnx",
        "model.safetensors",
        "model.json",
        "quantization.json",
        "infer.py",
        "quantized.tensorrt.tensorrt-rtx.engine",
        "quantized.tensorrt.tensorrt-rtx.engine.json",
    }
    papers = {"request.json", "events.jsonl", "log.txt", "report.json", "report.html", "README.md", "manifest.json"}
    assert found == papers | {f"artifacts/{name}" for name in artifacts}
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"artifacts/{name}" for name in artifacts} <= set(manifest)
    assert manifest["artifacts/quantized.tensorrt.tensorrt-rtx.engine"]["parent"] == "artifacts/quantized.tensorrt.onnx"


def test_it_is_smaller_and_still_right(report):
    assert [v.name for v in report.variants] == ["baseline", "pruned", "quantized"]
    dense, small = report.variant("baseline"), report.variant("quantized")
    assert dense.accuracy >= 0.90 and dense.n_test == report.data.n_test == 2000
    assert report.verdict.size_ratio >= 10
    assert dense.accuracy - small.accuracy < 0.05, "a short training; `make demo` trains longer"
    assert small.accuracy_ci95[0] < small.accuracy < small.accuracy_ci95[1]
    assert 0.2 < small.parameters / dense.parameters < 0.3


def test_kept_channels_are_multiples_of_eight_and_the_answer_layer_is_whole(report):
    for layer in report.layers:
        if layer.group:
            assert layer.channels_after % 8 == 0 and layer.channels_after < layer.channels_before
        assert layer.reason
    answer = report.layers[-1]
    assert answer.name == "fc" and answer.channels_after == 10 and answer.group is None


def test_every_layer_runs_on_integers_read_back_from_the_runtimes(report):
    rows = [m for m in report.measurements if m.variant == "quantized"]
    assert {m.runtime for m in rows} == {"onnxruntime", "openvino"}
    assert all(m.precision == "int8" and (m.integer_layers, m.candidate_layers) == (21, 21) for m in rows)
    dense = [m for m in report.measurements if m.variant == "baseline"]
    assert all(m.precision == "fp32" and m.integer_layers == 0 for m in dense)
    engine = next(e for e in report.engines if e.runtime == "tensorrt-rtx")
    assert engine.layer_precisions == {"int8": 21} and not engine.ran and "not run" in engine.text


def test_every_hand_off_was_compared(report):
    targets = {h.target for h in report.handoffs}
    assert {
        "shrunk",
        "baseline.onnx",
        "pruned.onnx",
        "quantized.tensorrt.onnx",
        "quantized.onnxruntime.onnx",
    } <= targets
    assert all(h.passed for h in report.handoffs)
    masked = next(h for h in report.handoffs if h.target == "shrunk")
    assert masked.max_abs_diff <= 1e-4 * masked.reference_scale
    quantized = next(h for h in report.handoffs if h.target == "quantized.onnxruntime.onnx")
    assert quantized.top1_agreement >= 0.99


def test_raw_samples_are_kept_and_percentiles_follow_from_them(report):
    assert {m.batch_size for m in report.measurements} == {1, 8}
    for m in report.measurements:
        assert len(m.samples_ms) >= 20
        assert m.p50_ms == pytest.approx(np.percentile(m.samples_ms, 50), rel=1e-3)
        assert m.p50_ms <= m.p90_ms <= m.p99_ms


def test_the_ledger_goes_from_the_dense_model_to_the_deployed_file(report):
    names = [(hop.name, hop.through) for hop in report.ledger]
    assert names[:4] == [
        ("baseline", "torch"),
        ("pruned and refitted", "torch"),
        ("fine-tuned", "torch"),
        ("fake-quantized", "torch"),
    ]
    assert names[4:] == [
        ("quantized.tensorrt.onnx", "onnxruntime"),
        ("quantized.onnxruntime.onnx", "onnxruntime"),
        ("quantized.onnxruntime.onnx", "openvino"),
    ]
    assert [hop.previous for hop in report.ledger[4:]] == [
        "fake-quantized, torch",
        "fake-quantized, torch",
        "quantized.onnxruntime.onnx, onnxruntime",
    ]
    for before, hop in zip(report.ledger[:3], report.ledger[1:4], strict=True):
        assert hop.n * (before.accuracy - hop.accuracy) == pytest.approx(hop.lost - hop.gained)
    assert report.loss.hop in {hop.name for hop in report.ledger} | {None} and report.loss.text.endswith(".")
    assert {row.runtime for row in report.worth} == {"onnxruntime", "openvino"}
    assert all(20 < layer.output_sqnr_db < 70 and min(layer.file_sqnr_db.values()) > 40 for layer in report.layers)
    dense, refitted, tuned = (hop.accuracy for hop in report.ledger[:3])
    assert refitted > dense - 0.04, (
        "the refit alone brings most of it back; without it, a quarter of the answers are right"
    )
    assert tuned > dense - 0.04


def test_the_html_report_needs_no_network(run):
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # plotly's own source names map providers
    outside = re.findall(r'(?:src|href)\s*=\s*["\'](?:https?:)?//[^"\']+', page)
    assert outside == [] and "<script src" not in text and "Plotly.newPlot" in text


def test_the_model_card_reads_its_numbers_from_the_report(run, report):
    card = (run[0] / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: onnx") and report.verdict.text in card
    assert f"{report.variant('quantized').file_bytes['quantized.onnxruntime.onnx']:,}" in card


def test_load_rebuilds_equal_outputs_where_nni_cannot_be_imported(run, tmp_path):
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys; sys.modules['nni'] = None\n"
        "import numpy, torch, compress\n"
        f"model = compress.load({str(run[0])!r})\n"
        f"images = torch.from_numpy(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        f"with torch.no_grad(): numpy.save({str(tmp_path / 'logits.npy')!r}, model(images).numpy())\n"
        "assert not any(name == 'nni' or name.startswith('nni.') for name, module in sys.modules.items() if module)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(run[0] / "artifacts" / "pruned.onnx"), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"images": images})[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_infer_classifies_images_where_torch_cannot_be_imported(run, tmp_path, runtime):
    images = fashion_mnist.read(ASSETS / "fashion-mnist")
    right = 0
    for index in range(20):
        Image.fromarray(images.test_images[index]).save(tmp_path / f"{index}.png")
    words = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        str(run[0] / "artifacts" / "infer.py"),
        *(str(tmp_path / f"{i}.png") for i in range(20)),
        "--runtime",
        runtime,
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    if runtime == "openvino" and not machine.has_int8_dot_product():
        assert done.returncode != 0 and "overflow on this CPU" in done.stderr and "--runtime onnxruntime" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    for index, line in enumerate(done.stdout.splitlines()):
        right += fashion_mnist.CLASS_NAMES[images.test_labels[index]] in line.split(": ", 1)[1].split(",")[0]
    assert right >= 15, done.stdout


def test_verify_accepts_the_run_and_finds_one_flipped_byte(run, tmp_path):
    assert "verifies" in shell("verify", run[0]).stdout
    copy = shutil.copytree(run[0], tmp_path / "copy")
    onnx = copy / "artifacts" / "quantized.onnxruntime.onnx"
    content = bytearray(onnx.read_bytes())
    content[len(content) // 2] ^= 1
    onnx.write_bytes(content)
    found = shell("verify", copy, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["problems"] == [
        "artifacts/quantized.onnxruntime.onnx was changed after the run: its sha256 differs from the manifest"
    ]


def test_resume_of_a_finished_run_does_nothing_again(run, tmp_path):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    before = (copy / "artifacts" / "quantized.onnxruntime.onnx").stat().st_mtime_ns
    done = shell("run", "--request", copy / "request.json", "--out", copy, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done in an earlier attempt") == 8
    assert (copy / "artifacts" / "quantized.onnxruntime.onnx").stat().st_mtime_ns == before
    assert compress.Report.from_file(copy / "report.json") == compress.Report.from_file(run[0] / "report.json")


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(run):
    refused = shell("run", "--model", "resnet18", "--out", run[0])
    assert refused.returncode == 1
    assert re.search(
        r"Error: The output folder .* is not empty \(it holds \S+\)\. Choose a new or empty folder, or add --resume\.",
        refused.stderr,
    )
