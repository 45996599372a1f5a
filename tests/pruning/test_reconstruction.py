"""Least-squares reconstruction: against closed forms, against layers that can be recovered exactly, and left alone."""

import copy

import pytest
import torch
from torch import nn

from compress.pruning import reconstruction
from compress.pruning.reconstruction import reconstruct

EVEN = torch.tensor([True, False] * 4)


def images(count=64, size=8, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def twins():
    """A network whose every second channel repeats the one before it, and the same without the repeats."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
        nn.Flatten(),
    ).eval()
    with torch.no_grad():
        dense[0].weight[1::2], dense[0].bias[1::2] = dense[0].weight[::2], dense[0].bias[::2]
    shrunk = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Flatten(),
    ).eval()
    shrunk[0].weight.data, shrunk[0].bias.data = dense[0].weight[EVEN].detach(), dense[0].bias[EVEN].detach()
    shrunk[3].weight.data, shrunk[3].bias.data = dense[3].weight[:, EVEN].detach(), dense[3].bias.detach().clone()
    return dense, shrunk


def test_what_removed_channels_gave_is_taken_over_by_those_that_repeat_it(monkeypatch):
    monkeypatch.setattr(reconstruction, "DAMPINGS", (1e-9,))
    dense, shrunk = twins()
    with torch.no_grad():
        dense[1].running_mean.copy_(dense[0](images(512)).mean((0, 2, 3)))
        dense[1].running_var.copy_(dense[0](images(512)).var((0, 2, 3)))
    before = copy.deepcopy(dense.state_dict())
    fresh = images(16, seed=9)
    (refit,) = reconstruct(shrunk, dense, {"0": EVEN}, images(512))
    assert refit.layer == "3", "the first layer answers as before, so it keeps its weights"
    assert refit.error_before > 0.1 and refit.error_after < 1e-6
    torch.testing.assert_close(shrunk(fresh), dense(fresh), atol=1e-3, rtol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, (3, 1), padding=(1, 0), dilation=(2, 1), bias=False),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Linear(6, 5),
    ],
    ids=str,
)
def test_a_layer_is_the_matrix_product_that_is_solved(layer):
    maps = torch.randn(4, 6, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(4, 7, 6)
    answers = layer(maps)
    wanted = answers.movedim(1, -1) if isinstance(layer, nn.Conv2d) else answers
    inputs = layer.weight[0].numel() + (layer.bias is not None)
    for part in reconstruction._equations(layer, [maps], [wanted], inputs, 8):
        assert part.answers.numel() > 0
        torch.testing.assert_close(part.inputs @ part.weights, part.answers, atol=1e-5, rtol=1e-5)
        assert part.residual(torch.zeros(())).abs().max() < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_the_change_solves_the_normal_equations(groups):
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 6, 1, groups=groups, bias=False)
    maps, wanted = torch.randn(40, 4, 3, 3), torch.randn(40, 3, 3, 6)
    fit, _ = reconstruction._equations(layer, [maps], [wanted], layer.weight[0].numel(), 8)
    damping = reconstruction.DAMPINGS[1]
    change = list(reconstruction._solutions(fit))[1]
    x, y, pruned = fit.inputs.double(), fit.answers.double(), fit.weights.double()
    gram = x.transpose(1, 2) @ x
    step = float(maps.abs().max()) / 127
    ridge = torch.diag_embed(damping * (gram.diagonal(dim1=1, dim2=2)))
    rounding = torch.eye(gram.shape[1]) * x.shape[1] * step**2 / 12
    best = torch.linalg.solve(gram + rounding + ridge, x.transpose(1, 2) @ y + ridge @ pruned)
    torch.testing.assert_close(change.double(), (best - pruned).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", [20, 200])
def test_fewer_positions_than_inputs_give_the_same_change(positions):
    torch.manual_seed(2)
    x, right = torch.randn(2, positions, 60), torch.randn(2, 60, 5).double()
    ridges = [torch.rand(2, 60, 1).double() + damping for damping in reconstruction.DAMPINGS]
    found = zip(
        reconstruction._by_inputs(x, right, ridges), reconstruction._by_positions(x, right, ridges), strict=True
    )
    for one, other in found:
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_weights_that_cancel_each_other_are_not_used_where_inputs_are_rounded(monkeypatch):
    """Two inputs that hardly differ: their difference, magnified, fits best, and 8 bits cannot tell them apart."""
    monkeypatch.setattr(reconstruction, "DAMPINGS", (1e-9,))
    torch.manual_seed(3)
    layer = nn.Linear(2, 1, bias=False)
    common, little = torch.randn(4000, 1), 1e-3 * torch.randn(4000, 1)
    read, wanted = torch.cat([common, common + little], 1), common + 300 * little
    found = {}
    for bits in (8, 16):
        fitted = copy.deepcopy(layer)
        with torch.no_grad():
            reconstruction._refit(fitted, [read], [wanted], bits)
        step = float(read.abs().max()) / 127
        rounded = fitted((read / step).round() * step)
        found[bits] = float((rounded - wanted).square().mean())
    assert found[8] < 0.2 and found[16] > 1, found


def test_added_changes_move_the_answers_as_solved():
    torch.manual_seed(2)
    layer = nn.Conv2d(4, 6, 3, groups=2)
    change = torch.randn(2, layer.weight[0].numel() + 1, 3)
    maps = torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        (fit, _) = reconstruction._equations(
            layer, [maps], [layer(maps).movedim(1, -1)], layer.weight[0].numel() + 1, 8
        )
        reconstruction._add(layer, change)
        (moved, _) = reconstruction._equations(
            layer, [maps], [layer(maps).movedim(1, -1)], layer.weight[0].numel() + 1, 8
        )
    torch.testing.assert_close(moved.answers, fit.answers + fit.inputs @ change, atol=1e-4, rtol=1e-4)


def test_what_is_right_frozen_wide_or_oddly_padded_keeps_its_weights(monkeypatch):
    dense, same = twins()[0], twins()[0]
    reconstruct(dense, copy.deepcopy(dense), {}, images(512))  # statistics of these very images
    same.load_state_dict(dense.state_dict())
    assert reconstruct(same, dense, {}, images(512)) == ()
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), dense.parameters(), strict=True))

    for spoil in (
        lambda layer: layer.requires_grad_(False),
        lambda layer: setattr(layer, "padding_mode", "reflect"),
        lambda layer: monkeypatch.setattr(reconstruction, "MOST_INPUTS", 36),
    ):
        dense, shrunk = twins()
        spoil(shrunk[3])
        kept_as_is = shrunk[3].weight.detach().clone()
        assert reconstruct(shrunk, dense, {"0": EVEN}, images(64)) == ()
        assert torch.equal(shrunk[3].weight, kept_as_is)


def test_batchnorm_takes_the_statistics_of_what_it_reads():
    dense, shrunk = twins()
    shown = images(512, seed=3) * 7 + 3
    reconstruct(shrunk, dense, {"0": EVEN}, shown)
    with torch.no_grad():
        normalised = shrunk[1](shrunk[0](shown))
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-3
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 0.02
    assert not any(module.training for module in shrunk.modules()) and shrunk[1].momentum == 0.1


def test_fewer_images_where_all_would_take_too_much_memory(monkeypatch):
    dense, shrunk = twins()
    seen = []
    monkeypatch.setattr(reconstruction, "MEMORY", 40 * 2**20)
    graphs = [reconstruction.trace(model) for model in (shrunk, dense)]
    assert reconstruction.affordable(*graphs, images(1, size=64)) < 512
    monkeypatch.setattr(shrunk[0], "forward", lambda x, f=shrunk[0].forward: seen.append(len(x)) or f(x))
    monkeypatch.setattr(reconstruction, "MEMORY", 1)
    reconstruct(shrunk, dense, {"0": EVEN}, images(512))
    assert sum(seen) <= reconstruction.CHUNK + 3, "three prove the graph"
