"""Attention loses whole heads: the right ones, exactly, and what is left trains, is rebuilt and is exported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
from pruning_networks import randomise, training
from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from compress import models as saved_models
from compress import onnx_export, quantization
from compress.errors import CheckpointError, HandoffError, RequestError
from compress.models import attention, counting
from compress.preprocessing import Preprocessing
from compress.pruning import PRUNERS, PrunedModel, PruningTraining, plan, prune, speedup
from compress.pruning.reconstruction import reconstruct

pytestmark = pytest.mark.integration

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
    return VisionTransformer(48, 8, 2, 4, 64, 128, num_classes=10)


def swin(block=None, merging=None) -> nn.Module:
    kinds = {} if block is None else {"block": block, "downsample_layer": merging}
    return SwinTransformer([4, 4], 32, [2], [4], [4, 4], num_classes=10, **kinds)


def maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)


FAMILIES = {
    "vit": (vit, 48, "encoder.layers.encoder_layer_1.self_attention", 4, 16),
    "swin": (swin, 40, "features.1.1.attn", 4, 8),
    "swin_v2": (lambda: swin(SwinTransformerBlockV2, PatchMergingV2), 40, "features.1.1.attn", 4, 8),
    "maxvit": (maxvit, 64, "blocks.1.layers.0.layers.window_attention.attn_layer.1", 4, 8),
}


@dataclass(frozen=True)
class Case:
    """One family, pruned by half."""

    model: nn.Module
    result: PrunedModel
    images: Tensor
    layer: str
    heads: int
    width: int

    @property
    def before(self) -> nn.Module:
        return self.model.get_submodule(self.layer)

    @property
    def after(self) -> nn.Module:
        return self.result.model.get_submodule(self.layer)


def case(name: str) -> Case:
    build, size, layer, heads, width = FAMILIES[name]
    torch.manual_seed(0)
    model, example = randomised(build()), images(size)
    return Case(model, halved(model, example), example, layer, heads, width)


def halved(
    model: nn.Module, example: Tensor, pruner: str = "l1-norm", how: PruningTraining | None = None
) -> PrunedModel:
    return prune(model, example, plan(model, example, sparsity=0.5), pruner, how)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request) -> Case:
    return case(request.param)


def test_whole_heads_go_and_the_rest_is_equal_to_the_masked_model(family):
    group = family.result.plan.layers[family.layer]
    channels = family.heads * family.width
    assert group.layers == (family.layer,)
    assert (group.channels_before, group.channels_after, group.unit) == (channels, channels // 2, family.width)
    assert group.reason == (
        f"no other layer shares its channels; each of the {family.heads} attention heads of {family.width} channels "
        "is kept or removed as a whole"
    )
    assert family.result.max_abs_diff <= 1e-5 * family.result.reference_scale
    assert list(family.result.model.state_dict()) == list(family.model.state_dict())
    assert isinstance(family.after, type(family.before))
    assert attention.heads_of(family.after).count == family.heads // 2
    size = family.images.shape[-1]
    assert counting.count_macs(family.result.model, size) < 0.65 * counting.count_macs(family.model, size)


def test_equal_to_a_masked_model_made_independently(family):
    """Zero columns of the output projections, and the MLPs' dead units: no code of the package in between."""
    masked = copy.deepcopy(family.model)
    for layer, rows in family.result.kept_channels.items():
        module = masked.get_submodule(layer)
        if attention.is_attention(module):
            name = {"vit": "out_proj", "maxvit": "merge"}.get(_family_of(family.model), "proj")
            module.get_submodule(name).weight.data[:, ~rows] = 0
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out, rows=rows: out * rows)
        else:
            return  # MaxViT's convolutions: BatchNorm stands between them
    with torch.no_grad():
        expected, got = masked(family.images), family.result.model(family.images)
        plain = (family.model(family.images) - got).abs().max()
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()
    assert plain > 0.01 * expected.abs().max(), "the comparison would not notice a wrong head"


def _family_of(model: nn.Module) -> str:
    return {VisionTransformer: "vit", models.MaxVit: "maxvit"}.get(type(model), "swin")


