"""NNI looks at a few groups at a time, and chooses as if it saw them all."""

import pytest
import torch
from pruning_networks import Grouped, randomise
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from compress.pruning import plan
from compress.pruning.nni import backend


def networks() -> dict[str, tuple[nn.Module, int]]:
    return {
        "grouped": (Grouped(), 24),
        "vit": (VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), 32),
    }


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("pruner", ["L1NormPruner", "FPGMPruner"])
def test_portions_change_no_choice(name, pruner, monkeypatch):
    model, size = networks()[name]
    randomise(model)
    found = plan(model, torch.zeros(1, 3, size, size), sparsity=0.5)
    whole = backend.kept_channels(model, found, pruner)
    monkeypatch.setattr(backend, "_WEIGHTS_AT_ONCE", 1)
    assert len(list(backend._portions(model, found))) == len(found.groups) > 1
    parts = backend.kept_channels(model, found, pruner)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[layer], whole[layer]) for layer in whole)


def test_a_portion_holds_whole_groups_up_to_its_size(monkeypatch):
    model = models.resnet18(num_classes=10)
    found = plan(model, torch.zeros(1, 3, 32, 32), sparsity=0.5)
    monkeypatch.setattr(backend, "_WEIGHTS_AT_ONCE", 3_000_000)
    parts = list(backend._portions(model, found))
    assert [group for part in parts for group in part.groups] == list(found.groups)
    for part in parts:
        weights = sum(model.get_submodule(layer).weight.numel() for layer in part.layers)
        assert weights <= 3_000_000 or len(part.groups) == 1
