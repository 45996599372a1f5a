"""The analysis of shared channels: the worked example at the head of compress/pruning/channels.py, number by number."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from compress.pruning import plan, prune
from compress.pruning.channels import analyse
from compress.pruning.graph.axes import Axis, Part

IMAGES = torch.zeros(1, 3, 16, 16)


class TwoConvolutions(nn.Module):
    """The example; the pooling and the Linear make logits of it."""

    def __init__(self, outputs: int = 128, *, adds: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.fc = nn.Conv2d(64, outputs, 3, padding=1), nn.Linear(outputs, 10)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        z = self.conv2(y) + y if self.adds else self.conv2(y)
        return self.fc(z.mean((2, 3)))


def axis_of(model: nn.Module, name: str, images: Tensor = IMAGES) -> Axis | None:
    channels = analyse(model, images)
    return next(axis for node, axis in channels.axes.items() if node.op == "call_module" and node.target == name)


def test_a_result_carries_the_set_of_its_layer_along_dimension_one():
    first = axis_of(TwoConvolutions(), "conv1")
    assert first is not None and (first.dim, [part.channels for part in first.parts]) == (1, [64])
    assert axis_of(TwoConvolutions(), "norm1") == first
    second = axis_of(TwoConvolutions(), "conv2")
    assert second is not None and [part.channels for part in second.parts] == [128]
    assert second.parts[0].set_id != first.parts[0].set_id


def test_every_tensor_with_a_dimension_for_the_set_loses_it():
    torch.manual_seed(0)
    model = TwoConvolutions().eval()
    chosen = plan(model, IMAGES, sparsity=0.5, exclude=["conv2"])
    shapes = {
        name: list(tensor.shape) for name, tensor in prune(model, IMAGES, chosen, "l1-norm").model.state_dict().items()
    }
    assert shapes["conv1.weight"] == [32, 3, 3, 3] and shapes["conv1.bias"] == [32]
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert shapes[f"norm1.{key}"] == [32]
    assert shapes["conv2.weight"] == [128, 32, 3, 3] and shapes["conv2.bias"] == [128]
    assert shapes["fc.weight"] == [10, 128]


def test_an_addition_joins_the_sets_of_its_operands():
    channels = analyse(TwoConvolutions(64, adds=True), IMAGES)
    first, second = (channels.sets.root(channels.own_set[name]) for name in ("conv1", "conv2"))
    assert first == second and channels.sets[first].layers == ["conv1", "conv2"]
    assert channels.sets[first].reasons == ["their outputs are added"]


def test_a_flattened_channel_takes_as_many_features_as_its_map_has_positions():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2), nn.Flatten(), nn.Linear(64 * 49, 10))
    assert axis_of(model, "1") == Axis(1, (Part(axis_of(model, "0").parts[0].set_id, 64, Fraction(49)),))
