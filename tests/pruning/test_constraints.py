"""Fractions of single layers, global ranking with a cap that holds, and NNI config lists: kept counts and refusals."""

from __future__ import annotations

import pytest
import torch
from pruning_networks import Grouped, conv_bn, randomise
from torch import Tensor, nn
from torchvision import models

from compress.errors import RequestError
from compress.pruning import plan, prune, ranking

IMAGE = torch.zeros(1, 3, 32, 32)


def chain(*channels: int) -> nn.Sequential:
    layers = [conv_bn(one, two) for one, two in zip((3, *channels), channels, strict=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def kept(model: nn.Module, **asked) -> dict[str, int]:
    found = plan(model, IMAGE, **({"sparsity": 0.5} | asked))
    return {group.layers[0]: group.channels_after for group in found.groups}


def reasons(model: nn.Module, **asked) -> dict[str, str]:
    return {left.layer: left.reason for left in plan(model, IMAGE, **({"sparsity": 0.5} | asked)).unpruned}


def resnet() -> nn.Module:
    return models.resnet18(num_classes=10)


# ---- fractions of single layers ----


def test_a_layer_keeps_its_own_fraction_and_a_longer_name_wins():
    asked = {"1": 0.25, "2.0": 0.75, "2": 0.25}
    assert kept(chain(64, 64, 64), layer_sparsity=asked) == {"0.0": 32, "1.0": 48, "2.0": 16}


def test_a_group_takes_the_fraction_of_its_members():
    found = kept(resnet(), layer_sparsity={"layer1.1.conv2": 0.25})
    assert found["conv1"] == 48 and found["layer1.1.conv1"] == 32


def test_a_fraction_of_zero_keeps_the_layer_whole():
    assert kept(chain(64, 64), layer_sparsity={"0": 0.0}) == {"1.0": 32}
    assert reasons(chain(64, 64), layer_sparsity={"0": 0.0})["0.0"] == "has a sparsity of 0, as you set it"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"conv1": 0.25, "layer1.0.conv2": 0.5},
            "layer_sparsity: got 'conv1=0.25 and layer1.0.conv2=0.5', expected one fraction for both, because they lose "
            "the same channels.",
        ),
        (
            {"fc": 0.5},
            "layer_sparsity: got 'fc', expected a layer that can be pruned, but fc gives the answer: its outputs are the "
            "classes.",
        ),
        (
            {"layer1.0.con1": 0.5},
            "layer_sparsity: got 'layer1.0.con1', expected the name of a Conv2d or Linear layer, or of a module with some, "
            "such as layer1.0.conv1",
        ),
        ({"conv1": 1.0}, "layer_sparsity: got 'conv1=1', expected a fraction from 0 to below 1."),
    ],
)
def test_impossible_fractions_are_refused(asked, sentence):
    with pytest.raises(RequestError) as refusal:
        plan(resnet(), IMAGE, sparsity=0.5, layer_sparsity=asked)
    assert sentence in str(refusal.value)


def test_a_fraction_of_an_excluded_layer_is_refused():
    with pytest.raises(
        RequestError, match=r"layer_sparsity: got 'layer4.0.conv1', .* but layer4.0.conv1 is excluded by"
    ):
        plan(resnet(), IMAGE, sparsity=0.5, exclude=["layer4"], layer_sparsity={"layer4.0.conv1": 0.5})


def test_around_a_grouped_convolution_both_sides_may_differ():
    found = kept(Grouped(), layer_sparsity={"inner.0": 0.25, "mid.0": 0.5})
    assert (found["inner.0"], found["mid.0"]) == (48, 32)


# ---- global ranking ----


def graded() -> nn.Sequential:
    """Two layers: all channels of the first alike, of the second 48 that matter little and 16 that matter much."""
    model = chain(64, 64)
    with torch.no_grad():
        model[0][0].weight.fill_(1e-4)  # raw importance would remove these first
        model[1][0].weight.fill_(0.01)
        model[1][0].weight[::4] = 1.0
    return model


def test_importance_is_compared_relative_to_each_group():
    assert kept(graded(), ranking="global", sparsity=0.375) == {"1.0": 16}
    assert reasons(graded(), ranking="global", sparsity=0.375)["0.0"].startswith("ranks above the others")


def test_the_cap_holds_and_the_rest_comes_from_elsewhere():
    found = kept(graded(), ranking="global", sparsity=0.375, max_layer_sparsity=0.5)
    assert found == {"0.0": 48, "1.0": 32}
    assert sum(found.values()) == 0.625 * 128


@pytest.mark.parametrize("pruner", ranking.METRICS)
@pytest.mark.parametrize("cap", [None, 0.5, 0.7])
def test_what_was_asked_is_met_within_a_multiple(pruner, cap):
    torch.manual_seed(0)
    found = plan(resnet(), IMAGE, sparsity=0.4, ranking="global", max_layer_sparsity=cap, pruner=pruner)
    sizes = [(len(group.layers), group.channels_before, group.channels_after) for group in found.groups]
    removed = sum(layers * (before - after) for layers, before, after in sizes)
    assert removed == pytest.approx(0.4 * 4800, abs=16)
    assert all(after % 8 == 0 and after >= max(8, (1 - (cap or 1)) * before) for _, before, after in sizes)


def test_a_fraction_of_its_own_takes_a_group_out_of_the_ranking():
    assert kept(graded(), ranking="global", sparsity=0.25, layer_sparsity={"0.0": 0.5}) == {"0.0": 32, "1.0": 48}