def test_the_heads_with_the_largest_values_stay(family):
    rows = attention.value_rows(family.before).view(family.heads, family.width, -1)
    best = rows.abs().sum((1, 2)).topk(family.heads // 2).indices.sort().values
    assert torch.equal(attention.value_rows(family.after), rows[best].flatten(0, 1))
    kept = family.result.kept_channels[family.layer].view(family.heads, family.width)
    assert torch.equal(kept.all(1).nonzero().flatten(), best) and torch.equal(kept.any(1), kept.all(1))


def test_all_heads_kept_is_the_original_arithmetic(family):
    same = copy.deepcopy(family.model).eval()
    for name, module in family.model.named_modules():
        if attention.is_attention(module):
            same.set_submodule(name, attention.keep_heads(module, range(attention.heads_of(module).count)))
    with torch.no_grad():
        expected, got = family.model(family.images), same(family.images)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_is_left_trains(family):
    subject = copy.deepcopy(family.result.model).train()
    nn.functional.cross_entropy(subject(family.images), torch.tensor([0, 1])).backward()
    parameters = list(subject.get_submodule(family.layer).parameters())
    assert parameters and all(parameter.grad is not None for parameter in parameters)
    assert not family.after.training


def test_frozen_attention_stays_frozen():
    model = randomised(vit()).train()
    model.encoder.eval().requires_grad_(False)
    result = halved(model, images())
    assert {name for name, one in result.model.named_parameters() if one.requires_grad} == {
        name for name, one in model.named_parameters() if one.requires_grad
    }
    assert result.model.training and not result.model.encoder.layers[0].self_attention.training


def test_pruning_twice_is_exact_both_times(family):
    again = halved(family.result.model, family.images)
    assert again.max_abs_diff <= 1e-5 * again.reference_scale
    assert attention.heads_of(again.model.get_submodule(family.layer)).count == family.heads // 4


@pytest.mark.parametrize("pruner", [name for name, pruner in PRUNERS.items() if not pruner.fine_grained])
def test_every_pruner_chooses_heads(pruner):
    model = randomised(vit())
    how = training(48, classes=10) if PRUNERS[pruner].needs_images else None
    if pruner == "slim":
        with pytest.raises(RequestError, match="is followed by a BatchNorm with factors to train"):
            halved(model, images(), pruner, how)
        return
    result = halved(model, images(), pruner, how)
    assert result.max_abs_diff <= 1e-5 * result.reference_scale


def test_what_is_left_is_refitted_around_the_attention(family):
    model, shown = copy.deepcopy(family.result.model), torch.randn(64, *family.images.shape[1:])
    refits = reconstruct(model, family.model, family.result.kept_channels, shown)
    assert refits and all(refit.error_after <= refit.error_before for refit in refits)
    with torch.no_grad():
        wanted = family.model(shown)
        before, after = ((one(shown) - wanted).square().mean() for one in (family.result.model, model))
    assert after < 0.9 * before


def test_it_is_rebuilt_from_a_fresh_instance(family, tmp_path):
    recipe = Preprocessing(family.images.shape[-1], (0.5,) * 3, (0.5,) * 3)
    saved_models.save(family.result.model, tmp_path, architecture=None, preprocessing=recipe, class_names=())
    again = saved_models.rebuild(tmp_path, model=family.model)
    with torch.no_grad():
        assert torch.equal(again(family.images), family.result.model(family.images))
    assert attention.pruned_heads(again) == attention.pruned_heads(family.result.model)
    assert not attention.pruned_heads(family.model)


_REBUILT = """
import sys
from pathlib import Path
import torch
sys.modules["nni"] = None
from compress import models
print(models.rebuild(Path(sys.argv[1]))(torch.ones(1, 3, 64, 64))[0, :3].tolist())
"""


def test_a_torchvision_transformer_is_rebuilt_without_nni(tmp_path):
    architecture = saved_models.Architecture("swin_v2_t", 4)
    model = randomised(saved_models.build(architecture))
    example = images(64)
    layers = [name for name, module in model.named_modules() if attention.is_attention(module)]
    found = plan(model, example, sparsity=0.5, exclude=["features.3", "features.5", "features.7"])
    result = prune(model, example, found, "l1-norm")
    assert attention.pruned_heads(result.model) == dict.fromkeys(layers[:2], 2)
    recipe = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)
    saved_models.save(result.model, tmp_path, architecture=architecture, preprocessing=recipe, class_names=())
    done = subprocess.run([sys.executable, "-c", _REBUILT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = result.model(torch.ones(1, 3, 64, 64))[0, :3]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-5)


def test_a_model_without_the_saved_heads_is_refused(tmp_path):
    result = halved(randomised(vit()), images())
    recipe = Preprocessing(48, (0.5,) * 3, (0.5,) * 3)
    saved_models.save(result.model, tmp_path, architecture=None, preprocessing=recipe, class_names=())
    with pytest.raises(CheckpointError, match=r"encoder_layer_1\.self_attention is no attention module with 2 heads"):
        saved_models.rebuild(tmp_path, model=VisionTransformer(48, 8, 1, 4, 64, 128, num_classes=10))


def test_it_is_prepared_for_quantization(family):
    prepared = quantization.prepare(family.result.model)
    with torch.no_grad():
        expected, got = family.result.model(family.images), prepared(family.images)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    left = {one["layer"]: one["reason"] for one in quantization.left_float(prepared)}
    if _family_of(family.model) == "vit":
        assert left[family.layer] == "attention multiplies activations with each other, which stays in floating point"
        assert f"{family.layer}.out_proj" not in left


def test_it_is_exported_with_a_dynamic_batch(family, tmp_path):
    size = family.images.shape[-1]
    onnx_export.export(family.result.model, tmp_path / "model.onnx", input_size=size)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        with torch.no_grad():
            expected = family.result.model(images(size, count)).numpy()
        got = session.run(None, {"images": images(size, count).numpy()})[0]
        assert abs(got - expected).max() <= 1e-4 * abs(expected).max()


# ---- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "sparsity", "kept"), [(3, 0.5, 64), (3, 0.6, 32), (3, 0.95, 32), (12, 0.5, 192), (6, 0.25, 160)]
)
def test_the_nearest_number_of_heads_stays_and_at_least_one(heads, sparsity, kept):
    model = VisionTransformer(16, 8, 1, heads, heads * 32, 32, num_classes=10)
    found = plan(model, images(16), sparsity=sparsity, multiple=8)
    assert found.layers["encoder.layers.encoder_layer_0.self_attention"].channels_after == kept


