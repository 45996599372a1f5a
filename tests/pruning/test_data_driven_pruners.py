"""Pruners that look at images or train, each by the definition of its paper on small cases."""

from __future__ import annotations

import pytest
import torch
from pruning_networks import (
    Residual,
    conv_bn,
    example,
    one_layer,
    randomise,
    training,
)
from torch import Tensor, nn
from torch.nn import functional as F

from compress import nni_bridge
from compress.errors import RequestError
from compress.pruning import (
    channel_statistics,
    plan,
    prune,
    require_usable,
)
from compress.pruning.interface import Group, Plan
from compress.pruning.nni import data_driven
from compress.pruning.nni.config import config_list

torch.set_num_threads(1)


PIXELS = torch.tensor([-1.0, 1.0, 3.0, 5.0]).view(1, 1, 2, 2)


def scores(model: nn.Module, found: Plan, statistic: str, images: Tensor = PIXELS) -> Tensor:
    return channel_statistics.activation_scores(model, images, found, [(images, torch.zeros(1))], statistic)[0]


def test_apoz_and_mean_activation_by_hand():
    """Behind the ReLU the channels hold (0 1 3 5), (1 0 0 0), (0 0 1 3) and (1/2 1/2 1/2 1/2)."""
    model, found = one_layer([1.0, -1.0, 1.0, 0.0], [0.0, 0.0, -2.0, 0.5])
    apoz = 1 - scores(model, found, "activation-apoz")
    assert apoz.tolist() == [0.25, 0.75, 0.5, 0.0]
    assert scores(model, found, "activation-mean").tolist() == [2.25, 0.25, 1.0, 0.5]
    how = training(2, steps=1, rounds=1, batches=lambda epoch: [(PIXELS, torch.zeros(1, dtype=torch.long))])
    for pruner, kept in (("activation-apoz", [0, 3]), ("activation-mean", [0, 2])):
        result = prune(model, PIXELS, found, pruner, how)
        assert result.kept_channels["0"].nonzero().flatten().tolist() == kept


def test_without_an_activation_function_what_is_read_counts():
    model = nn.Sequential(*one_layer([1.0, -1.0])[0][:1], nn.Conv2d(2, 2, 1))
    found = Plan((Group(("0",), 2, 1, "no other layer shares its channels"),), ())
    assert scores(model, found, "activation-apoz").tolist() == [0.75, 0.25]
    assert scores(model, found, "activation-mean").tolist() == [2.5, 2.5]


def test_a_residual_stream_is_judged_wherever_its_channels_show():
    model = randomise(Residual())
    found = plan(model, example(), sparsity=0.5)
    seen: list[Tensor] = []
    for module in (model.stem[2], model.relu):
        module.register_forward_hook(lambda _, __, output: seen.append((output > 0).float().mean((0, 2, 3))))
    with torch.no_grad():
        model(example())
    stream = next(index for index, group in enumerate(found.groups) if "stem.0" in group.layers)
    measured = channel_statistics.activation_scores(model, example(), found, [(example(), None)], "activation-apoz")[
        stream
    ]
    assert torch.allclose(measured, torch.stack(seen[:2]).mean(0))


@pytest.mark.parametrize("known", [True, False])
def test_taylor_is_the_squared_product_of_gradient_and_weight(known):
    """With unknown labels the model's own answers stand in."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(conv_bn(3, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    how = training(16, steps=4, known=known)
    weight, importance = model[0][0].weight, torch.zeros(32)
    for images, labels in how.batches(0):
        logits = model(images)
        loss = F.cross_entropy(logits, labels if known else logits.argmax(1))
        (gradient,) = torch.autograd.grad(loss, weight)
        importance += (gradient * weight).square().flatten(1).sum(1).detach()
    result = prune(model, example(), plan(model, example(), sparsity=0.5), "taylor", how)
    best = importance.topk(16).indices.sort().values
    assert importance.min() > 0 and torch.equal(result.kept_channels["0.0"].nonzero().flatten(), best)


def test_slim_keeps_the_largest_factors_after_pulling_them_to_zero():
    """With a loss that asks for nothing, the penalty moves each factor by SLIM_REACH."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(conv_bn(3, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    factors = torch.linspace(-2, 1.8, 32)[torch.randperm(32)]
    model[0][1].weight.data.copy_(factors)
    how = training(16, steps=20, loss=lambda model, images, labels: 0 * model(images).sum())
    result = prune(model, example(), plan(model, example(), sparsity=0.5), "slim", how)
    kept = factors.abs().topk(16).indices.sort().values
    assert torch.equal(result.kept_channels["0.0"].nonzero().flatten(), kept)
    assert torch.allclose(factors[kept] - result.model[0][1].weight, 0.25 * factors[kept].sign(), atol=1e-4)


