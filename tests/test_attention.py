"""Attention loses whole heads: the right ones, exactly, and what is left trains, is rebuilt and is exported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pruning_networks import randomise
from torch import Tensor, nn
from torchvision import models
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from compress import attention, counting, onnx_export, quantization
from compress import models as saved_models
from compress.errors import HandoffError, RequestError
from compress.images import Preprocessing
from compress.pruning import PRUNERS, plan, prune, speedup

torch.set_num_threads(1)


def images(size: int = 48, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    """Also what is zero or constant in a fresh transformer: the head, position biases, temperatures, v2's key bias."""
    generator = torch.Generator().manual_seed(2)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj_bias", "relative_position_bias_table", "logit_scale", "heads.head.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def vit() -> nn.Module:
    return VisionTransformer(48, 16, 2, 4, 64, 128, num_classes=10)


def swin(block=None, merging=None) -> nn.Module:
    kinds = {} if block is None else {"block": block, "downsample_layer": merging}
    return SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10, **kinds)


def maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)


FAMILIES = {
    "vit": (vit, 48, "encoder.layers.encoder_layer_1.self_attention", 4, 16),
    "swin": (swin, 48, "features.1.1.attn", 2, 16),
    "swin_v2": (lambda: swin(SwinTransformerBlockV2, PatchMergingV2), 48, "features.1.1.attn", 2, 16),
    "maxvit": (maxvit, 64, "blocks.1.layers.0.layers.window_attention.attn_layer.1", 4, 8),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    build, size, layer, heads, width = FAMILIES[request.param]
    torch.manual_seed(0)
    model = randomised(build())
    return model, prune(model, images(size), plan(model, images(size), sparsity=0.5), "l1-norm"), layer, heads, width


def test_whole_heads_go_and_the_rest_is_equal_to_the_masked_model(family):
    model, result, layer, heads, width = family
    group = result.plan.layers[layer]
    assert group.layers == (layer,)
    assert (group.channels_before, group.channels_after, group.unit) == (heads * width, heads * width // 2, width)
    assert group.reason == (
        f"no other layer shares its channels; each of the {heads} attention heads of {width} channels "
        "stays or goes whole"
    )
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert list(result.model.state_dict()) == list(model.state_dict())
    before, after = model.get_submodule(layer), result.model.get_submodule(layer)
    assert isinstance(after, type(before)) and attention.heads_of(after).count == heads // 2
    assert attention.heads_of(after).width == width
    size = 64 if isinstance(model, models.MaxVit) else 48
    assert counting.count_macs(result.model, size) < 0.65 * counting.count_macs(model, size)


def test_the_heads_with_the_largest_values_stay(family):
    model, result, layer, heads, width = family
    before, after = model.get_submodule(layer), result.model.get_submodule(layer)
    norms = attention.value_rows(before).view(heads, -1).abs().sum(1)
    best = norms.topk(heads // 2).indices.sort().values
    rows = attention.value_rows(before).view(heads, width, -1)[best].flatten(0, 1)
    assert torch.equal(attention.value_rows(after), rows)
    assert torch.equal(result.kept[layer].view(heads, width).all(1).nonzero().flatten(), best)


def test_the_pruned_model_trains_and_its_modes_survive(family):
    model, result, layer, *_ = family
    size = 64 if isinstance(model, models.MaxVit) else 48
    subject = attention_copy(result.model).train()
    nn.functional.cross_entropy(subject(images(size)), torch.tensor([0, 1])).backward()
    module = subject.get_submodule(layer)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert attention.value_rows(module).shape[0] > 0 and not result.model.get_submodule(layer).training


def attention_copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def test_it_is_rebuilt_from_a_fresh_instance(family, tmp_path):
    model, result, *_ = family
    size = 64 if isinstance(model, models.MaxVit) else 48
    recipe = Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
    saved_models.save(result.model, tmp_path, architecture=None, preprocessing=recipe, class_names=())
    again = saved_models.rebuild(tmp_path, model=model)
    with torch.no_grad():
        assert torch.equal(again(images(size)), result.model(images(size)))
    assert attention.pruned_heads(again) == attention.pruned_heads(result.model) and not attention.pruned_heads(model)


def test_it_is_prepared_for_quantization(family):
    model, result, layer, *_ = family
    size = 64 if isinstance(model, models.MaxVit) else 48
    prepared = quantization.prepare(result.model)
    with torch.no_grad():
        assert torch.allclose(prepared(images(size)), result.model(images(size)), rtol=1e-4, atol=1e-4)
    left = {one["layer"]: one["reason"] for one in quantization.left_float(prepared)}
    if isinstance(model, VisionTransformer):
        assert left[layer] == "attention multiplies activations with each other, which stays in floating point"


def test_it_is_exported_with_a_dynamic_batch(family, tmp_path):
    import onnxruntime

    model, result, *_ = family
    size = 64 if isinstance(model, models.MaxVit) else 48
    onnx_export.export(result.model, tmp_path / "model.onnx", input_size=size)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        with torch.no_grad():
            expected = result.model(images(size, count)).numpy()
        got = session.run(None, {"images": images(size, count).numpy()})[0]
        assert abs(got - expected).max() <= 1e-4 * abs(expected).max()
