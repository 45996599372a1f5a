"""Pruning a model in a test, and what has to hold of the result and of the model that it was made from."""

from __future__ import annotations

import torch
from pruning_networks import training
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from compress.models.attention import heads_of, is_attention
from compress.pruning import plan, prune, speedup

torch.set_num_threads(1)


def images(size: int = 48, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def shrunk(model: nn.Module, size: int = 48, pruner: str = "l1-norm", sparsity: float = 0.5):
    example = images(size)
    return prune(model, example, plan(model, example, sparsity=sparsity), pruner, training(size))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def assert_as_planned(model: nn.Module, result) -> None:
    """Sizes, attributes and tensor names: what the rebuild recipe and a checkpoint read."""
    assert type(result.model) is type(model)
    assert list(result.model.state_dict()) == list(model.state_dict())
    for layer, group in result.plan.layers.items():
        module = result.model.get_submodule(layer)
        channels = heads_of(module).channels if is_attention(module) else module.weight.shape[0]
        assert channels == group.channels_after
    for module in result.model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.weight.shape[0] == module.running_mean.shape[0] == module.num_features


def small_resnet() -> nn.Module:
    return models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def break_one_weight(monkeypatch, layer: str) -> None:
    replace = speedup._replace

    def broken(name, module, functions, masks):
        replace(name, module, functions, masks)
        if name == layer:
            module.weight.data[0] += 0.05

    monkeypatch.setattr(speedup, "_replace", broken)
