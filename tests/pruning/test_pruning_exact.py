"""A pruned model gives the masked model's answers, exactly what was planned is gone, and nothing else has changed."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from exact_pruning import assert_as_planned, break_one_weight, images, is_unchanged, shrunk, small_resnet, state
from pruning_networks import ODD_NETWORKS, FlattenByView, Grouped, SharedAndTied, conv_bn, randomise, training
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from compress.errors import HandoffError
from compress.pruning import PRUNERS, plan, prune
from compress.pruning.interface import Group, Plan
from compress.pruning.nni import backend

pytestmark = pytest.mark.integration

torch.set_num_threads(1)


SHRINKING = sorted(name for name, pruner in PRUNERS.items() if not pruner.fine_grained)


FAMILIES = {
    "resnet": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10),
    "densenet": lambda: models.DenseNet(growth_rate=16, block_config=(2, 3), num_init_features=32, num_classes=10),
    "squeezenet": lambda: models.squeezenet1_1(num_classes=10),
    "googlenet": lambda: models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
    "shufflenet": lambda: models.shufflenet_v2_x0_5(num_classes=10),
    "mobilenet_v2": lambda: models.MobileNetV2(10, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 48, 2, 2]]),
    "mobilenet_v3": lambda: models.mobilenet_v3_small(num_classes=10),
    "regnet_y": lambda: models.regnet_y_400mf(num_classes=10),
    "convnext": lambda: ConvNeXt([CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 1)], num_classes=10),
    "vit": lambda: VisionTransformer(48, 16, 2, 2, 64, 128, num_classes=10),
    "swin_v2": lambda: SwinTransformer(
        [4, 4],
        32,
        [2, 2],
        [2, 4],
        [4, 4],
        num_classes=10,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_equal_to_its_masked_model(family):
    torch.manual_seed(0)
    model = randomise(FAMILIES[family]())
    before = state(model)
    result = shrunk(model)
    assert result.max_abs_diff <= 1e-4 * result.reference_scale
    assert_as_planned(model, result)
    assert is_unchanged(model, before)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (result.model, model)]
    assert sizes[0] < 0.9 * sizes[1]


@pytest.mark.parametrize("network", ODD_NETWORKS)
@pytest.mark.parametrize("pruner", ["l1-norm", "fpgm"])
def test_odd_networks_are_equal_to_their_masked_models(network, pruner):
    torch.manual_seed(0)
    model = randomise(network())
    result = shrunk(model, size=28, pruner=pruner)
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert_as_planned(model, result)


def test_equal_to_a_masked_model_made_independently():
    """Masks into weights, zero after every BatchNorm of a masked convolution: no code of the package in between."""
    torch.manual_seed(0)
    model, example = randomise(small_resnet()), images()
    found = plan(model, example, sparsity=0.5)
    kept = backend.kept_channels(model, found, "L1NormPruner")
    masked = copy.deepcopy(model)
    norms = {"conv1": "bn1", "conv2": "bn2", "0": "1"}
    for layer, rows in kept.items():
        parent, _, name = layer.rpartition(".")
        masked.get_submodule(layer).weight.data[~rows] = 0
        norm = masked.get_submodule(f"{parent}.{norms[name]}".lstrip("."))
        norm.register_forward_hook(lambda _, __, out, rows=rows: out * rows.float().view(1, -1, 1, 1))
    result = prune(model, example, found, "l1-norm")
    with torch.no_grad():
        difference = (masked(example) - result.model.eval()(example)).abs().max()
        plain = (model(example) - result.model(example)).abs().max()
    assert difference <= 1e-5 * result.reference_scale
    assert plain > 0.05 * result.reference_scale, "the comparison would not notice a wrong channel"


class Auxiliary(nn.Module):
    """A further head in the middle, for training only, answered in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = conv_bn(3, 32), conv_bn(32, 32), nn.Linear(32, 5)
        self.aux = nn.Sequential(
            conv_bn(32, 16),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(64, 24),
            nn.ReLU(),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor):
        x = self.stem(x)
        aux = self.aux(x) if self.training else None
        answer = self.fc(self.body(x).mean((2, 3)))
        return Answers(answer, aux) if self.training else answer


class Answers(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


AUXILIARY = {
    "own": (Auxiliary, 28, [(2, 5)] * 2),
    "googlenet": (lambda: models.googlenet(num_classes=5, aux_logits=True, init_weights=False), 64, [(2, 5)] * 3),
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_heads_follow_what_they_read(name):
    build, size, shapes = AUXILIARY[name]
    torch.manual_seed(0)
    model = randomise(build())
    result = shrunk(model, size=size)
    assert result.max_abs_diff <= 1e-5 * result.reference_scale and not result.model.training
    assert_as_planned(model, result)
    answer = result.model(images(size))
    assert isinstance(answer, Tensor) and answer.shape == (2, 5)
    answers = result.model.train()(images(size))
    assert [tuple(one.shape) for one in answers] == shapes
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.01)
    sum(nn.functional.cross_entropy(one, torch.tensor([0, 1])) for one in answers).backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())
    optimizer.step()


