"""The inputs of a user's module: further arguments, and images of another size or number of channels."""

from __future__ import annotations

import pytest
import torch
from opening import IMAGES, answer, opened, refusal
from torch import fx, nn
from user_classifiers import (
    CLASSES,
    SIZE,
    Answering,
    ByPlace,
    Flagged,
    KeywordOnly,
    Net,
    SecondInput,
    Sized,
    TensorDefault,
    ThreeInputs,
    TwoInputs,
    trained_values,
)

from compress.own_modules import inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


@pytest.mark.parametrize("build", [Flagged, KeywordOnly, SecondInput, ByPlace, TensorDefault])
def test_a_forward_with_more_inputs_is_called_with_images_alone(build):
    net = trained_values(build())
    opening = opened(net)
    scale = 2.0 if build is TensorDefault else 1.0
    with torch.no_grad():
        assert torch.equal(answer(opening.model), net.head(net.features(IMAGES) * scale))


def test_the_defaults_that_are_used_are_said():
    text = (
        "forward is called with images alone; its other inputs keep their defaults: return_features=False, mask=None."
    )
    assert opened(Flagged()).notes == (text,) and opened(KeywordOnly()).notes == ()


def test_a_flag_does_not_stop_the_tracer():
    assert fx.symbolic_trace(opened(Flagged()).model)(IMAGES).shape == (3, CLASSES)


@pytest.mark.parametrize(("build", "names"), [(TwoInputs, "`meta`"), (ThreeInputs, "`age` and `sex`")])
def test_inputs_without_defaults_are_named(build, names):
    assert f"this one also needs {names}: give {names} a default value" in refusal(build())


class Viewed(Sized):
    """Makes more rows of larger images, and so raises nothing."""

    def forward(self, x):
        return self.head(self.conv(x).relu().view(-1, self.head.in_features))


class OneAtATime(Net):
    def forward(self, x):
        return super().forward(x.view(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Net(1), "it takes grey ones, of 1 channel: images are read as RGB"),
        (lambda: Net(4), "it takes 4 channels: images are read as RGB"),
        (lambda: Sized(28, 28, 1), "it takes grey ones, of 1 channel, of 28 pixels (input_size=28)"),
        (
            lambda: Sized(64, 64),
            "input_size: got 32, expected a size that the module takes: of 16 to 512 pixels it takes 64.",
        ),
        (
            lambda: Sized(32, 96),
            "height x width such as 32 x 96, 48 x 64, 64 x 48, 96 x 32. Let a module around it resize",
        ),
        (lambda: Sized(64, 128, 1), "and 1 channel. Let a module around it resize"),
        (
            lambda: Viewed(16, 16),
            "input_size: got 32, expected a size that the module takes: of 16 to 512 pixels it takes 16.",
        ),
        (OneAtATime, "it takes one at a time: write x.shape[0] in place of 1"),
    ],
)
def test_the_true_reason_why_images_do_not_fit(build, sentence):
    assert sentence in refusal(build())


@pytest.mark.parametrize(
    ("build", "around"),
    [
        (lambda: Net(1), lambda m, x: m(x.mean(1, keepdim=True))),
        (lambda: Sized(32, 96), lambda m, x: m(nn.functional.interpolate(x, (32, 96)))),
    ],
)
def test_the_forward_that_a_refusal_advises_works(build, around):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, x):
            return around(self.model, x)

    assert opened(Around()).num_classes == CLASSES


def raising(error: Exception) -> nn.Module:
    def pack(logits, features):
        raise error

    return Answering(pack)


@pytest.mark.parametrize(
    "error", [KeyError("mask"), AssertionError(), TypeError("no"), StopIteration(), RuntimeError("a\nb")]
)
def test_the_modules_own_error_is_named_with_its_line(error, monkeypatch):
    monkeypatch.setattr(inputs, "SIDES", (32, 96))  # the search for other sizes ends sooner
    text = refusal(raising(error))
    assert f"in pack (`raise error`) raises {type(error).__name__}" in text and "\n" not in text
    assert "and test_opening_inputs.py, line " in text
