"""Reparametrized weights become plain ones on the copy alone, and SyncBatchNorm becomes BatchNorm."""

from __future__ import annotations

import pytest
import torch
from opening import answer, opened
from reparametrized import REPARAMETRIZED
from torch import nn
from torch.nn.utils import parametrizations
from user_classifiers import Net, trained_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrizations_are_made_permanent_on_the_copy_alone(name):
    build, text = REPARAMETRIZED[name]
    net = build().eval()
    before, state = answer(net), {key: value.clone() for key, value in net.state_dict().items()}
    opening = opened(net)
    assert len(opening.notes) == 1 and text in opening.notes[0]
    assert torch.allclose(answer(opening.model), before, atol=1e-6)
    assert set(opening.model.state_dict()) == set(Net().state_dict()), "plain weights under their plain names"
    assert [type(one) for one in opening.model.modules()] == [type(one) for one in Net().modules()]
    assert not any(one._forward_pre_hooks for one in opening.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()) and len(state) == len(
        net.state_dict()
    )
    assert torch.equal(answer(net), before), "the user's module still computes its weights"


def test_a_frozen_weight_stays_frozen_when_it_is_made_permanent():
    net = parametrizations.weight_norm(Net().conv2).requires_grad_(False)
    layers = opened(nn.Sequential(Net().conv1, net, nn.AdaptiveAvgPool2d(1), nn.Flatten())).model
    assert [one.requires_grad for one in layers[1].parameters()] == [False, False] and layers[0].weight.requires_grad


def test_synced_batch_norms_become_those_of_their_dimensions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(trained_values(net))
    net[1].weight.requires_grad_(False)
    opening = opened(net)
    assert opening.notes == ("2 SyncBatchNorm layers were turned into BatchNorm1d and BatchNorm2d.",)
    assert (type(opening.model[1]), type(opening.model[4])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    assert not opening.model[1].weight.requires_grad and opening.model[1].bias.requires_grad
    assert torch.equal(answer(opening.model), answer(net)) and type(net[1]) is nn.SyncBatchNorm
