"""The baseline gate on the bundled, really trained checkpoint: right settings pass, wrong ones are recognised."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress import models
from compress.checkpoints import reader
from compress.data import dataset as data_dataset
from compress.data.batches import iter_batches, normalise
from compress.errors import BaselineError
from compress.preprocessing import Preprocessing
from compress.stages import gate

pytestmark = pytest.mark.integration

CHECKPOINT = data_dataset.ASSETS / "resnet18-fashion-mnist.safetensors"


@pytest.fixture(scope="module")
def facts() -> reader.Checkpoint:
    return reader.read_with_facts(CHECKPOINT)


@pytest.fixture(scope="module")
def model(facts) -> nn.Module:
    return models.load(models.recognise(facts.tensors, "resnet18"), facts.tensors)


def opened(facts: reader.Checkpoint, **changes: object) -> data_dataset.Dataset:
    recipe = replace(facts.preprocessing, **changes)
    return data_dataset.open_data("fashion-mnist", recipe, num_classes=10, class_names=facts.class_names)


@pytest.fixture(scope="module")
def dataset(facts) -> data_dataset.Dataset:
    return opened(facts)


def relabelled(dataset: data_dataset.Dataset, outputs: list[int], class_names: tuple[str, ...]) -> data_dataset.Dataset:
    """Label i becomes `outputs[i]`, as if the folders had been taken in another order."""
    moved = torch.tensor(outputs)
    return replace(dataset, train=replace(dataset.train, labels=moved[dataset.train.labels]), class_names=class_names)


def test_right_settings_pass_and_the_model_is_left_as_it_was(model, dataset):
    before, model_in_training = copy.deepcopy(model.state_dict()), model.train()
    started = time.perf_counter()

    checked = gate.gate(model_in_training, dataset, dataset.train.preprocessing, seed=0)

    assert checked.accuracy > 0.9 and checked.n_images == 512 and 0.1 <= checked.chance < 0.2
    assert {"--input-size 64", "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5"} <= {
        tried.flags for tried in checked.alternatives
    }
    assert all(
        tried.accuracy is None or tried.accuracy < tried.baseline_accuracy + 0.05 for tried in checked.alternatives
    )
    assert checked.as_dict()["alternatives"][0]["n_images"] >= 24
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert time.perf_counter() - started < 60


def test_a_wrong_input_size_is_found_with_both_figures(model, facts, short_run):
    wrongly = opened(facts, input_size=64)
    with pytest.raises(BaselineError) as refusal:
        gate.gate(model, wrongly, wrongly.train.preprocessing, seed=0)
    message = str(refusal.value)
    assert "with --input-size 32: add --input-size 32 to the request." in message
    asked, found = (float(word.rstrip("%")) for word in message.split() if word.endswith("%"))
    assert found > 90 > asked + 10


def test_a_wrong_normalisation_is_found(model, facts, short_run):
    wrongly = opened(facts, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    with pytest.raises(
        BaselineError, match=r"as requested, but (89|9\d).\d% with --mean [\d.,]+ --std [\d.,]+: add"
    ) as refusal:
        gate.gate(model, wrongly, wrongly.train.preprocessing, seed=0)
    assert "--input-size" not in str(refusal.value)


def test_a_wrong_size_and_normalisation_together_are_found(model, facts, short_run):
    wrongly = opened(facts, input_size=64, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    with pytest.raises(BaselineError, match=r"with --input-size 32 --mean [\d.,]+ --std"):
        gate.gate(model, wrongly, wrongly.train.preprocessing, seed=0)


def test_numbered_folders_in_the_order_of_text_are_found(model, dataset):
    """Classes 5 to 14: sorted as text, 10 to 14 come first, so what the model calls output 0 ("5") becomes output 5."""
    by_text = sorted(map(str, range(5, 15)))
    wrongly = relabelled(dataset, [by_text.index(str(number)) for number in range(5, 15)], tuple(by_text))
    with pytest.raises(
        BaselineError, match=r"another order: write \{\"10\": 5, \"11\": 6, \"12\": 7, ...\} to a JSON file"
    ):
        gate.gate(model, wrongly, dataset.train.preprocessing, seed=0)


def test_any_other_order_is_found_by_the_confusion_matrix(model, dataset):
    order = [3, 1, 2, 0, 4, 5, 7, 6, 8, 9]
    wrongly = relabelled(dataset, order, tuple("abcdefghij"))
    with pytest.raises(
        BaselineError, match=r"9\d.\d% if its classes are in another order: write \{\"a\": 3, \"d\": 0, \"g\": 7, ...\}"
    ):
        gate.gate(model, wrongly, dataset.train.preprocessing, seed=0)


def test_an_untrained_model_is_near_chance(dataset, short_run):
    torch.manual_seed(0)
    untrained = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(BaselineError, match=r"about what guessing gives \(1\d.\d%\), and no common input size"):
        gate.gate(untrained, dataset, dataset.train.preprocessing, seed=0)


def test_a_model_with_a_fixed_input_size_is_told_so(dataset):
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 10))
    with pytest.raises(BaselineError, match="does not take images of 32 pixels: give the --input-size"):
        gate.gate(fixed, dataset, dataset.train.preprocessing, seed=0)


def test_sizes_that_the_model_does_not_take_are_recorded_as_such(dataset):
    """A linear classifier on the pixels, fitted by least squares: works at 32, and at no other size."""
    pixels = normalise(dataset.train.pixels, dataset.train.preprocessing)[:6000, :1]
    targets = nn.functional.one_hot(dataset.train.labels[:6000], 10).float()
    inputs = nn.functional.avg_pool2d(pixels, 2).flatten(1)
    weights = torch.linalg.lstsq(inputs.T @ inputs + 10 * torch.eye(256), inputs.T @ targets).solution
    linear = nn.Linear(256, 10, bias=False)
    linear.weight = nn.Parameter(weights.T)
    fixed = nn.Sequential(OfKnownSize(), FirstChannel(), nn.AvgPool2d(2), nn.Flatten(), linear)

    checked = gate.gate(fixed, dataset, dataset.train.preprocessing, seed=0)

    assert checked.accuracy > 0.6
    assert {tried.flags for tried in checked.alternatives if tried.accuracy is None} >= {
        "--input-size 28",
        "--input-size 224",
    }


class OfKnownSize(nn.Module):
    """Raises what no layer of torch does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * {32: 1}[images.shape[2]]


