"""What the check says is what the run does: networks of many kinds, each through both, up to the latencies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from image_files import fill
from pruning_networks import randomise
from torch import nn
from user_modules_training import (
    Asserting,
    Auxiliary,
    Forgetful,
    Overwriting,
    PooledNorm,
    Reordering,
    Shortcut,
    Viewing,
)

import compress
from compress import pipeline
from compress.engines import RUNTIMES
from compress.errors import CompressError
from compress.request import Request
from compress.stages.results import MeasureResult

pytestmark = pytest.mark.integration

FLOAT = {"quantizer": "none", "weight_bits": 32, "activation_bits": 32}
INTEGERS = {"quantizer": "qat", "calibration_images": 16}


def frozen() -> nn.Module:
    return Viewing().requires_grad_(False)


class Reached(Exception):
    """The run has come to the latencies."""


class Exploding(Viewing):
    """Answers with numbers while it is looked at, and with none while it trains."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (float("nan") if self.training else 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    fill(path, {"": 40})
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """One runtime, and no latencies."""

    def measure(*_: object) -> MeasureResult:
        raise Reached

    for name in [name for name in RUNTIMES if name != "onnxruntime"]:
        monkeypatch.delitem(RUNTIMES, name)
    monkeypatch.setattr("compress.pipeline.measure", measure)


def said_and_done(build: Callable[[], nn.Module], folder, out, **asked) -> tuple[list[str], list[str]]:
    """The problems that the check tells, and the sentence with which the run ends, if any."""
    fields = {"model": "custom", "data": str(folder), "input_size": 32, "train_batch_size": 8, "qat_epochs": 1}
    request = Request(**(fields | {"finetune_epochs": 1} | asked))
    torch.manual_seed(0)
    said = pipeline.check(request, model=randomise(build()))["problems"]
    torch.manual_seed(0)
    try:
        compress.run(request, model=randomise(build()), out=out)
    except Reached:
        return said, []
    except CompressError as error:
        return said, [str(error)]
    raise AssertionError("the run went past the latencies")


@pytest.mark.parametrize(
    ("build", "asked", "sentence"),
    [
        (lambda: Auxiliary("tuple"), INTEGERS, None),
        (Viewing, FLOAT, None),
        (Shortcut, FLOAT, None),
        (PooledNorm, FLOAT, None),
        (frozen, FLOAT, "Every parameter of the model is frozen."),
        (frozen, FLOAT | {"finetune_epochs": 0}, None),
        (
            Asserting,
            FLOAT,
            "The model's own code stops in training mode, with 8 images of 32 x 32 pixels: user_modules",
        ),
        (Overwriting, FLOAT, "The model stops in training mode, with 8 images of 32 x 32 pixels"),
        (Forgetful, FLOAT, "The model answers with a dict of tensors"),
        (Reordering, FLOAT, "The model brings 3 channels into the channels_last order"),
        (Exploding, FLOAT, "Training diverged: the loss became nan in epoch 1, step 1"),
        (Viewing, FLOAT | {"train_batch_size": 64}, "There are too few training images for one batch."),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_check_says_is_what_the_run_does(build, asked, sentence, folder, tmp_path):
    said, done = said_and_done(build, folder, tmp_path / "run", **asked)
    assert said == done
    assert done[:1] == [] if sentence is None else done[0].startswith(sentence)
