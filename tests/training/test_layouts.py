"""Which memory layouts training takes, and what is said of models whose own code stops in training mode."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from places import ROOT, TESTS
from torch import nn
from user_modules_training import (
    CONTAINERS,
    Asserting,
    Auxiliary,
    Forgetful,
    Overwriting,
    PooledNorm,
    Reordering,
    Shortcut,
    Viewing,
    images,
)

from compress.errors import ModelError, TrainingError
from compress.models.calls import logits_of
from compress.training import WORTH_TRIALS, TrainingConfig, fit, memory_format
from compress.training.memory_format import PLAIN, Format, agree, allows_channels_last, fastest_format

pytestmark = pytest.mark.integration

CONFIG = TrainingConfig(1, 0.01, 0.5, 4.0)


def batches(epoch: int):
    for start in range(WORTH_TRIALS):
        yield images(8), torch.arange(8) % 4, torch.arange(8) + 8 * start


def train(model: nn.Module, **changes):
    return fit(model, batches, WORTH_TRIALS, CONFIG, teacher=model.eval(), **changes)


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        (Shortcut(), False),
        (Shortcut(functional=True), False),
        (Shortcut(stride=3), False),
        (Shortcut(stride=(1, 2)), False),
        (Shortcut(channels=7), False),
        (Shortcut(channels=8), True),
        (Shortcut(channels=16, groups=4), False),
        (Shortcut(stride=1), True),
    ],
    ids=["plain", "functional", "stride 3", "stride 1x2", "7 channels", "8 channels", "groups", "stride 1"],
)
def test_channels_last_never_meets_a_1x1_convolution_with_a_stride_and_few_channels(model, allowed):
    assert allows_channels_last(model.train(), images()) is allowed


def test_a_model_with_such_a_convolution_trains_with_right_gradients():
    """In a process of its own, as the heap is corrupted where the layout is taken."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import torch; torch.set_num_threads(1)\n"
        "from test_layouts import train; from user_modules_training import Shortcut\n"
        "assert all(torch.isfinite(p).all() for m in [Shortcut()] if train(m) for p in m.parameters())"
    )
    subprocess.run(
        [sys.executable, "-c", script, *(str(TESTS / folder) for folder in ("networks", "helpers", "training"))],
        check=True,
        timeout=90,
        cwd=ROOT,
    )


def test_a_model_that_reorders_its_tensors_itself_is_refused_before_harm():
    with pytest.raises(TrainingError, match=r"brings 3 channels into the channels_last order .* call \.contiguous\(\)"):
        train(Reordering())


def test_a_layout_that_stops_the_model_is_not_taken():
    assert fastest_format(Viewing(), images()) == PLAIN
    assert train(Viewing())[0]["train_loss"] > 0


def test_few_steps_are_not_worth_trials(monkeypatch):
    tried = []
    monkeypatch.setattr("compress.training.loop.fastest_format", lambda model, images: tried.append(model) or PLAIN)
    for steps in (WORTH_TRIALS - 1, WORTH_TRIALS):
        fit(Viewing(), batches, steps, CONFIG)
    assert len(tried) == 1


def test_a_fast_layout_with_other_gradients_is_not_taken(monkeypatch):
    """The quickest by far, and wrong in one parameter."""
    real = memory_format._Trial.gradients

    def wrong(trial, batch):
        found = real(trial, batch)
        trial.time = lambda batch: setattr(trial, "seconds", 0.0 if trial.layout.channels_last else 1.0)
        return {name: gradient * (1.5 if trial.layout.channels_last else 1) for name, gradient in found.items()}

    model = Shortcut(channels=16)
    monkeypatch.setattr(memory_format._Trial, "gradients", wrong)
    assert fastest_format(model, images()) == PLAIN
    monkeypatch.setattr(memory_format, "TOLERANCE", 1.0)
    monkeypatch.setattr(memory_format, "_has_fast_bfloat16", lambda place: False)
    assert fastest_format(model, images()) == Format(True, None)


def test_gradients_agree_by_their_size_and_not_by_rounding_errors():
    expected = {"weight": torch.ones(10), "bias": torch.full((2,), 1e-9)}
    assert agree(expected, {"weight": torch.full((10,), 1.001), "bias": torch.zeros(2)}, 0.01)
    assert not agree(expected, {"weight": torch.full((10,), 1.1), "bias": torch.zeros(2)}, 0.01)
    assert not agree(expected, {"weight": torch.full((10,), float("nan")), "bias": torch.zeros(2)}, 0.01)
    assert not agree(expected, {"weight": torch.ones(10)}, 0.01)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_main_head_is_trained_whatever_container_it_comes_in(container):
    torch.manual_seed(0)
    model = Auxiliary(container)
    before = model.extra.weight.clone(), model.head.weight.clone()
    train(model)
    assert torch.equal(model.extra.weight, before[0]) and not torch.equal(model.head.weight, before[1])


def test_logits_are_told_from_features_by_their_number():
    features, scores = torch.zeros(2, 9), torch.zeros(2, 4)
    assert logits_of((features, scores), 4) is scores
    assert logits_of((features, scores)) is features
    with pytest.raises(ModelError, match=r"answers with a tuple of tensors of shape \[2, 9\], .*\[images, 4\]"):
        logits_of((features,), 4)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Asserting(),
            r"stops in training mode, with 8 images of 32 x 32 pixels: user_modules_training.py, line \d+, in forward "
            r"\(`assert len\(x\) % 5 == 0, .*`\) raises AssertionError: batches must be multiples of 5. Call it",
        ),
        (
            Overwriting(),
            r"The model stops in training mode, .*: RuntimeError: one of the variables needed for gradient",
        ),
        (Forgetful(), r"answers with a dict of tensors of shape \[8, 8, 28, 28\], where scores of shape \[images, "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_models_own_code_raises_is_one_sentence_with_its_line(model, sentence):
    with pytest.raises(ModelError, match=sentence):
        train(model)


def test_a_batchnorm_of_one_value_says_which_and_what_to_do():
    def single(epoch):
        yield images(1), torch.zeros(1, dtype=torch.int64)

    with pytest.raises(
        ModelError, match="^The BatchNorm2d norm gets one value per channel .* raise --train-batch-size"
    ):
        fit(PooledNorm(), single, 1, CONFIG)


def test_memory_that_runs_out_in_a_trial_is_no_fault_of_the_model():
    class Greedy(Viewing):
        def forward(self, x):
            if self.training:
                torch.empty(1 << 62, dtype=torch.uint8)
            return super().forward(x)

    with pytest.raises(RuntimeError, match="allocate memory") as failed:
        train(Greedy())
    assert not isinstance(failed.value, ModelError)
