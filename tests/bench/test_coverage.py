"""The rows of docs/coverage.md: one model of each family is made here, the whole table by `make coverage`."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from bench import coverage, coverage_quantized, coverage_table, patterns
from compress.models import architectures

pytestmark = pytest.mark.integration

FAMILIES = ("convnext_tiny", "efficientnet_b0", "googlenet+aux", "shufflenet_v2_x0_5")
PLAINER_FAMILIES = ("alexnet", "mnasnet0_5", "regnet_y_400mf", "resnet18")
"""Built of operations that the four above have as well. The other families are shrunk at small size in
test_pruning_exact.py, but for VGG, which is built like AlexNet, and MaxViT, which takes only 224 pixels: too slow here;
transformers also lose heads and are rebuilt in test_attention.py."""


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in PLAINER_FAMILIES)]
)
def test_a_family_is_equal_reloads_without_nni_and_exports(name, tmp_path):
    row = coverage.measure(name, tmp_path)
    assert coverage_table.passes(row) == {"equal": True, "reloaded": True, "exported": True, "quantized": False}
    assert row["parameters_kept"] < 0.8 and row["macs_kept"] < 0.9
    assert row["model"] == name and row["peak_bytes"] > 0 and row["seconds"] > 0


def test_every_classifier_has_a_row_and_auxiliary_heads_have_their_own():
    assert set(coverage.names()) == {*architectures.names(), "googlenet+aux", "inception_v3+aux"}
    assert coverage.subject("googlenet+aux").architecture.kwargs["aux_logits"] is True
    assert {name for name in coverage.names() if coverage.subject(name).architecture is None} == set(coverage.REDUCED)


def transformer() -> VisionTransformer:
    return VisionTransformer(56, 14, 2, 4, 64, 128, num_classes=10)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_h_14"])
def test_a_family_is_quantized_and_every_layer_runs_on_integers(name, tmp_path, monkeypatch):
    """Squeeze-excitation and Hardswish, concatenation and shuffled channels, attention."""
    monkeypatch.setitem(coverage.REDUCED, "vit_h_14", ("a small one", transformer))
    monkeypatch.setattr(patterns, "STEPS", 40)
    found = coverage_quantized.measure(name, tmp_path)
    assert all(coverage_table.passes(row(name, quantized=found)).values())
    assert set(found["files"]) == {"tensorrt", "onnxruntime"}
    kernels = {"onnxruntime": found["files"]["onnxruntime"], **found["runtimes"]}
    for runtime, facts in kernels.items():
        assert (facts["integer"], facts["candidates"], facts["float"]) == (found["layers"], found["layers"], []), (
            runtime
        )
    kinds = {kind for kind, _, _ in found["left_float"]}
    assert kinds == ({"PrunedMultiheadAttention", "LayerNorm", "Parameter"} if name == "vit_h_14" else set())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_the_patterns_are_learnt_with_and_without_norms(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2), norm(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), norm(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    patterns.learn(model, 24)
    images, labels = patterns.images(256, 24, seed=5000)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
    assert not model.training


def test_new_images_of_the_same_patterns():
    (one, labels), (other, _) = (patterns.images(64, 24, seed=seed) for seed in (1, 2))
    assert one.shape == (64, 3, 24, 24) and not torch.equal(one, other)
    assert torch.equal(one, patterns.images(64, 24, seed=1)[0]) and set(labels.tolist()) == set(range(10))


def row(name: str, **changed) -> coverage.Row:
    return {
        "model": name, "reduced": None, "input_size": 64, "relative_difference": 1e-7, "parameters": 2_000_000,
        "parameters_kept": 0.25, "macs_kept": 0.3, "reload_difference": 0.0, "onnx_relative_difference": 1e-7,
        "seconds": 1.0, "peak_bytes": 10**9, "layers": 21, "left_out": [["fc", "gives the answer: its outputs are x"]],
    } | changed  # fmt: skip


def quantized(**changed) -> coverage.Row:
    kernels = {"integer": 21, "candidates": 21, "float": []}
    return {
        "images": 256, "right": {"float": 1.0, "fake_quantized": 0.99}, "layers": 21,
        "files": {"tensorrt": {"top1": 1.0, "relative_rms": 0.001, "integer": 0, "candidates": 21, "float": ["a"] * 21},
                  "onnxruntime": {"top1": 0.995, "relative_rms": 0.002, **kernels}},
        "runtimes": {"openvino": {"top1": 0.9, "relative_rms": 0.04, **kernels}, "tensorrt-rtx": kernels},
        "left_float": [["LayerNorm", "needs floating point", 5]],
    } | changed  # fmt: skip


def test_the_total_counts_what_passes_and_a_crash_is_a_row():
    rows = [row("a"), row("b", relative_difference=2e-4, reduced="2 of 32 blocks"), {"model": "c", "error": "killed"}]
    rows[1]["quantized"] = quantized()
    text = coverage_table.table(rows, {"torch": "2"}, "make it")
    assert "**3 rows: 1 equal, 2 reloaded, 2 exported, 1 quantized.**" in text
    assert (
        "| a | 1.0e-07 | 25.0% of 2.0 M | 30.0% | equal | 1.0e-07 | 1.0 | 1.00 GB | 1 of 21: 1 gives the answer |"
        in text
    )
    assert (
        "| b (2 of 32 blocks) |" in text
        and "| c | **failed** |" in text
        and text.endswith("by `make it` with torch 2.\n")
    )


def test_a_quantized_row_says_how_near_where_on_integers_and_what_stays_float():
    assert coverage_table.quantized_line(row("a", quantized=quantized())) == (
        "| a | 100.0% → 99.0% | 100.0%, 0.1% | 99.5%, 0.2% | 21/21 | 21/21 (**90.0%, 4.0%**) | 21/21 | 5 LayerNorm |"
    )
    text = coverage_table.table([row("a", quantized=quantized())], {"torch": "2"}, "make it")
    assert "- LayerNorm: needs floating point." in text


def test_what_a_runtime_refuses_or_leaves_float_is_told():
    found = quantized(left_float=[])
    found["runtimes"] = {
        "openvino": {"top1": 1.0, "relative_rms": 0.0, "integer": 17, "candidates": 21, "float": list("abcd")},
        "tensorrt-rtx": {"error": "cannot | read it"},
    }
    line = coverage_table.quantized_line(row("a", quantized=found))
    assert "| **refused**: cannot / read it | OpenVINO: a, b, c and 1 more |" in line
    failed = row("a", quantized={"error": "killed"})
    assert coverage_table.quantized_line(failed) == "| a | **failed** |  |  |  |  |  | killed |"
    assert not coverage_table.passes(failed)["quantized"]


def test_a_file_that_answers_otherwise_does_not_pass():
    found = quantized()
    found["files"]["tensorrt"] |= {"top1": 0.97, "relative_rms": 0.03}
    assert not coverage_table.passes(row("a", quantized=found))["quantized"]
    found["files"]["tensorrt"] |= {"relative_rms": 0.01}
    assert coverage_table.passes(row("a", quantized=found))["quantized"]


def test_finished_parts_are_kept_and_failed_ones_are_made_again(tmp_path, monkeypatch, capsys):
    made, failing = [], {("vgg11", "bench.coverage"), ("resnet18", "bench.coverage_quantized")}

    def process(name, module):
        made.append((name, module))
        if (name, module) in failing:
            return {"model": name, "error": "killed"}
        return row(name) if module == "bench.coverage" else quantized()

    monkeypatch.setattr(coverage, "_in_a_process", process)
    words = ["coverage", "resnet18", "vgg11", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        coverage.main()
    rows, parts = ("resnet18", "vgg11"), ("bench.coverage", "bench.coverage_quantized")
    assert made == [("resnet18", parts[0]), ("resnet18", parts[1]), ("vgg11", parts[0])]
    made.clear()
    failing.clear()
    coverage.main()
    assert made == [("resnet18", parts[1]), ("vgg11", parts[0]), ("vgg11", parts[1])]
    made.clear()
    coverage.main()
    assert made == []
    monkeypatch.setattr("sys.argv", [*words, "--again"])
    coverage.main()
    assert made == [(name, part) for name in rows for part in parts]
    kept = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    assert [one["model"] for one in kept] == list(rows) and all(one["quantized"] == quantized() for one in kept)
    capsys.readouterr()


@pytest.mark.parametrize("module", ["bench.coverage", "bench.coverage_quantized"])
def test_a_process_that_fails_says_why(module):
    assert "Error" in coverage._in_a_process("no_such_model", module)["error"]