class Slimmed(nn.Module):
    """BatchNorm over a concatenation, and a layer that no BatchNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(24, 16, 1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))).mean((2, 3)))


def test_batchnorm_factors_are_carried_to_the_layers_before_them():
    model = Slimmed()
    groups = tuple(Group((name,), model.get_submodule(name).out_channels, 4, "") for name in "abc")
    found = channel_statistics.normalised_groups(model, example(), Plan(groups, ()))
    assert [[(name, place.start, place.channels) for name, place in group] for group in found] == [
        [("norm", 0, 16)], [("norm", 16, 8)], [],
    ]  # fmt: skip
    factors, fallback = torch.arange(24.0) - 12, torch.arange(16.0)
    first, second, third = channel_statistics.factor_scores(found, {"norm": factors}, lambda group: group * fallback)
    assert torch.equal(first, factors[:16].abs()) and torch.equal(second, factors[16:].abs())
    assert torch.equal(third, 2 * fallback)


def test_slim_is_refused_without_batchnorm():
    model, found = one_layer([1.0, 2.0])
    sentence = (
        "pruner: got 'slim', expected another one, such as l1-norm, because no layer that can be pruned in Sequential"
    )
    with pytest.raises(RequestError, match=sentence):
        require_usable(model, PIXELS, found, "slim", has_images=True)
    with pytest.raises(RequestError, match=sentence):
        prune(model, PIXELS, found, "slim", training(2))


def test_admm_projects_and_adds_up_by_hand():
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2))
    model[0].weight.data.copy_(torch.tensor([[4.0], [3.0], [-2.0], [1.0]]))
    found = Plan((Group(("0",), 4, 2, ""),), ())
    with nni_bridge.quiet():
        pruner = data_driven._on_nni(data_driven.ADMM, data_driven._PRUNER)(model, config_list(model, found), None, 1)
        pruner.start()
        assert pruner.pruned["0"].flatten().tolist() == [4, 3, 0, 0]
        assert pruner.distance().item() == 4 + 1  # W - Z is (0 0 -2 1), U is 0
        pruner.update()
        assert pruner.dual["0"].flatten().tolist() == [0, 0, -2, 1]
        assert pruner.distance().item() == 16 + 4  # W - Z + U is (0 0 -4 2)
        pruner.update()
        assert pruner.pruned["0"].flatten().tolist() == [4, 0, -4, 0]  # of W + U, (4 3 -4 2)
        assert pruner.dual["0"].flatten().tolist() == [0, 3, 0, 2]


def test_the_projection_of_a_group_is_joint():
    """Squares 9 + 0 against 4 + 2.25 keep the first channel; averaged norms, 3 + 0 against 2 + 1.5, would not."""
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(1, 2))
    model[0].weight.data.copy_(torch.tensor([[3.0], [2.0]]))
    model[1].weight.data.copy_(torch.tensor([[0.0], [1.5]]))
    found = Plan((Group(("0", "1"), 2, 1, ""),), ())
    with nni_bridge.quiet():
        pruner = data_driven._on_nni(data_driven.ADMM, data_driven._PRUNER)(model, config_list(model, found), None, 1)
        pruner.start()
    assert [weights.flatten().tolist() for weights in pruner.pruned.values()] == [[3, 0], [0, 0]]


def test_admm_pulls_the_weights_that_will_go(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )
    norms = model[0].weight.flatten(1).norm(dim=1).detach()
    last: list[Tensor] = []

    def loss(wrapped: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        last.append(wrapped[0]._nni_wrapper.weight.detach().flatten(1).norm(dim=1))
        return 0 * wrapped(images).sum()

    monkeypatch.setattr(data_driven, "ADMM_PENALTY", 0.5)
    wanted = plan(model, example(), sparsity=0.5)
    kept = prune(model, example(), wanted, "admm", training(16, steps=20, loss=loss)).kept_channels["0"]
    assert torch.equal(kept.nonzero().flatten(), norms.topk(16).indices.sort().values)
    assert (last[-1][~kept] < 0.3 * norms[~kept]).all() and torch.allclose(last[-1][kept], norms[kept], rtol=0.02)


def masks_seen(pruner: str, rounds: int, steps: int) -> tuple[list[int], list[bool], Tensor]:
    """Channels masked before each step, and whether the weights are the original ones there; the kept channels."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(conv_bn(3, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    weight, masked, original = model[0][0].weight.detach().clone(), [], []

    def loss(wrapped: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        wrapper = wrapped[0][0]._nni_wrapper
        masked.append(int((wrapper.weight_mask.flatten(1).amax(1) == 0).sum()))
        original.append(torch.equal(wrapper.weight, weight))
        return F.cross_entropy(wrapped(images), labels)

    how = training(16, steps=steps, rounds=rounds, loss=loss)
    result = prune(model, example(), plan(model, example(), sparsity=0.5), pruner, how)
    return masked, original, result.kept_channels["0.0"]


def test_gradual_schedules_prune_train_and_prune_again():
    """16 of 32 channels go in four rounds: int(16.5 times the share) after each."""
    linear, originals, kept = masks_seen("linear", 4, 8)
    assert linear == [0, 0, 4, 4, 8, 8, 12, 12] and int(kept.sum()) == 16
    assert originals == [True] + [False] * 7, "the pruned layer trains"
    agp, _, _ = masks_seen("agp", 4, 8)
    assert agp == [0, 0, 9, 9, 14, 14, 16, 16]  # 1 - (3/4)^3, 1 - (1/2)^3, 1 - (1/4)^3


def test_a_lottery_ticket_goes_back_to_the_original_weights():
    """(15.5 / 32)^(1/2) of the channels are left after one of two rounds: 32 * (1 - 0.696) = 9.7 are masked."""
    masked, original, kept = masks_seen("lottery-ticket", 2, 6)
    assert masked == [0, 0, 0, 9, 9, 9] and int(kept.sum()) == 16
    assert original == [True, False, False, True, False, False]


def test_a_lottery_ticket_never_takes_a_channel_back():
    """4 * (1 - 0.375^(1/2)) = 1.5 and 4 * (1 - 0.375) = 2.5 channels go in two rounds, rounded down."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2))
    model[0].weight.data.copy_(torch.tensor([[4.0], [3.0], [2.0], [1.0]]))
    wanted = config_list(model, Plan((Group(("0",), 4, 2, ""),), ()))
    with nni_bridge.quiet():
        pruner = data_driven._on_nni(data_driven.LotteryTicket, data_driven._SCHEDULED)(model, wanted, None, 2)
        for times, masked in ((1, [3]), (2, [2, 3])):
            pruner.update_sparse_goals(times)
            pruner.update_masks(pruner.generate_masks())
            assert (pruner.get_masks()["0"]["weight"].flatten() == 0).nonzero().flatten().tolist() == masked
            pruner._target_spaces["0"]["weight"].target.data[3] = 100.0


def test_movement_masks_while_it_trains():
    masked, originals, kept = masks_seen("movement", 1, 12)
    assert masked[:4] == [0, 0, 0, 0] and masked == sorted(masked) and masked[-1] == 16 == int(kept.sum())
    assert originals == [True] + [False] * 11
