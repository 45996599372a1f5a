"""What the check says of each layer after a dry run on a tiny network, and what it calls impossible."""

from __future__ import annotations

import pytest
import torch
from image_files import fill
from pruning_networks import conv_bn, randomise
from torch import nn

from compress import pipeline
from compress.errors import HandoffError, TrainingError
from compress.request import Request
from compress.stages import dry_run, preflight
from compress.workload import open_workload

pytestmark = pytest.mark.integration


class Odd(nn.Module):
    """A convolution that shrinks, one whose channels are averaged and so is not pruned, and the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.held = conv_bn(3, 32), nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.held(self.free(x))
        return self.head((held * held.mean(1, keepdim=True)).mean((2, 3)))


def check(**asked):
    torch.manual_seed(0)
    request = Request(**({"model": "custom", "data": "none", "input_size": 32} | asked))
    return pipeline.check(request, model=randomise(Odd()))


@pytest.fixture(scope="module")
def found():
    return check()


def test_each_layer_has_a_line_of_its_level(found):
    lines = {line["module"]: (line["level"], line["text"]) for line in found["modules"]}
    assert lines["free.0"] == ("green", "32 to 16 channels, integers")
    level, text = lines["held"]
    assert level == "amber" and text.startswith(
        "not pruned: its channels go through mean() in forward (test_rehearsal.py, line "
    )
    assert lines["head"] == ("amber", "not pruned: it gives the answer: its outputs are the classes")
    assert found["possible"] and not found["problems"]


def test_each_runtime_was_tried(found):
    texts = {row["runtime"]: row["text"] for row in found["runtimes"]}
    assert texts["onnxruntime"] == "runs here; 3 of 3 layers on integers"


def test_a_runtime_that_no_file_is_for_is_left_out_with_the_reason():
    texts = {row["runtime"]: row["text"] for row in check(quantizer="lsq-plus")["runtimes"]}
    assert texts["tensorrt-rtx"].startswith("left out: TensorRT reads 8-bit integers whose zero is code 0")
    assert texts["onnxruntime"] == "runs here; 3 of 3 layers on integers"


@pytest.mark.parametrize(
    ("asked", "module", "sentence"),
    [
        ({"layer_sparsity": "head=0.5"}, "head", "layer_sparsity: got 'head', expected a layer that can be pruned"),
        ({"exclude": ["hed"]}, "custom", "exclude: got 'hed', expected the name of a Conv2d or Linear layer"),
    ],
)
def test_what_is_impossible_is_a_red_line(asked, module, sentence):
    found = check(**asked)
    assert not found["possible"] and found["problems"][0].startswith(sentence)
    assert [(line["module"], line["level"]) for line in found["modules"]] == [(module, "red")]


def test_a_runtime_that_refuses_is_a_problem_only_when_it_was_asked_for(monkeypatch):
    def refuse(*args):
        raise HandoffError("ONNX Runtime cannot load it.")

    monkeypatch.setattr(type(dry_run.RUNTIMES["onnxruntime"]), "build", refuse)
    asked = {"quantizer": "none", "weight_bits": 32, "activation_bits": 32}
    assert check(**asked)["possible"]
    assert check(**asked, runtime="onnxruntime")["problems"] == ["ONNX Runtime cannot load it."]


@pytest.mark.parametrize(
    ("frozen", "asked", "sentence"),
    [
        (True, {}, "Every parameter of the model is frozen. Unfreeze some, or set --finetune-epochs and"),
        (True, {"finetune_epochs": 0, "qat_epochs": 0}, None),
        (False, {"train_batch_size": 64}, "There are too few training images for one batch."),
        (
            False,
            {"pruner": "taylor", "finetune_epochs": 0, "qat_epochs": 0, "train_batch_size": 64},
            "There are too few",
        ),
    ],
)
def test_what_training_would_stop_on_is_a_problem_before_anything_is_spent(tmp_path, frozen, asked, sentence):
    fill(tmp_path, {"": 24})
    model = randomise(Odd()).requires_grad_(not frozen)
    request = Request(**({"model": "custom", "data": str(tmp_path), "input_size": 32, "train_batch_size": 8} | asked))
    if sentence is None:
        preflight.require_plan(request, open_workload(request, model))
        return
    with pytest.raises(TrainingError, match=f"^{sentence}"):
        preflight.require_plan(request, open_workload(request, model))
    assert any(problem.startswith(sentence) for problem in pipeline.check(request, model=model)["problems"])
