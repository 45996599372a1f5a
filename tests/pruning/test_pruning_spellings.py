"""The same thing spelled in torch's many ways: pruned and proved equal, or left whole with the line that is the reason."""

from __future__ import annotations

import re

import pytest
import torch
from pruning_networks import randomise
from user_modules_pruning import FOLLOWED, SIZE, STAYS, Spelled

from compress.pruning import plan, prune

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def network(operation) -> Spelled:
    torch.manual_seed(0)
    return randomise(Spelled(operation)).eval()


@pytest.mark.parametrize("spelling", FOLLOWED)
def test_what_treats_each_channel_alone_is_pruned_and_equal(spelling):
    model = network(FOLLOWED[spelling])
    found = plan(model, IMAGES, sparsity=0.5)
    assert {"first.0", "last"} <= found.layers.keys(), [left for left in found.unpruned if left.layer == "first.0"]
    result = prune(model, IMAGES, found, "l1-norm")
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert result.model.first[0].out_channels == 16 and result.model.last.out_channels == 16


@pytest.mark.parametrize("spelling", STAYS)
def test_what_mixes_channels_leaves_their_layer_whole_and_names_the_line(spelling):
    operation, reason = STAYS[spelling]
    model = network(operation)
    found = plan(model, IMAGES, sparsity=0.5)
    told = next(left.reason for left in found.unpruned if left.layer == "first.0")
    assert re.search(reason, told), told
    result = prune(model, IMAGES, found, "l1-norm")
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert result.model.first[0].out_channels == 32 and result.model.last.out_channels == 16