def test_a_globally_ranked_plan_is_pruned_exactly():
    torch.manual_seed(0)
    model = randomise(Grouped())
    example = torch.rand(2, 3, 28, 28)
    result = prune(model, example, plan(model, example, sparsity=0.5, ranking="global"), "l1-norm")
    assert result.max_abs_diff <= 1e-5 * result.reference_scale


def test_a_pruner_without_a_metric_of_weights_is_refused():
    with pytest.raises(
        RequestError, match="ranking: got 'global', expected per-group with taylor, because only l1-norm"
    ):
        plan(resnet(), IMAGE, sparsity=0.5, ranking="global", pruner="taylor")


# ---- NNI config lists ----


def test_nni_3_and_2_say_the_same():
    new = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["layer4.0.conv1"], "sparse_ratio": 0.25}]
    old = [
        {"op_types": ["Conv2d", "Linear"], "sparsity_per_layer": 0.25},
        {"op_names": ["layer4.0.conv1"], "exclude": True},
    ]
    assert kept(resnet(), config_list=new) == kept(resnet(), config_list=old)
    assert kept(resnet(), config_list=new) == kept(resnet(), sparsity=0.25, exclude=["layer4.0.conv1"])


def test_a_later_entry_overrides_an_earlier_one_and_the_rest_stays():
    entries = [
        {"op_names_re": [r"layer3\..*conv1"], "sparse_ratio": 0.5},
        {"op_names": ["layer3.1.conv1"], "sparse_ratio": 0.25, "target_names": ["weight", "bias"]},
    ]
    assert kept(resnet(), config_list=entries) == {"layer3.0.conv1": 128, "layer3.1.conv1": 192}
    assert reasons(resnet(), config_list=entries)["conv1"] == "is not selected by the config list"


@pytest.mark.parametrize(
    "entry",
    [
        {"op_types": ["Conv2d"], "total_sparsity": 0.375, "max_sparsity_per_layer": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.375, "global_group_id": 1, "max_sparse_ratio": 0.5},
    ],
)
def test_a_global_group_ranks_and_its_cap_holds(entry):
    assert kept(graded(), config_list=[entry]) == {"0.0": 48, "1.0": 32}


_CONV = {"op_types": ["Conv2d"]}


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (
            [_CONV | {"sparse_threshold": 0.1}],
            "'sparse_threshold', expected sparse_ratio: a threshold does not say how many",
        ),
        ([_CONV | {"sparse_ration": 0.1}], "'sparse_ration', expected one of NNI's keys"),
        (
            [_CONV | {"sparse_ratio": 0.5}, _CONV | {"sparsity": 0.5}],
            "'sparse_ratio and sparsity', expected the keys of one",
        ),
        (
            [_CONV | {"sparse_ratio": 0.5, "target_settings": {"weight": {"granularity": "in_channel"}}}],
            "\"granularity='in_channel' of weight in entry 1\", expected granularity out_channel or default",
        ),
        (
            [_CONV | {"sparse_ratio": 0.5, "target_names": ["_input_"]}],
            "'the target _input_ in entry 1', expected weight or",
        ),
        (
            [_CONV | {"sparse_ratio": 0.5, "dependency_group_id": 1}],
            "'dependency_group_id', expected nothing: which layers",
        ),
        ([_CONV | {"sparse_ratio": 1}], "'sparse_ratio=1 in entry 1', expected a fraction from 0 to below 1"),
        ([_CONV], "'no ratio in entry 1', expected one ratio, such as sparse_ratio"),
        ([{"sparse_ratio": 0.5}], "'entry 1 without a selection', expected op_names, op_names_re or op_types"),
        (
            [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}],
            "'BatchNorm2d in op_types', expected Conv2d or Linear: only",
        ),
        (
            [{"op_names": ["conv9"], "sparse_ratio": 0.5}],
            "'conv9 in op_names', expected the name of a Conv2d or Linear layer",
        ),
        (
            [{"op_names": ["fc"], "sparse_ratio": 0.5}],
            "'fc', expected a layer that can be pruned, but fc gives the answer",
        ),
        ([{"op_names_re": ["("], "sparse_ratio": 0.5}], "'op_names_re in entry 1', expected regular expressions"),
        (
            [{"op_names_re": ["x"], "sparse_ratio": 0.5}],
            "'entry 1, which selects no layer', expected an entry that selects",
        ),
        ([_CONV | {"exclude": True}], "expected at least one entry with a ratio that selects a layer"),
        ([_CONV | {"exclude": True, "sparsity": 0.5}], "'exclude in entry 1', expected exclude: true without a ratio"),
        ([{"op_types": "Conv2d", "sparsity": 0.5}], "'op_types in entry 1', expected a list of strings"),
        (
            [_CONV | {"sparse_ratio": 0.5, "max_sparse_ratio": 0.4, "global_group_id": 1}],
            "'max_sparse_ratio=0.4 in entry 1', expected at least sparse_ratio, 0.5",
        ),
        (
            [_CONV | {"total_sparsity": 0.5}, {"op_names": ["conv1"], "total_sparsity": 0.5}],
            "expected one global group with one ratio and one limit",
        ),
    ],
)
def test_what_a_plan_cannot_honour_is_refused_by_name(entries, sentence):
    with pytest.raises(RequestError) as refusal:
        plan(resnet(), IMAGE, sparsity=0.5, config_list=entries)
    assert str(refusal.value).startswith("config_list: got ") and sentence in str(refusal.value)


def test_a_group_needs_no_entry_for_each_member():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(3, 32, 3), nn.Linear(3, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)) * self.gate(x.mean((2, 3))))

    found = plan(Gate(), IMAGE, sparsity=0.5, config_list=[_CONV | {"sparse_ratio": 0.5}])
    assert [(group.layers, group.channels_after) for group in found.groups] == [(("conv", "gate"), 16)]
