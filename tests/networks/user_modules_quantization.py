"""Modules as people write them, with what quantization has to get right in each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 16


class InPlaceSkip(nn.Module):
    """The skip is taken before an in-place ReLU of the same tensor, so it carries what the ReLU leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.conv, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
            _head(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.act(x))
        return self.head(x + y)


class Statements(nn.Module):
    """In-place additions and activations written as statements, also on a part and by item."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), _head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x))
        y.add_(x)
        F.relu_(y)
        y[:, :4].mul_(0.5)
        y[:, 7] = 0
        x += y
        return self.head(x)


class Names(nn.Module):
    """Layers and tensors called as what quantization would add beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.q_conv, self.q_relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.q_relu_1 = nn.Parameter(torch.ones(8, 1, 1))
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.offset, self.constant_exp = nn.Parameter(torch.zeros(8, 1, 1)), nn.Parameter(torch.ones(8, 1, 1))
        self.keep_float, self.inplace, self.source, self.name = True, True, "mine", "mine"
        self.conv.keep_float = True
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.sigmoid(self.q_conv(x)) * x
        x = torch.relu(self.q_relu(x)) * self.q_relu_1 * self.constant_exp + self.offset.exp()
        return self.head(torch.relu(self.a_b.c(torch.relu(self.a.b_c(x)))))


class OwnProjection(nn.Module):
    """Attention with a part of the caller's own under the name of the projection that quantization adds."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention = nn.Conv2d(3, 16, 8, stride=8), nn.MultiheadAttention(16, 2, batch_first=True)
        self.attention.in_proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.attention.in_proj(x).mean(1))


class Odd(nn.Module):
    """A concatenation of one tensor twice, of a list, sizes as arguments, and slices that keep everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.three = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(16, 8, 1),
            nn.Conv2d(16, 8, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.one(torch.cat([x, x], 1))
        x = self.two(torch.cat([x, -x], 1)[:, :16])
        x = self.three(torch.cat(x.narrow(1, 0, 8).chunk(2, 1), 1))
        return self.fc(F.avg_pool2d(x, x.size()[3]).flatten(1))


class Called(nn.Module):
    """Layers called several times: a convolution three times, a Linear twice, one before a ReLU and one not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mlp, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = torch.relu(x + self.norm(self.block(x)))
        x = x + self.block(x)
        gates = self.mlp(torch.relu(self.mlp(x.mean((2, 3))))) + self.mlp(x.amax((2, 3)))
        return self.fc((x * torch.sigmoid(gates)[:, :, None, None]).mean((2, 3)))


class SamePadding(nn.Conv2d):
    """Pads by a layer of its own, as efficientnet_pytorch's convolutions do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


class Held(nn.Module):
    """Layers that hold layers, one with its BatchNorm and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv, self.head = SamePadding(3, 8), nn.BatchNorm2d(8), SamePadding(8, 8), _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(torch.relu(self.norm(self.stem(x))))))


def _head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def built(kind: type[nn.Module]) -> nn.Module:
    """With fixed random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