def test_an_attention_is_excluded_by_its_name_its_block_or_a_part_of_it():
    first, second = (f"encoder.layers.encoder_layer_{index}.self_attention" for index in range(2))
    for name in (first, "encoder.layers.encoder_layer_0", f"{first}.out_proj"):
        found = plan(vit(), images(), sparsity=0.5, exclude=[name])
        assert first not in found.layers and second in found.layers
        assert {one.layer: one.reason for one in found.unpruned}[first] == "is excluded by you"
    with pytest.raises(RequestError, match=rf"exclude: got '{first}.out'"):
        plan(vit(), images(), sparsity=0.5, exclude=[f"{first}.out"])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_inside_an_attention_is_listed_with_it(name):
    build, size, layer, *_ = FAMILIES[name]
    found = plan(build(), images(size), sparsity=0.5)
    assert not [one.layer for one in found.unpruned if one.layer.startswith(f"{layer}.")]


class AttentionOfOnesOwn(nn.Module):
    """torch's module, called in a way of the user's own."""

    def __init__(self, call, **kwargs) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 32, 8, stride=8), nn.MultiheadAttention(32, 4, **kwargs)
        self.call, self.hidden, self.head = call, nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)
        seen = self.call(self.attention, tokens)
        return self.head(torch.relu(self.hidden(seen)).mean(0))


def test_tokens_first_works_too():
    model = AttentionOfOnesOwn(lambda layer, x: layer(x, x, x, need_weights=False)[0])
    result = halved(randomised(model), images())
    assert result.model.attention.num_heads == 2 and result.max_abs_diff <= 1e-5 * result.reference_scale


@pytest.mark.parametrize(
    ("call", "kwargs", "reason"),
    [
        (lambda layer, x: layer(x, x, x)[0], {}, "is called otherwise than as attention(x, x, x, need_weights=False)"),
        (lambda layer, x: layer(x, x + 1, x + 1, need_weights=False)[0], {}, "is called otherwise than as"),
        (lambda layer, x: layer(x, x, x, need_weights=False)[0], {"add_bias_kv": True}, "or learned ones of its own"),
    ],
)
def test_attention_that_cannot_be_pruned_stays_with_the_reason(call, kwargs, reason):
    found = plan(AttentionOfOnesOwn(call, **kwargs), images(), sparsity=0.5)
    assert found.layers.keys() == {"hidden"}
    assert reason in {one.layer: one.reason for one in found.unpruned}["attention"]


def test_a_wrong_head_is_caught(monkeypatch):
    keep = attention.keep_heads

    def wrong(module, kept):
        return keep(module, [head for head in range(4) if head not in kept])

    monkeypatch.setattr(speedup, "keep_heads", wrong)
    with pytest.raises(HandoffError, match="of the pruned model differ from the masked model's"):
        halved(randomised(vit()), images())


def test_a_call_that_pruned_attention_cannot_answer_is_refused():
    pruned = attention.keep_heads(nn.MultiheadAttention(32, 4, batch_first=True), [0, 2])
    tokens = torch.ones(1, 3, 32)
    assert pruned(tokens, tokens, tokens, need_weights=False)[0].shape == (1, 3, 32)
    with pytest.raises(ValueError, match=r"attention\(x, x, x, need_weights=False\)"):
        pruned(tokens, tokens, tokens)
