"""The prepared graph: the same answers, and a point on every tensor that integer kernels exchange."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_networks import randomise
from quantization_networks import SIZE, Mixed, answers, images
from torch import Tensor, nn
from torchvision import models

from compress.errors import QuantizationError
from compress.quantization import left_float, prepare, quantization_points, quantized_layers

FAMILIES = (
    "densenet121", "efficientnet_b0", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5",
    "squeezenet1_1", "convnext_tiny",
)  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return randomise(models.get_model(name, num_classes=10, **extra)).eval()


def point_after(prepared, source: str):
    return next(point for point in quantization_points(prepared).values() if point.source == source)


def test_answers_stay_and_the_input_model_is_untouched():
    model = randomise(Mixed()).train()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = images(8, seed=5)[0]
    torch.testing.assert_close(answers(prepared, batch), answers(model.eval(), batch), rtol=1e-4, atol=1e-5)
    kinds = {type(module) for module in prepared.modules()}
    assert nn.BatchNorm2d not in kinds and nn.Dropout not in kinds


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_answers(name):
    model = build(name)
    prepared = prepare(model)
    batch = torch.randn(2, 3, 64, 64)
    expected = answers(model, batch)
    torch.testing.assert_close(answers(prepared, batch), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert quantized_layers(prepared)


def test_resnet18_has_a_point_for_each_tensor():
    prepared = prepare(models.resnet18())
    points = quantization_points(prepared)
    # image, 17 ReLUs, 8 + 3 convolutions that end in an addition without ReLU, and the pooled features
    assert len(points) == 30
    assert sum(point.non_negative for point in points.values()) == 18
    assert len(quantized_layers(prepared)) == 21
    assert left_float(prepared) == []


def test_one_input_of_each_addition_is_left_to_tensorrt_to_fuse():
    prepared = prepare(models.resnet18())
    fused = {point.source for point in quantization_points(prepared).values() if point.only_onnxruntime}
    assert len(fused) == 8
    assert {"layer2.0.conv2", "layer2.0.downsample.0"} & fused != {"layer2.0.conv2", "layer2.0.downsample.0"}


def test_a_shared_relu_gets_a_point_for_each_of_its_calls():
    prepared = prepare(randomise(Mixed()))
    shared = [point for point in quantization_points(prepared).values() if point.source == "relu"]
    assert len(shared) == 3 and all(point.non_negative for point in shared)
    assert not point_after(prepared, "conv2").non_negative


def test_only_a_quantized_concatenation_shares_its_scale():
    groups = {point.scale_group for point in quantization_points(prepare(Mixed())).values()} - {""}
    assert len(groups) == 1
    # DenseNet normalises what it concatenates, and normalisation is float: nothing there has to share.
    dense = quantization_points(prepare(build("densenet121"))).values()
    assert {point.scale_group for point in dense} == {""}


def test_what_only_moves_integers_keeps_their_scale():
    prepared = prepare(build("shufflenet_v2_x0_5"))
    points = quantization_points(prepared)
    moved = [node for node in prepared.graph.nodes if str(node.target) in points and "getitem" in str(node.target)]
    joined = [point for name, point in points.items() if name.startswith("q_cat")]
    assert len(moved) == 26 and len({point.scale_group for point in joined}) == 3
    assert {points[str(node.target)].scale_group for node in moved} <= {point.scale_group for point in joined}


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, stride=8)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_parts_that_stay_float_are_listed_with_their_reason():
    prepared = prepare(WithAttention())
    reasons = {row["layer"]: row["reason"] for row in left_float(prepared)}
    assert set(reasons) == {"norm", "attention"}
    assert "statistics from each image" in reasons["norm"] and "attention multiplies" in reasons["attention"]
    assert quantized_layers(prepared) == ("patch", "attention.in_proj", "attention.out_proj", "head")
    additions = [node for node in prepared.graph.nodes if node.name == "add"]
    assert str(additions[0].args[1].target) == "attention.out_proj", (
        "no integer kernel reads the sum, so it stays float"
    )


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_or_has_no_layers_is_refused():
    with pytest.raises(
        QuantizationError,
        match="Branching cannot be traced: its forward pass chooses its way by the values of its input",
    ):
        prepare(Branching())
    with pytest.raises(QuantizationError, match="Sequential has no Conv2d or Linear layer"):
        prepare(nn.Sequential(nn.ReLU()))


def test_a_batchnorm_that_follows_no_layer_stays_and_says_so():
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, SIZE), nn.Flatten()))
    reasons = [row["reason"] for row in left_float(prepare(model))]
    assert len(reasons) == 1 and "does not follow a convolution" in reasons[0]
