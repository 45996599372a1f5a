"""Every pruner: the counts and weights that it keeps, and what it refuses; the registry; single weights."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from pruning_networks import (
    Concatenations,
    FlattenByView,
    Grouped,
    Residual,
    SharedAndTied,
    SqueezeExcitation,
    example,
    one_layer,
    randomise,
    training,
)

from compress import nni_bridge
from compress.errors import PruningError, RequestError, TrainingError
from compress.pruning import (
    PRUNERS,
    SEARCHES,
    PruningTraining,
    plan,
    plan_without_shrinking,
    prune,
    require_usable,
    zero_weights,
)
from compress.request.fields import PrunerName
from compress.search.strategies import STRATEGIES

pytestmark = pytest.mark.integration

torch.set_num_threads(1)

SHRINKING = [name for name, pruner in PRUNERS.items() if not pruner.fine_grained]
PIXELS = torch.tensor([-1.0, 1.0, 3.0, 5.0]).view(1, 1, 2, 2)
WITH_IMAGES = [name for name, pruner in PRUNERS.items() if pruner.needs_images]
TRAINED = {"slim", "linear", "agp", "movement", "admm"}


# ---- the registry -------------------------------------------------------------------------------------------------


def test_the_registry_the_request_and_nni_agree():
    assert {*PRUNERS, "none"} == set(get_args(PrunerName))
    assert not set(SEARCHES) & set(PRUNERS)
    assert set(SEARCHES) <= set(STRATEGIES)
    assert [name for name, pruner in PRUNERS.items() if pruner.fine_grained] == ["level"]
    assert all(bool(pruner.function) == pruner.needs_images for pruner in PRUNERS.values())
    assert {name for name, pruner in PRUNERS.items() if pruner.leaves_trained} == TRAINED
    classes = [nni_bridge.load("nni.compression.pruning"), nni_bridge.load("nni.compression.pruning.scheduled_pruner"),
               nni_bridge.load("nni.compression.base.compressor")]  # fmt: skip
    for name, pruner in PRUNERS.items():
        assert pruner.name == name and all((pruner.title, pruner.summary, pruner.needs_data, pruner.cost, pruner.paper))
        assert any(hasattr(module, pruner.nni_class) for module in classes)


# ---- every pruner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", SHRINKING)
def test_counts_equality_weights_and_everything_left_as_found(pruner):
    torch.manual_seed(0)
    model = randomise(Residual()).train()
    model.stem.eval()
    model.inner[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    result = prune(model, example(), plan(model, example(), sparsity=0.5), pruner, training(16))
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not hasattr(model.stem[0], "_nni_wrapper") and all(p.grad is None for p in model.parameters())
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert {layer: int(rows.sum()) for layer, rows in result.kept_channels.items()} == {
        "stem.0": 8, "inner.0": 16, "outer.0": 8,
    }  # fmt: skip
    assert not result.model.stem.training and result.model.inner.training
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    read = {
        "stem.0": slice(None),
        "inner.0": result.kept_channels["stem.0"],
        "outer.0": result.kept_channels["inner.0"],
    }
    for layer, inputs in read.items():
        kept = before[f"{layer}.weight"][result.kept_channels[layer]][:, inputs]
        stays = layer == "inner.0" or not PRUNERS[pruner].leaves_trained
        assert torch.equal(kept, result.model.get_submodule(layer).weight) == stays, layer


@pytest.mark.parametrize("network", [SqueezeExcitation, Grouped, Concatenations, SharedAndTied, FlattenByView])
@pytest.mark.parametrize("pruner", WITH_IMAGES)
def test_gates_groups_and_concatenations_are_equal_to_their_masked_models(network, pruner):
    torch.manual_seed(0)
    model, images = randomise(network()), example(28)
    wanted = plan(model, images, sparsity=0.5)
    result = prune(model, images, wanted, pruner, training(28, steps=4))
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    for layer, group in wanted.layers.items():
        assert result.model.get_submodule(layer).weight.shape[0] == group.channels_after


@pytest.mark.parametrize("pruner", WITH_IMAGES)
def test_the_same_images_choose_the_same_channels(pruner):
    model = randomise(Residual())
    wanted = plan(model, example(), sparsity=0.5)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(prune(model, example(), wanted, pruner, training(16)).model.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


# ---- single weights -----------------------------------------------------------------------------------------------


def test_level_zeroes_the_smallest_weights_and_keeps_every_shape():
    model = randomise(Residual()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = plan_without_shrinking(model, exclude=["head"])
    assert found.groups == () and found.sparse_layers == ("stem.0", "inner.0", "outer.0")
    assert found.unpruned[-1].reason == "is excluded by you"
    result = zero_weights(model, found, 0.3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.model.training and all(parameter.requires_grad for parameter in result.model.parameters())
    for layer, share in result.zeros.items():
        old, new = before[f"{layer}.weight"].flatten(), result.model.get_submodule(layer).weight.flatten()
        gone = int(0.3 * old.numel())
        assert share == pytest.approx(gone / old.numel())
        assert torch.equal((new == 0).nonzero().flatten(), old.abs().topk(gone, largest=False).indices.sort().values)
        assert torch.equal(new[new != 0], old[new != 0])
    assert torch.equal(result.model.head.weight, before["head.weight"])


def test_level_with_everything_excluded_is_refused():
    sentence = "Nothing in Residual can be pruned: 4 of its 4 Conv2d and Linear layers are excluded; exclude fewer"
    with pytest.raises(PruningError, match=sentence):
        plan_without_shrinking(Residual(), exclude=["stem", "inner", "outer", "head"])


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_a_pruner_that_needs_images_is_refused_without_them():
    model, found = one_layer([1.0, 2.0])
    with pytest.raises(RequestError, match="pruner: got 'taylor', expected one that needs no images, because none were "
                                           "given: l1-norm, l2-norm, fpgm, level"):  # fmt: skip
        prune(model, PIXELS, found, "taylor")
    with pytest.raises(RequestError, match="pruner: got 'agp', expected one that needs no images, because data is `none`: "
                                           "l1-norm, l2-norm, fpgm, level"):  # fmt: skip
        require_usable(model, PIXELS, found, "agp", has_images=False)
    require_usable(model, PIXELS, found, "level", has_images=False)


def test_level_shrinks_nothing():
    model, found = one_layer([1.0, 2.0])
    with pytest.raises(RequestError, match="pruner: got 'level', expected one of l1-norm, l2-norm, fpgm, taylor"):
        prune(model, PIXELS, found, "level")


def test_fewer_steps_than_rounds_are_refused():
    with pytest.raises(RequestError, match="rounds: got 5, expected a whole number from 1 to the 4 training steps"):
        PruningTraining(lambda epoch: [], lambda *batch: torch.zeros(()), 4, 0.1, 5)


def test_no_batch_and_a_loss_that_is_not_finite_are_refused():
    model = randomise(Residual())
    wanted = plan(model, example(), sparsity=0.5)
    with pytest.raises(TrainingError, match="too few training images for one batch"):
        prune(model, example(), wanted, "activation-mean", training(16, batches=lambda epoch: []))
    how = training(16, loss=lambda model, images, labels: model(images).sum() * float("nan"))
    with pytest.raises(
        TrainingError, match=r"diverged while pruning: the loss became nan in step 1 at a peak learning rate"
    ):
        prune(model, example(), wanted, "agp", how)
    assert not hasattr(model.stem[0], "_nni_wrapper")
