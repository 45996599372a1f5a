"""Small networks with the structures that pruning has to get right, and BatchNorm statistics that make a check bite."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.randomised import randomise
from compress.pruning import PruningTraining
from compress.pruning.interface import Group, Plan

__all__ = ["ODD_NETWORKS", "Residual", "conv_bn", "example", "one_layer", "randomise", "training"]


def training(
    size: int, *, steps: int = 8, rounds: int = 2, classes: int = 5, known: bool = True, **changes
) -> PruningTraining:
    """Four batches of eight random images with random labels, or unknown ones."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (32,), generator=generator) if known else torch.full((32,), -1)
    given = {
        "batches": lambda epoch: zip(images.split(8), labels.split(8), strict=True),
        "loss": lambda model, batch, truth: F.cross_entropy(model(batch), truth),
        "learning_rate": 0.05,
    }
    return PruningTraining(steps=steps, rounds=rounds, **(given | changes))


def conv_bn(inputs: int, outputs: int, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """Conv-BN-ReLU blocks around an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = conv_bn(3, 16), conv_bn(16, 32)
        self.outer = nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16))
        self.relu, self.head = nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.relu(x + self.outer(self.inner(x))).mean((2, 3)))


def one_layer(weight: list[float], bias: list[float] | None = None) -> tuple[nn.Module, Plan]:
    """A 1 x 1 convolution of one input channel, ReLU, and a head; half of its channels go."""
    conv = nn.Conv2d(1, len(weight), 1, bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weight).view(-1, 1, 1, 1))
        if bias is not None:
            conv.bias.copy_(torch.tensor(bias))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * len(weight), 2)).eval()
    return model, Plan((Group(("0",), len(weight), len(weight) // 2, "no other layer shares its channels"),), ())


def example(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


class FlattenByView(nn.Module):
    """A LeNet: several features per channel reach the first Linear, and only 28 x 28 images fit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 5)
        self.fc1, self.norm, self.fc2 = nn.Linear(32 * 16, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.relu(F.max_pool2d(self.conv2(x), 2))
        x = x.view(x.size(0), -1)
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


class SqueezeExcitation(nn.Module):
    """The original formulation: sizes unpacked, view() both ways, expand_as()."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32), nn.Sigmoid())
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels, _, _ = x.size()
        weight = self.gate(self.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return self.head(self.pool(x * weight.expand_as(x)).flatten(1))


class SpatialGate(nn.Module):
    """A gate of one channel multiplies all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.last = conv_bn(3, 32), nn.Conv2d(32, 1, 1), conv_bn(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x * torch.sigmoid(self.gate(x))).mean((2, 3)))


class Concatenations(nn.Module):
    """Concatenations that are added, read depthwise and flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 16), conv_bn(3, 24), conv_bn(3, 16), conv_bn(3, 24)
        self.depthwise = conv_bn(40, 40, groups=40)
        self.e, self.head = nn.Conv2d(40, 40, 1), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], dim=1)
        return self.head(self.e(self.depthwise(joined)).mean(dim=(2, 3)))


class UnevenConcatenation(nn.Module):
    """A concatenation meets one layer of the same size: their channels cannot be matched one to one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 16), conv_bn(3, 16), conv_bn(3, 32)
        self.free, self.head = conv_bn(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.free(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).mean((2, 3)))


class ByHand(nn.Module):
    """Activations written out, constants added, a PReLU, channels moved to the end and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3, padding=1, stride=2), conv_bn(32, 24)
        self.prelu, self.norm, self.mlp = nn.PReLU(32), nn.BatchNorm2d(48), nn.Linear(48, 32)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.a(x))
        x = self.norm(self.b(x))
        x = x * F.relu6(x + 3) / 6
        x = self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.interpolate(self.c(torch.sigmoid(x)), scale_factor=2.0)
        return self.head(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


class Grouped(nn.Module):
    """Grouped convolutions inside a bottleneck (whole groups), on a residual stream, and of two sizes (evenly)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.inner, self.mid, self.outer = conv_bn(32, 64), conv_bn(64, 64, groups=8), nn.Conv2d(64, 32, 1)
        self.wider = conv_bn(32, 64, groups=4)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.mid(self.inner(x)))
        return self.head(self.wider(x).mean((2, 3)))


class SharedAndTied(nn.Module):
    """One convolution used twice, one module under two names, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.free = conv_bn(3, 16), nn.Conv2d(16, 16, 1), conv_bn(16, 32)
        self.alias = self.free
        self.one, self.two, self.head = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 5)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(self.twice(self.twice(self.stem(x)))).mean((2, 3))
        return self.head(self.one(x) + self.two(x))


class TwoHeads(nn.Module):
    """Two answers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Sequential(conv_bn(3, 32), conv_bn(32, 32)), nn.Linear(32, 5), None
        self.right = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).mean((2, 3))
        return self.left(x), self.right(x)


ODD_NETWORKS = (
    FlattenByView,
    SqueezeExcitation,
    SpatialGate,
    Concatenations,
    UnevenConcatenation,
    ByHand,
    Grouped,
    SharedAndTied,
    TwoHeads,
)
