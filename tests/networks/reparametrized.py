"""Small classifiers whose weights torch.nn.utils computes before each forward pass: masks, norms, parametrizations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from user_classifiers import SIZE, Net, trained_values


def masked() -> nn.Module:
    net = trained_values(Net())
    prune.l1_unstructured(net.conv2, "weight", 0.25)
    prune.l1_unstructured(net.conv2, "weight", 0.25)  # a container of two
    prune.ln_structured(net.conv1, "weight", 0.5, n=2, dim=0)
    net(torch.rand(2, 3, SIZE, SIZE))  # leaves weights with a history, which torch refuses to copy
    return net


def normalised(norm, *names: str) -> nn.Module:
    net = trained_values(Net())
    for name in names:
        norm(net.get_submodule(name))
    net(torch.rand(2, 3, SIZE, SIZE))
    return net.eval()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def with_own_parametrization() -> nn.Module:
    net = trained_values(Net())
    parametrize.register_parametrization(net.conv2, "weight", Doubled())
    parametrize.register_parametrization(net.conv2, "bias", Doubled())
    parametrize.register_parametrization(net.norm2, "running_mean", Doubled())
    return net


REPARAMETRIZED = {
    "masks": (masked, "The masks of torch.nn.utils.prune on 2 tensors were made permanent: "),
    "weight_norm": (lambda: normalised(nn.utils.weight_norm, "conv1", "head"), "(WeightNorm of 2 tensors)"),
    "weight_norm, new": (lambda: normalised(parametrizations.weight_norm, "conv1"), "(WeightNorm of 1 tensor)"),
    "spectral_norm": (lambda: normalised(nn.utils.spectral_norm, "conv2"), "(SpectralNorm of 1 tensor)"),
    "spectral_norm, new": (lambda: normalised(parametrizations.spectral_norm, "conv2"), "(SpectralNorm of 1 tensor)"),
    "orthogonal": (lambda: normalised(parametrizations.orthogonal, "head"), "(Orthogonal of 1 tensor)"),
    "own": (with_own_parametrization, "(Doubled of 3 tensors)"),
}