class FewAtOnce(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return {1: images, 2: images}[len(images)].flatten(1)[:, :10]


def test_a_model_for_few_images_at_once_is_told_so(dataset):
    with pytest.raises(BaselineError, match=r"takes two images, but not a batch of 64 \(KeyError\): write its forward"):
        gate.gate(FewAtOnce(), dataset, dataset.train.preprocessing, seed=0)


class FirstChannel(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1]


def test_only_labelled_images_can_be_scored(model):
    nothing = data_dataset.open_data("none", Preprocessing(32, (0.5,) * 3, (0.5,) * 3), num_classes=10)
    with pytest.raises(BaselineError, match="only be scored on labelled images"):
        gate.gate(model, nothing, nothing.train.preprocessing, seed=0)


def test_a_difference_within_noise_is_not_called_clear():
    assert not gate._is_clear(gained=6, lost=0, n=512)
    assert not gate._is_clear(gained=60, lost=45, n=200)
    assert gate._is_clear(gained=40, lost=5, n=200)


# ---- the bundled files ----


def test_the_bundled_checkpoint_is_as_good_as_its_metadata_says_on_the_bundled_test_images(model, facts, dataset):
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(batch).argmax(1) == found).sum())
            for batch, found in iter_batches(
                dataset.test, 500, shuffle=False, seed=0, preprocessing=facts.preprocessing
            )
        )
    assert right / len(dataset.test) > 0.9
    assert facts.class_names == dataset.class_names


def test_the_assets_stay_small_and_name_source_and_licence():
    files = [path for path in Path(data_dataset.ASSETS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30 * 10**6
    text = (data_dataset.ASSETS / "README.md").read_text()
    assert "MIT" in text and "Zalando" in text and "scripts/make_demo_assets.py" in text
    assert np.isclose(CHECKPOINT.stat().st_size, 22.4e6, rtol=0.02)
