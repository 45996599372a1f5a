"""The rows of docs/coverage.md: one model of each family is made here, the whole table by `make coverage`."""

from __future__ import annotations

import json

import pytest

from bench import coverage
from compress import catalog

FAMILIES = (
    "alexnet", "convnext_tiny", "efficientnet_b0", "googlenet+aux", "mnasnet0_5", "regnet_y_400mf", "resnet18",
    "shufflenet_v2_x0_5",
)  # fmt: skip
"""The other families are shrunk at small size in test_pruning_exact.py, but for VGG, which is built like AlexNet, and
MaxViT, which takes only 224 pixels: too slow here; transformers also lose heads and are rebuilt in test_attention.py."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_equal_reloads_without_nni_and_exports(name, tmp_path):
    row = coverage.measure(name, tmp_path)
    assert coverage.passes(row) == {"equal": True, "reloaded": True, "exported": True}
    assert row["parameters_kept"] < 0.8 and row["macs_kept"] < 0.9
    assert row["model"] == name and row["peak_bytes"] > 0 and row["seconds"] > 0


def test_every_classifier_has_a_row_and_auxiliary_heads_have_their_own():
    assert set(coverage.names()) == {*catalog.names(), "googlenet+aux", "inception_v3+aux"}
    assert coverage.subject("googlenet+aux").architecture.kwargs["aux_logits"] is True
    assert {name for name in coverage.names() if coverage.subject(name).architecture is None} == set(coverage.REDUCED)


def row(name: str, **changed) -> coverage.Row:
    return {
        "model": name, "reduced": None, "input_size": 64, "relative_difference": 1e-7, "parameters": 2_000_000,
        "parameters_kept": 0.25, "macs_kept": 0.3, "reload_difference": 0.0, "onnx_relative_difference": 1e-7,
        "seconds": 1.0, "peak_bytes": 10**9, "layers": 21, "left_out": [["fc", "gives the answer: its outputs are x"]],
    } | changed  # fmt: skip


def test_the_total_counts_what_passes_and_a_crash_is_a_row():
    rows = [row("a"), row("b", relative_difference=2e-4, reduced="2 of 32 blocks"), {"model": "c", "error": "killed"}]
    text = coverage.table(rows, {"torch": "2"}, "make it")
    assert "**3 rows: 1 equal, 2 reloaded, 2 exported.**" in text
    assert (
        "| a | 1.0e-07 | 25.0% of 2.0 M | 30.0% | equal | 1.0e-07 | 1.0 | 1.00 GB | 1 of 21: 1 gives the answer |"
        in text
    )
    assert (
        "| b (2 of 32 blocks) |" in text
        and "| c | **failed** |" in text
        and text.endswith("by `make it` with torch 2.\n")
    )


def test_a_finished_row_is_kept_and_a_failed_one_is_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def process(name):
        made.append(name)
        return row(name) if len(made) != 2 else {"model": name, "error": "killed"}

    monkeypatch.setattr(coverage, "_in_a_process", process)
    words = ["coverage", "resnet18", "vgg11", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        coverage.main()
    coverage.main()
    assert made == ["resnet18", "vgg11", "vgg11"]
    monkeypatch.setattr("sys.argv", [*words, "--again"])
    coverage.main()
    assert made[3:] == ["resnet18", "vgg11"]
    assert [one["model"] for one in json.loads((tmp_path / "coverage.json").read_text())["rows"]] == [
        "resnet18",
        "vgg11",
    ]
    capsys.readouterr()


def test_a_process_that_fails_says_why():
    assert "Error" in coverage._in_a_process("no_such_model")["error"]
