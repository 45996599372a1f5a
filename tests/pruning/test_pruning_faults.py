"""Faults while pruning: a pruned model that differs or does not run, NNI failing, and a plan of another model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from exact_pruning import break_one_weight, images, is_unchanged, shrunk, small_resnet, state
from pruning_networks import Grouped, randomise
from torch import nn
from torchvision import models

from compress.errors import HandoffError, PruningError, RequestError
from compress.pruning import plan, prune, speedup
from compress.pruning.interface import Group, Plan
from compress.pruning.nni import backend

torch.set_num_threads(1)


def _harmless(model: nn.Module, call) -> None:
    """Run `call`, which fails, and check that model, modes and random generators are bit by bit what they were."""
    model.train()
    before, flags = state(model), [parameter.requires_grad for parameter in model.parameters()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    call()
    assert is_unchanged(model, before) and all(module.training for module in model.modules())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(generators[0], torch.get_rng_state()) and random.getstate() == generators[2]
    assert np.array_equal(generators[1], np.random.get_state()[1])


_DIFFERS = (
    r"differ from the masked model's by \S+ where their scale is \S+; \S+ is allowed\. The first layer that differs is "
    r"layer3\.0\.conv1, which is .*; exclude .*layer3\.0\.conv1.* to go on"
)


def test_a_shrunk_model_that_differs_is_refused_with_both_numbers_and_the_layer(monkeypatch):
    model = randomise(small_resnet())
    break_one_weight(monkeypatch, "layer3.0.conv1")

    def call():
        with pytest.raises(HandoffError, match=_DIFFERS):
            shrunk(model)

    _harmless(model, call)


def test_a_shrunk_model_that_does_not_run_names_the_layer(monkeypatch):
    replace = speedup._replace

    def broken(name, module, functions, masks):
        replace(name, module, functions, masks)
        if name == "layer3.0.conv1":
            module.weight = nn.Parameter(module.weight[:, 1:])

    monkeypatch.setattr(speedup, "_replace", broken)
    with pytest.raises(HandoffError) as caught:
        shrunk(randomise(small_resnet()))
    assert str(caught.value).startswith(
        "The pruned model does not run. The first layer that differs is layer3.0.conv1, "
    )
    assert "exclude layer2.0.conv2, layer2.0.downsample.0, " in str(caught.value)
    assert "size" not in str(caught.value)  # torch's own words go to the log


def test_a_failure_inside_nni_harms_nothing_and_is_explained(monkeypatch):
    model = randomise(Grouped())

    def fails(name, module, functions, masks):
        raise ValueError("no room")

    monkeypatch.setattr(speedup, "_replace", fails)

    def call():
        with pytest.raises(
            PruningError, match=r"stem\.0, a Conv2d, cannot be made smaller as planned.*exclude=stem\.0"
        ):
            shrunk(model, size=28)

    _harmless(model, call)


def test_a_module_that_nni_cannot_replace_is_an_error():
    with pytest.raises(
        PruningError, match=r"features\.3, a Bilinear, cannot be made smaller\. Keep the layers before it"
    ):
        speedup._replace("features.3", nn.Bilinear(2, 2, 2), {}, (None, None, None))


def test_a_plan_of_another_model_is_refused():
    other = plan(models.resnet50(), images(), sparsity=0.5)
    with pytest.raises(
        PruningError,
        match="The plan was made for another model: it expects 256 output channels in "
        r"layer1\.0\.conv3 and finds no such layer",
    ):
        prune(models.resnet18(), images(), other, "l1-norm")


def test_an_impossible_count_is_noticed_after_the_run():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten())
    impossible = Plan((Group(("0",), 32, 20, "no other layer shares its channels", unit=8),), ())
    with pytest.raises(PruningError, match=r"The pruner keeps \d+ of 32 channels in 0 where 20 were planned"):
        backend.kept_channels(model, impossible, "L1NormPruner")


def test_an_unknown_pruner_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="pruner: got 'magic', expected one of l1-norm, l2-norm, fpgm, taylor"):
        prune(Grouped(), images(28), Plan((), ()), "magic")
