"""`compress.load` opens a fresh instance in the same way, before it loads the weights of a run."""

from __future__ import annotations

import pytest
import torch
from opening import answer, opened
from reparametrized import REPARAMETRIZED, masked
from torch import nn
from user_classifiers import ANSWERS, CLASSES, SIZE, WIDTH, Answering, Flagged, KeywordOnly, Net

import compress
from compress import models
from compress.errors import CheckpointError, CompressError
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


def flagged_in_a_wrapper() -> nn.Module:
    return nn.DataParallel(Flagged())


FRESH = {
    "wrapped": flagged_in_a_wrapper,
    "half": lambda: Net().half(),
    "synced": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()),
    "keyword": KeywordOnly,
    "logits in a dictionary": lambda: Answering(ANSWERS["a dictionary with features"]),
    "flattened": lambda: Answering(ANSWERS["maps of one pixel"]),
    **{name: build for name, (build, _) in REPARAMETRIZED.items()},
}


def saved(model: nn.Module, folder) -> nn.Module:
    """As the fine-tuned model of a run, with fewer channels."""
    small = opened(model).model
    kept = torch.arange(WIDTH // 2)
    small.conv1.weight, small.conv1.bias = (
        nn.Parameter(one.data[kept]) for one in (small.conv1.weight, small.conv1.bias)
    )
    small.conv2.weight = nn.Parameter(small.conv2.weight.data[:, kept])
    small.conv1.out_channels = small.norm1.num_features = small.conv2.in_channels = len(kept)
    for name in ("weight", "bias"):
        setattr(small.norm1, name, nn.Parameter(getattr(small.norm1, name).data[kept]))
    for name in ("running_mean", "running_var"):
        setattr(small.norm1, name, getattr(small.norm1, name)[kept])
    recipe = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)
    models.save(small, folder / "artifacts", architecture=None, preprocessing=recipe, class_names=())
    return small


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_instance_is_opened_in_the_same_way(name, tmp_path):
    small = saved(FRESH[name](), tmp_path)
    fresh = FRESH[name]()
    again = compress.load(tmp_path, model=fresh)
    assert torch.equal(answer(again), answer(small)) and answer(again).shape == (3, CLASSES)
    assert next(iter(fresh.state_dict().values())).shape[0] == WIDTH, "the instance stays as it is"


def test_a_plain_instance_does_for_a_reparametrized_one(tmp_path):
    small = saved(masked(), tmp_path)
    assert torch.equal(answer(compress.load(tmp_path, model=Net())), answer(small))
    with pytest.raises(CheckpointError, match="but model= is a torch.nn.modules.linear.Linear: give an instance"):
        compress.load(tmp_path, model=nn.Linear(3, 3))
    with pytest.raises(CompressError, match="this is the class: give model=Net"):
        compress.load(tmp_path, model=Net)
