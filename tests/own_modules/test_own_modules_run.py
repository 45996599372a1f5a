"""A module of the user's own with everything around it at once, from opening it to the deployed files and back."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations, prune
from user_classifiers import Net, trained_values

import compress
from compress import classify, pipeline
from compress.cli import text
from compress.errors import TrainingError
from compress.stages import preflight
from compress.workload import open_workload

pytestmark = pytest.mark.integration

REQUEST = compress.Request(
    model="custom", input_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, finetune_epochs=1, qat_epochs=1, train_batch_size=8,
    calibration_images=8, batch_size=4,
)  # fmt: skip


class Kitchen(Net):
    """A second input with a default, a dictionary as its answer, an auxiliary answer in training mode."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        features = self.features(pixel_values)
        answer = {"features": features, "logits": self.head(features)}
        return answer | {"aux": features.sum(1)} if self.training else answer


def as_people_have_it() -> nn.Module:
    torch.manual_seed(0)
    net = trained_values(Kitchen())
    parametrizations.weight_norm(net.conv1)
    prune.l1_unstructured(net.conv2, "weight", 0.25)
    net.conv2.register_forward_hook(lambda module, inputs, output: None)
    return nn.DataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net).double())


SAID = (
    "DataParallel around the module was taken off.",
    "The module has float64 tensors; everything is computed in float32.",
    "forward is called with images alone; its other inputs keep their defaults: labels=None.",
    "(WeightNorm of 1 tensor)",
    "The masks of torch.nn.utils.prune on 1 tensor",
    "2 SyncBatchNorm layers were turned into BatchNorm2d.",
    "The hooks of `conv2` were left out",
    "the logits are answer['logits']",
)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.usefixtures("short_run")
def test_from_opening_to_the_files_and_back(images, tmp_path):
    request, out = REQUEST.model_copy(update={"data": str(images)}), tmp_path / "run"
    report = compress.run(request, model=as_people_have_it(), out=out)
    notes = " ".join(report.notes)
    assert all(said in notes for said in SAID)
    assert {layer.name: layer.channels_after for layer in report.layers} == {"conv1": 16, "conv2": 16, "head": 4}
    assert all(hop.passed for hop in report.handoffs)

    (out / "manifest.json").unlink()
    (out / "stages" / "measure.json").unlink()
    assert (
        compress.run(request, model=as_people_have_it(), out=out, resume=True).notes[: len(SAID)]
        == report.notes[: len(SAID)]
    )

    loaded = compress.load(out, model=as_people_have_it())
    batch = torch.rand(2, 3, 16, 16)
    session = onnxruntime.InferenceSession(out / "artifacts" / "pruned.onnx")
    with torch.no_grad():
        assert np.allclose(session.run(None, {"images": batch.numpy()})[0], loaded(batch).numpy(), atol=1e-4)
    assert len(classify.classify(out, images / "0.png")["models"]) == 2


def test_check_says_what_was_done():
    found = pipeline.check(REQUEST.model_copy(update={"data": "none"}), model=nn.DataParallel(Kitchen()))
    assert found["possible"] and found["notes"][0] == SAID[0] and "the logits are answer['logits']" in found["notes"][2]
    assert f"Note: {SAID[0]}" in text.check(found)


class Unlearning(Net):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Inferring(Net):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("build", [Unlearning, Inferring])
def test_a_forward_without_gradients_is_refused_before_it_is_trained(build, images):
    request = REQUEST.model_copy(update={"data": str(images)})
    with pytest.raises(TrainingError, match="answers without gradients, so it cannot be trained: take torch.no_grad"):
        preflight.require_plan(request, open_workload(request, build()))
    resting = request.model_copy(update={"finetune_epochs": 0, "qat_epochs": 0})
    preflight.require_plan(resting, open_workload(resting, build()))
