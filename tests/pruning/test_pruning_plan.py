"""What a pruning plan decides, and what it says about it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from pruning_networks import ODD_NETWORKS, Grouped, SharedAndTied, SqueezeExcitation, conv_bn, randomise
from torch import Tensor, nn
from torchvision import models

from compress.errors import PruningError, RequestError
from compress.pruning import PRUNERS, plan
from compress.tracing.graph import trace

IMAGE = torch.zeros(1, 3, 64, 64)


def reasons(found) -> dict[str, str]:
    return {left.layer: left.reason for left in found.unpruned}


def group_of(found, layer: str):
    return next(group for group in found.groups if layer in group.layers)


def chain(*channels: int, **kwargs: int) -> nn.Sequential:
    """Convolutions of these sizes, then a classifier."""
    layers = [conv_bn(one, two, **kwargs) for one, two in zip((3, *channels), channels, strict=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def test_resnet_keeps_the_answer_and_joins_what_is_added():
    found = plan(models.resnet18(weights=None), IMAGE, sparsity=0.5)
    assert reasons(found) == {"fc": "gives the answer: its outputs are the classes"}
    stream = group_of(found, "conv1")
    assert stream.layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert (stream.channels_before, stream.channels_after) == (64, 32)
    assert stream.reason == "their outputs are added"
    assert group_of(found, "layer1.0.conv1").reason == "no other layer shares its channels"


@pytest.mark.parametrize(
    "build",
    [
        models.densenet121,
        models.squeezenet1_1,
        models.shufflenet_v2_x0_5,
        models.mobilenet_v3_small,
        models.mnasnet0_5,
        models.efficientnet_b0,
        models.regnet_x_400mf,
    ],
)
def test_every_layer_is_in_the_plan_once_and_keeps_a_multiple_of_eight(build):
    network = build(weights=None)
    found = plan(network, IMAGE, sparsity=0.4)
    layers = [layer for group in found.groups for layer in group.layers] + list(reasons(found))
    expected = [name for name, module in network.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert sorted(layers) == sorted(expected)
    for group in found.groups:
        assert group.channels_after % 8 == 0 and 8 <= group.channels_after < group.channels_before
        assert group.channels_after % (group.unit * group.blocks) == 0
        assert {network.get_submodule(layer).weight.shape[0] for layer in group.layers} == {group.channels_before}


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"),
    [(64, 0.5, 32), (64, 0.3, 48), (64, 0.9, 8), (64, 0.99, 8), (24, 0.5, 16), (40, 0.3, 32), (12, 0.5, 8)],
)
def test_kept_channels_are_the_nearest_multiple_and_halves_round_up(channels, sparsity, kept):
    found = plan(chain(channels, 16), IMAGE, sparsity=sparsity)
    assert group_of(found, "0.0").channels_after == kept


def test_layers_too_small_for_the_multiple_stay_with_the_reason():
    found = plan(chain(8, 1, 64, 16), IMAGE, sparsity=0.1)
    assert reasons(found) == {
        "0.0": "has only 8 channels, too few to keep a multiple of 8 and remove the rest",
        "1.0": "has only 1 channel, too few to keep a multiple of 8 and remove the rest",
        "3.0": "has 16 channels: keeping a multiple of 8 nearest to 14 leaves none to remove",
        "6": "gives the answer: its outputs are the classes",
    }
    assert group_of(found, "2.0").channels_after == 56
    assert group_of(plan(chain(8, 16), IMAGE, sparsity=0.5, multiple=1), "0.0").channels_after == 4


def test_shuffled_channels_stay_and_the_line_is_named():
    found = plan(models.shufflenet_v2_x0_5(weights=None), IMAGE, sparsity=0.5)
    reason = reasons(found)["stage2.0.branch2.5"]
    assert reason.startswith("its channels are rearranged by view() in channel_shuffle (shufflenetv2.py, line ")
    assert "depthwise" in group_of(found, "stage2.0.branch2.0").reason


def test_normalisations_and_parameters_keep_what_meets_them():
    found = reasons(plan(models.convnext_tiny(weights=None), IMAGE, sparsity=0.5))
    assert found["features.1.0.block.0"] == "feeds LayerNorm (features.1.0.block.2), which mixes or counts its channels"
    assert "LayerNorm (features." in found["features.1.0.block.5"]


def test_grouped_convolutions_lose_whole_groups_or_evenly():
    found = plan(Grouped(), IMAGE, sparsity=0.5)
    inner = group_of(found, "inner.0")
    assert inner.layers == ("inner.0", "mid.0") and (inner.unit, inner.blocks) == (8, 1)
    assert inner.reason == "mid.0 is a grouped convolution that loses whole groups of 8 channels"
    assert (group_of(found, "wider.0").unit, group_of(found, "wider.0").blocks) == (1, 4)
    assert "each of the 4 groups of wider.0 keeps the same number" in group_of(found, "stem.0").reason


def test_a_gate_goes_together_with_what_it_multiplies():
    found = group_of(plan(SqueezeExcitation(), IMAGE, sparsity=0.5), "gate.2")
    assert (found.layers, found.reason) == (("stem.0", "gate.2"), "their outputs are multiplied")


def test_a_module_called_twice_reads_and_gives_the_same_channels():
    found = group_of(plan(SharedAndTied(), IMAGE, sparsity=0.5), "twice")
    assert (found.layers, found.reason) == (("stem.0", "twice"), "twice is called more than once")


def test_excluding_one_member_keeps_its_group():
    found = plan(models.resnet18(weights=None), IMAGE, sparsity=0.5, exclude=["layer1.0.conv2", "layer4"])
    left = reasons(found)
    assert left["layer1.0.conv2"] == "is excluded by you"
    assert left["conv1"] == "shares its channels with layer1.0.conv2, which is excluded by you"
    assert left["layer4.1.conv1"] == "is excluded by you"
    assert group_of(found, "layer3.0.conv1").channels_after == 128


def test_an_unknown_exclusion_is_refused_with_close_names():
    with pytest.raises(RequestError, match=r"exclude: got 'layer1\.0\.con2'.*such as layer1\.0\.conv2"):
        plan(models.resnet18(weights=None), IMAGE, sparsity=0.5, exclude=["layer1.0.con2"])
    with pytest.raises(RequestError, match="exclude: got 'bn1'"):
        plan(models.resnet18(weights=None), IMAGE, sparsity=0.5, exclude=["bn1"])


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(RequestError, match="sparsity: got .* strictly between 0 and 1"):
        plan(chain(16), IMAGE, sparsity=sparsity)


def test_wrong_arguments_are_refused():
    with pytest.raises(RequestError, match="multiple: got 0"):
        plan(chain(16), IMAGE, sparsity=0.5, multiple=0)
    with pytest.raises(RequestError, match=r"example: got \(3, 64, 64\)"):
        plan(chain(16), IMAGE[0], sparsity=0.5)
    with pytest.raises(PruningError, match=r"has torch\.float16 weights.*call model\.float\(\) first"):
        plan(chain(16).half(), IMAGE, sparsity=0.5)
    with pytest.raises(PruningError, match="does not run on images of 1 x 64 x 64"):
        plan(chain(16), IMAGE[:, :1], sparsity=0.5)


def test_nothing_to_prune_is_said_with_a_reason():
    with pytest.raises(PruningError, match=r"Nothing in Sequential can be pruned at.*has only 8 channels"):
        plan(chain(8), IMAGE, sparsity=0.5)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.conv(x)
        return self.conv(-x)


def test_an_untraceable_model_names_the_line():
    with pytest.raises(
        PruningError,
        match=r"Branches cannot be traced: its forward pass chooses its way by the values of its input, at "
        r"test_pruning_plan\.py, line \d+, in forward: `if x\.mean\(\) > 0:`",
    ):
        trace(Branches(), IMAGE)


def test_auxiliary_heads_are_part_of_the_plan():
    network = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    found = plan(network, IMAGE, sparsity=0.5)
    left = reasons(found)
    assert {left[layer] for layer in ("fc", "aux1.fc2", "aux2.fc2")} == {
        "gives the answer: its outputs are the classes"
    }
    assert group_of(found, "aux1.conv.conv").channels_after == 64 and group_of(found, "aux1.fc1").channels_after == 512


class TrainedOtherwise(nn.Module):
    """A convolution of its own for training, which stands where the other one does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 16), nn.Linear(16, 5)
        self.block = Alternatives()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Alternatives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = conv_bn(16, 16), conv_bn(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.slow(x) if self.training else self.fast(x)


def test_what_training_uses_instead_is_refused_by_name():
    with pytest.raises(
        PruningError,
        match=r"TrainedOtherwise uses block\.slow\.0 in training only, and not beside the "
        r"layers that evaluation uses \(block\.fast\.0 is left out\)",
    ):
        plan(TrainedOtherwise(), IMAGE, sparsity=0.5)


def test_a_layer_that_is_never_called_is_only_mentioned():
    network = Grouped()
    network.leftover = nn.Linear(4, 4)
    assert reasons(plan(network, IMAGE, sparsity=0.5))["leftover"].startswith("is not called by the forward pass")


@pytest.mark.parametrize("network", ODD_NETWORKS)
def test_planning_changes_nothing(network):
    model = randomise(network()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = plan(model, torch.zeros(1, 3, 28, 28), sparsity=0.5)
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(found.as_dict()))["groups"][0]["channels_after"] >= 8


def test_every_pruner_says_what_it_does():
    for name, pruner in PRUNERS.items():
        assert pruner.name == name and pruner.summary.endswith(".")
        assert "arXiv" in pruner.paper or pruner.paper.startswith("NNI 3.0")


_CONTAINED = """
import logging, sys, warnings
import torch, torch.fx
from torch.utils import _pytree
from torch.fx.immutable_collections import immutable_list
from compress import pruning, nni_bridge
import compress.pruning.plan
assert "nni" not in sys.modules, "importing compress imports nni"
registries = (_pytree.SUPPORTED_NODES, _pytree.SUPPORTED_SERIALIZED_TYPES, _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE)
before = [dict(one) for one in registries]
root = logging.getLogger()
warnings.simplefilter("error")
state = (root.level, list(root.handlers), list(warnings.filters))
nni_bridge.import_nni()
assert state == (root.level, list(root.handlers), list(warnings.filters))
logger = logging.getLogger("nni")
assert logger.handlers == [] and logger.level == logging.NOTSET, (logger.handlers, logger.level)
for one, was in zip(registries, before):
    changed = [key for key in was if one.get(key) is not was[key]]
    assert not changed, changed
assert _pytree.tree_flatten(immutable_list([1, 2]))[0] == [1, 2]
with nni_bridge.quiet():
    print("never shown")
    logging.getLogger("nni.compression").error("never shown")
    torch.rand(3)
print("end", logging.getLogger("nni").level)
"""


def test_importing_nni_changes_nothing_for_the_process():
    done = subprocess.run([sys.executable, "-c", _CONTAINED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end 0\n" and "never shown" not in done.stderr
