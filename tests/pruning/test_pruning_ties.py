"""Weights with several readers, tensors without a layer, and plans that remove little: what is pruned, what is told."""

from __future__ import annotations

import pytest
import torch
from pruning_networks import conv_bn, randomise, training
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d
from user_modules_pruning import Mostly, Recurrent, Tied, TiedOtherwise

from compress import models
from compress.models import counting
from compress.preprocessing import Preprocessing
from compress.pruning import Plan, plan, prune, shortfall

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def shrunk(network, pruner: str = "l1-norm"):
    torch.manual_seed(0)
    model = randomise(network()).eval()
    result = prune(model, IMAGES, plan(model, IMAGES, sparsity=0.5), pruner, training(16, classes=4))
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    return result


def reasons(found: Plan) -> dict[str, str]:
    return {left.layer: left.reason for left in found.unpruned}


@pytest.mark.parametrize("pruner", ["l1-norm", "taylor", "agp"])
def test_a_tied_weight_is_one_parameter_after_pruning(pruner):
    result = shrunk(Tied, pruner)
    assert result.plan.layers["one"].layers == ("stem.0", "one", "two")
    assert result.plan.layers["one"].reason == "one and two share a weight"
    assert result.model.one.weight is result.model.two.weight and result.model.left.bias is result.model.right.bias
    assert result.model.one.weight.shape[:2] == (16, 16) and result.model.hidden.weight.shape == (24, 24)
    assert len(list(result.model.parameters())) == len(list(Tied().parameters()))


def test_a_tie_survives_saving_rebuilding_and_training(tmp_path):
    result = shrunk(Tied)
    recipe = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    models.save(result.model, tmp_path, architecture=None, preprocessing=recipe, class_names=())
    rebuilt = models.rebuild(tmp_path, model=Tied())
    assert rebuilt.one.weight is rebuilt.two.weight and rebuilt.left.bias is rebuilt.right.bias
    assert torch.equal(rebuilt(IMAGES), result.model.eval()(IMAGES))
    optimizer = torch.optim.SGD(rebuilt.parameters(), lr=0.1)
    rebuilt.train()(IMAGES).square().mean().backward()
    optimizer.step()
    assert torch.equal(rebuilt.one.weight, rebuilt.two.weight)


def test_a_weight_that_is_also_read_in_another_way_is_not_pruned():
    result = shrunk(TiedOtherwise)
    told = reasons(result.plan)["body"]
    assert told.startswith("its channels are rearranged by transpose() in forward (user_modules_pruning.py, line ")
    assert list(result.plan.layers) == ["free.0"]


def test_a_block_that_is_called_again_and_again_gives_the_channels_that_it_reads():
    result = shrunk(Recurrent)
    assert result.plan.layers["stem"].layers == ("stem", "block.1")
    assert result.model.block[1].out_channels == result.model.block[0][0].in_channels == 16


def test_a_frozen_norm_is_pruned_with_its_layer():
    torch.manual_seed(0)
    model = randomise(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4, norm_layer=FrozenBatchNorm2d))
    images = torch.randn(2, 3, 48, 48)
    result = prune(model, images, plan(model, images, sparsity=0.5), "l1-norm")
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert result.model.bn1.weight.shape == result.model.bn1.running_var.shape == (32,)
    assert counting.count_parameters(result.model) < 0.27 * counting.count_parameters(model)


class Normed(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 3),
            norm,
            nn.ReLU(),
            conv_bn(64, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


def test_group_norm_loses_whole_groups():
    result = shrunk(lambda: Normed(nn.GroupNorm(4, 64)))
    assert (result.model[1].num_groups, result.model[1].num_channels, result.plan.layers["0"].unit) == (2, 32, 16)
    rows = result.kept_channels["0"].view(4, 16)
    assert bool((rows.all(1) | ~rows.any(1)).all())


def test_sync_batch_norm_is_pruned():
    result = shrunk(lambda: Normed(nn.SyncBatchNorm(64)))
    assert type(result.model[1]) is nn.SyncBatchNorm and result.model[1].running_mean.shape == (32,)


class Unsaved(nn.Module):
    """A buffer that a rebuilt model would make anew, in its first size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 32), conv_bn(32, 32), nn.Linear(32, 4)
        self.register_buffer("scale", torch.rand(1, 32, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x) * self.scale).mean((2, 3)))


def test_a_buffer_that_is_not_saved_keeps_its_layer_and_says_what_to_do():
    found = shrunk(Unsaved).plan
    assert reasons(found)["stem.0"] == (
        "meets scale, which is not saved with the model; make it a parameter or a persistent buffer"
    )


def test_a_plan_that_removes_little_says_why_and_what_would_help():
    result = shrunk(Mostly)
    kept = counting.count_parameters(result.model)
    told = shortfall(Mostly(), result.plan, 0.5, 8, kept, 0.1)
    assert told is not None and told.startswith(
        "Only 10 % of the parameters (10 % of the multiply-accumulates) can be removed at 50 % sparsity: 100 % of them are "
        "in layers that are not pruned: 80 % in wider (its channels go through sort() in forward (user_modules_pruning.py, line "
    )
    assert "20 % in wide (its channels are rearranged by view() in channel_shuffle" in told and "head" not in told
    assert told.endswith("or take a smaller network.") and "write the operations named here" in told
    enough = shrunk(Tied)
    assert shortfall(Tied(), enough.plan, 0.5, 8, counting.count_parameters(enough.model)) is None


def test_what_the_user_keeps_whole_does_not_fall_short():
    model = Tied()
    found = plan(model, IMAGES, sparsity=0.5, exclude=["one", "left"])
    result = prune(model, IMAGES, found, "l1-norm")
    assert shortfall(model, found, 0.5, 8, counting.count_parameters(result.model)) is None