def test_a_wrong_auxiliary_head_is_caught(monkeypatch):
    break_one_weight(monkeypatch, "aux.4")
    with pytest.raises(HandoffError, match="The outputs of the pruned model differ from the masked model's"):
        shrunk(randomise(Auxiliary()), size=28)


def _scores(weight: Tensor) -> dict[str, Tensor]:
    rows = weight.flatten(1)
    distances = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    return {"l1-norm": rows.abs().sum(1), "l2-norm": rows.norm(dim=1), "fpgm": distances}


@pytest.mark.parametrize("pruner", ["l1-norm", "l2-norm", "fpgm"])
def test_a_pruner_keeps_the_channels_its_paper_says(pruner):
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    weight = model[0][0].weight.detach().clone()
    result = shrunk(model, pruner=pruner)
    best = _scores(weight)[pruner].topk(16).indices.sort().values
    assert torch.equal(result.model[0][0].weight, weight[best])
    assert torch.equal(result.model[3].weight, model[3].weight[:, best])


def test_whole_groups_keep_their_width_and_shares_are_even():
    model = randomise(Grouped())
    result = shrunk(model, size=28)
    middle, wider = result.model.mid[0], result.model.wider[0]
    assert (middle.groups, middle.in_channels, middle.out_channels) == (4, 32, 32)
    assert (wider.groups, wider.in_channels, wider.out_channels) == (4, 16, 32)


class PartlyFrozen(nn.Module):
    """A frozen, evaluating backbone under a head that trains, as in transfer learning."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 32), conv_bn(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_modes_gradients_and_counters_survive():
    model = randomise(PartlyFrozen()).train()
    model.backbone.eval().requires_grad_(False)
    model.head[1].num_batches_tracked.fill_(7)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result = shrunk(model)
    for one in (model, result.model):
        assert {name: module.training for name, module in one.named_modules()} == modes
        assert {name: parameter.requires_grad for name, parameter in one.named_parameters()} == flags
        assert all(parameter.grad is None for parameter in one.parameters())
    assert result.model.head[1].num_batches_tracked == 7


def test_the_result_trains_copies_and_exports():
    torch.manual_seed(0)
    result = shrunk(randomise(Grouped()), size=28)
    model = copy.deepcopy(result.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(images(28)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    exported = torch.export.export(result.model.eval(), (images(28),)).module()
    with torch.no_grad():
        assert torch.allclose(exported(images(28)), result.model(images(28)), atol=1e-5)


def test_the_result_shares_no_memory_with_the_input_and_keeps_ties():
    model = randomise(SharedAndTied())
    result = shrunk(model, size=28)
    own = {parameter.data_ptr() for parameter in result.model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    assert result.model.alias is result.model.free


def test_pruning_twice_is_exact_both_times():
    model = randomise(Grouped())
    first = shrunk(model, size=28, sparsity=0.25)
    second = shrunk(first.model, size=28)
    assert second.max_abs_diff <= 1e-5 * second.reference_scale
    assert second.model.inner[0].out_channels < first.model.inner[0].out_channels < model.inner[0].out_channels


def test_all_zero_tensors_do_not_look_dead():
    model = randomise(small_resnet())
    with torch.no_grad():
        model.fc.weight.zero_()
        model.layer1[0].bn2.weight.zero_()
        model.layer2[0].conv1.weight.zero_()
    result = shrunk(model)
    assert result.model.fc.in_features == 256 and result.model.layer2[0].conv1.out_channels == 64


def test_a_wrong_model_is_caught_even_under_a_head_that_is_zero(monkeypatch):
    model = randomise(small_resnet())
    nn.init.zeros_(model.fc.weight)
    break_one_weight(monkeypatch, "layer3.0.conv1")
    with pytest.raises(HandoffError, match="The inputs of fc of the pruned model differ"):
        shrunk(model)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("pruner", ["l1-norm", "taylor", "agp"])
def test_it_works_where_gradients_are_off(context, pruner):
    how = training(28)
    with context():
        model = randomise(FlattenByView())
        result = prune(model, images(28), plan(model, images(28), sparsity=0.5), pruner, how)
    result.model.train()(images(28)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_the_fast_geometric_median_ranks_as_nnis_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten())
    found = Plan((Group(("0",), 64, 32, "no other layer shares its channels"),), ())
    fast = backend.kept_channels(model, found, "FPGMPruner")["0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_fast_fpgm", lambda base: base)
        assert torch.equal(backend.kept_channels(model, found, "FPGMPruner")["0"], fast)
