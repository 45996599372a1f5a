"""Attention is quantized by its projections: the same answers, and integer weights where a Linear layer is."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_networks import randomise
from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from compress.models import attention
from compress.quantization import left_float, prepare, quantization_points, quantized_layers

PRODUCT = "attention multiplies activations with each other, which stays in floating point"


def images(size: int = 40) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    return VisionTransformer(40, 8, 1, 4, 32, 64, num_classes=10)


def swin(block=None, merging=None) -> nn.Module:
    kinds = {} if block is None else {"block": block, "downsample_layer": merging}
    return SwinTransformer([4, 4], 16, [2], [4], [4, 4], num_classes=10, **kinds)


FAMILIES = {
    "vit": (vit, "encoder.layers.encoder_layer_0.self_attention", ("in_proj", "out_proj")),
    "swin": (swin, "features.1.1.attn", ("qkv", "proj")),
    "swin_v2": (lambda: swin(SwinTransformerBlockV2, PatchMergingV2), "features.1.1.attn", ("qkv", "proj")),
}


def randomised(model: nn.Module) -> nn.Module:
    """Also the biases, temperatures and position tables that are constant in a fresh transformer."""
    generator = torch.Generator().manual_seed(2)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_bias", ".bias", "relative_position_bias_table", "logit_scale")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def halved(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if attention.is_attention(module):
            model.set_submodule(name, attention.keep_heads(module, (0, 3)))
    return model


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_projections_become_layers_and_the_answers_stay(name, pruned):
    build, layer, projections = FAMILIES[name]
    model = randomised(build())
    model = halved(model) if pruned else model
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model)
    with torch.no_grad():
        expected, got = model(images()), prepared(images())
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert {f"{layer}.{one}" for one in projections} <= set(quantized_layers(prepared))
    assert {(one["layer"], one["reason"]) for one in left_float(prepared)} >= {(layer, PRODUCT)}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_each_projection_reads_a_point():
    prepared = prepare(randomised(swin()))
    points = quantization_points(prepared)
    for node in prepared.graph.nodes:
        if str(node.target).endswith((".qkv", ".proj")):
            assert str(node.args[0].target) in points


def test_what_is_the_same_for_every_image_is_computed_once():
    build, layer, _ = FAMILIES["swin_v2"]
    model = randomised(build())
    prepared = prepare(model)
    parameters = dict(prepared.named_parameters())
    assert not any("cpb_mlp" in name for name in parameters)
    biases = [value for name, value in parameters.items() if name.startswith(f"{layer}.constant_mul")]
    assert len(biases) == 1 and torch.equal(biases[0], model.get_submodule(layer).get_relative_position_bias())
    assert biases[0].requires_grad
    assert not any(one["layer"].startswith(f"{layer}.") for one in left_float(prepared))


def test_a_constant_of_a_module_without_weights_belongs_to_the_model():
    class Position(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, 8)

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.position, self.head = nn.Parameter(torch.ones(8)), Position(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.position(x) * self.scale.exp())

    model = Positions()
    prepared = prepare(model)
    assert torch.equal(prepared.constant_exp, model.scale.detach().exp()) and "scale" not in prepared.state_dict()
    rows = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.allclose(prepared(rows), model(rows), atol=1e-6)


def test_learned_constants_are_listed_by_name():
    left = {one["layer"]: one["reason"] for one in left_float(prepare(vit()))}
    for name in ("class_token", "encoder.pos_embedding"):
        assert left[name] == "a learned constant is added or multiplied in floating point"


class OfOnesOwn(nn.Module):
    """Torch's attention, called twice in ways of the user's own."""

    def __init__(self, first, second, **kwargs) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 32, 8, stride=8), nn.MultiheadAttention(32, 4, **kwargs)
        self.calls, self.head = (first, second), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)
        for call in self.calls:
            tokens = call(self.attention, tokens)
        return self.head(tokens.mean(0))


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def weighed(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0]


@pytest.mark.parametrize(
    ("first", "second", "kwargs", "opened"),
    [
        (plain, plain, {}, True),
        (plain, plain, {"bias": False}, True),
        (plain, weighed, {}, True),
        (weighed, weighed, {}, False),
        (plain, plain, {"add_bias_kv": True}, False),
    ],
)
def test_attention_is_opened_only_where_it_is_plain(first, second, kwargs, opened):
    torch.manual_seed(0)
    model = OfOnesOwn(first, second, **kwargs).eval()
    prepared = prepare(model)
    with torch.no_grad():
        expected, got = model(images()), prepared(images())
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert ("attention.in_proj" in quantized_layers(prepared)) == opened
    assert any("in_proj." in name for name in prepared.state_dict()) == opened
    assert {one["layer"]: one["reason"] for one in left_float(prepared)}["attention"] == PRODUCT


def test_a_product_outside_of_any_attention_module_is_listed_too():
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 5, stride=5), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x).flatten(2)
            return self.head((maps @ maps.transpose(1, 2)).flatten(1))

    left = [one for one in left_float(prepare(Gram())) if one["reason"] == PRODUCT]
    assert [(one["layer"], one["type"]) for one in left] == [("matmul", "operation")]


def test_maxvit_keeps_its_layers_and_names_its_attention():
    model = randomised(models.MaxVit((64, 64), 16, 2, [16], [1], 8, 0.0, num_classes=10))
    prepared = prepare(model)
    layer = "blocks.0.layers.0.layers.grid_attention.attn_layer.1"
    assert {f"{layer}.to_qkv", f"{layer}.merge"} <= set(quantized_layers(prepared))
    assert (layer, PRODUCT) in {(one["layer"], one["reason"]) for one in left_float(prepared)}
