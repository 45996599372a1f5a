"""Networks as people write them, with what pruning has to follow: one operation between two convolutions, and more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pruning_networks import conv_bn
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, SIZE = 32, 16


class Spelled(nn.Module):
    """`operation(self, x)` on the 32 channels of a convolution; another convolution reads what comes out."""

    def __init__(self, operation: Callable[[Spelled, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.operation = conv_bn(3, CHANNELS), operation
        self.other, self.gate = conv_bn(3, CHANNELS), nn.Conv2d(CHANNELS, 1, 1)
        self.gamma, self.alpha = nn.Parameter(torch.rand(CHANNELS) + 0.5), nn.Parameter(torch.rand(1))
        self.scale = nn.Parameter(torch.rand(1, CHANNELS, 1, 1) + 0.5)
        self.place = nn.Parameter(torch.rand(1, CHANNELS, SIZE, SIZE))
        self.grid = nn.Parameter(torch.rand(SIZE, SIZE))
        self.weights = nn.Parameter(torch.rand(2))
        self.matrix = nn.Parameter(torch.rand(CHANNELS, CHANNELS))
        self.register_buffer("mask", (torch.rand(1, CHANNELS, 1, 1) > 0.3).float())
        self.register_buffer("mean", torch.rand(CHANNELS))
        self.register_buffer("order", torch.randperm(CHANNELS))
        self.register_buffer("blur", torch.rand(CHANNELS, 1, 3, 3))
        self.register_buffer("one_blur", torch.rand(1, 1, 3, 3))
        self.prelu, self.one_prelu = nn.PReLU(CHANNELS), nn.PReLU()
        self.group, self.all_group = nn.GroupNorm(8, CHANNELS), nn.GroupNorm(1, CHANNELS)
        self.instance, self.plain_instance = nn.InstanceNorm2d(CHANNELS, affine=True), nn.InstanceNorm2d(CHANNELS)
        self.batch = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        self.layer, self.positions = nn.LayerNorm(CHANNELS), nn.LayerNorm([SIZE, SIZE])
        self.up, self.deep_up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2), nn.ConvTranspose2d(32, 32, 2, groups=32)
        self.twice = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.softmax, self.unflatten = nn.Softmax(dim=2), nn.Unflatten(1, (CHANNELS, 1))
        self.eval()
        self.image = torch.zeros(2, 3, SIZE, SIZE)
        with torch.no_grad():
            width = operation(self, self.first(self.image)).shape[1]
        self.last, self.head = nn.Conv2d(width, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.image = x
        return self.head(self.last(self.operation(self, self.first(x))).mean((2, 3)))


def grn(m: Spelled, x: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2) over positions, divided by its mean over the channels."""
    norm = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    return x * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6)) * m.scale + x


def selected(m: Spelled, x: Tensor) -> Tensor:
    """Selective kernels: a softmax over two stacked paths, weights from their sum."""
    paths = torch.stack([x, m.other(m.image)], dim=1)
    weights = torch.softmax(paths.mean((3, 4), keepdim=True), dim=1)
    return (paths * weights).sum(1)


def frozen_norm(m: Spelled, x: Tensor) -> Tensor:
    scale = m.mean.reshape(1, -1, 1, 1) * (m.mean + 1e-5).rsqrt().view(1, -1, 1, 1)
    return x * scale + (m.gamma.exp() - m.mean)[None, :, None, None]


def channel_shuffle(m: Spelled, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def squeezed(m: Spelled, x: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return x * torch.sigmoid(pooled)[:, :, None, None]


FOLLOWED: dict[str, Callable[[Spelled, Tensor], Tensor]] = {
    "mean dim": lambda m, x: x - x.mean(dim=(2, 3), keepdim=True),
    "mean axis": lambda m, x: x - torch.mean(x, axis=(-2, -1), keepdims=True),
    "mean positional": lambda m, x: x * x.mean((2, 3), True),
    "mean input": lambda m, x: x * torch.mean(input=x, dim=[2, 3], keepdim=True),
    "amax": lambda m, x: x + x.amax((2, 3), keepdim=True),
    "max of a dimension": lambda m, x: x + x.max(dim=3, keepdim=True)[0],
    "max values": lambda m, x: x + torch.max(x, 2, keepdim=True).values,
    "max of two": lambda m, x: torch.max(x, m.other(m.image)),
    "maximum": lambda m, x: torch.maximum(x, m.other(m.image)),
    "minimum": lambda m, x: torch.minimum(x, m.other(m.image)),
    "std": lambda m, x: x / (x.std(dim=(2, 3), keepdim=True) + 1),
    "sum over channels": lambda m, x: x * torch.sigmoid(x.sum(1, keepdim=True)),
    "norm over channels": lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1),
    "normalize": lambda m, x: F.normalize(x, dim=1),
    "softmax over places": lambda m, x: x * torch.softmax(x.flatten(2), -1).view_as(x),
    "softmax module": lambda m, x: x * m.softmax(x),
    "cat axis": lambda m, x: torch.cat((x, m.other(m.image)), axis=1)[:, :, :, :].narrow(2, 0, 8),
    "cat negative": lambda m, x: torch.cat([x, x], dim=-3),
    "cat height": lambda m, x: torch.cat([x, m.other(m.image)], 2),
    "stack and sum": lambda m, x: torch.stack([x, m.other(m.image)]).sum(0),
    "stack dim": lambda m, x: torch.stack((x, m.other(m.image)), dim=1).amax(1),
    "selected kernels": selected,
    "operators": lambda m, x: (x + m.other(m.image)) * 2 - 1,
    "functions": lambda m, x: torch.mul(torch.add(x, m.other(m.image), alpha=0.5), 2.0),
    "methods": lambda m, x: x.add(m.other(m.image)).mul(x).sub(0.5).div(2.0),
    "in place": lambda m, x: x.mul_(2.0).add_(m.other(m.image)),
    "divided": lambda m, x: x / (m.other(m.image) + 1.0),
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "masked fill": lambda m, x: x.masked_fill(x < 0, 0.0),
    "clamp": lambda m, x: x.clamp(min=0.0, max=6.0),
    "pad positions": lambda m, x: F.pad(x, (1, 1, 0, 2)),
    "pad all": lambda m, x: F.pad(x, [1, 1, 1, 1, 0, 0]),
    "chunk height": lambda m, x: torch.add(*(half for half in (x.chunk(2, 2)[0], x.chunk(2, dim=2)[1]))),
    "split width": lambda m, x: x.split([6, 10], dim=-1)[0],
    "unbind height": lambda m, x: x.unbind(2)[3].unsqueeze(2),
    "select": lambda m, x: x.select(3, 1)[..., None],
    "index select": lambda m, x: x.index_select(3, m.order[:4] % 16),
    "slices": lambda m, x: x[:, :, 1:-1, ::2],
    "ellipsis": lambda m, x: x[..., 1:],
    "slice of all": lambda m, x: x[:, :CHANNELS],
    "flip": lambda m, x: torch.flip(x, [3]) + x.flip(2, 3),
    "roll": lambda m, x: torch.roll(x, (1, 1), dims=(2, 3)),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "pools": lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(F.avg_pool2d(x, 2), 2), 1),
    "pool of one dimension": lambda m, x: F.adaptive_avg_pool2d(x, (None, 1)) + F.adaptive_max_pool2d(x, (1, None)),
    "scale": lambda m, x: x * m.scale,
    "layer scale": lambda m, x: x + x * m.gamma[:, None, None],
    "layer scale by view": lambda m, x: m.gamma.view(1, -1, 1, 1) * x,
    "layer scale last": lambda m, x: (x.permute(0, 2, 3, 1) * m.gamma).permute(0, 3, 1, 2),
    "learned place": lambda m, x: x + m.place,
    "learned grid": lambda m, x: x * m.grid,
    "mask": lambda m, x: x * m.mask,
    "single factor": lambda m, x: x + m.alpha * m.other(m.image),
    "fusion": lambda m, x: m.weights.softmax(0)[0] * x + torch.relu(m.weights)[1] * m.other(m.image),
    "frozen norm": frozen_norm,
    "batch norm function": lambda m, x: F.batch_norm(x, m.mean, m.mean + 1, m.gamma, m.gamma),
    "prelu": lambda m, x: m.one_prelu(m.prelu(x)),
    "prelu function": lambda m, x: F.prelu(F.prelu(x, m.gamma), m.alpha),
    "group norm": lambda m, x: m.group(x),
    "instance norms": lambda m, x: m.plain_instance(m.instance(x)),
    "batch norm of the batch": lambda m, x: m.batch(x),
    "layer norm of places": lambda m, x: m.positions(x),
    "matrix": lambda m, x: (x.permute(0, 2, 3, 1) @ m.matrix).permute(0, 3, 1, 2),
    "einsum": lambda m, x: torch.einsum("nchw,c->nchw", x, m.gamma),
    "einsum summed": lambda m, x: x * torch.sigmoid(torch.einsum("nchw,c->nhw", x, m.gamma)).unsqueeze(1),
    "fixed blur": lambda m, x: F.conv2d(x, m.blur, stride=2, padding=1, groups=x.shape[1]),
    "one blur": lambda m, x: F.conv2d(x, m.one_blur.expand(x.shape[1], -1, -1, -1), groups=x.size(1)),
    "gate of one channel": lambda m, x: x * m.gate(x).sigmoid().expand_as(x) + m.gate(x),
    "squeeze": squeezed,
    "read by a transposed": lambda m, x: m.deep_up(m.up(x)),
    "called twice": lambda m, x: m.twice(torch.relu(m.twice(x))),
    "functional convolution": lambda m, x: F.conv2d(x, m.twice.weight, m.twice.bias, padding=1),
    "movement": lambda m, x: x.transpose(1, 3).swapaxes(-1, 1).contiguous().to(torch.float32),
    "dropouts": lambda m, x: F.dropout2d(F.dropout(x, 0.3, m.training), 0.1, training=m.training),
    "other activations": lambda m, x: F.hardswish(F.silu(F.gelu(x))).tanh().exp().log1p(),
}
"""What has to be pruned: half of the first convolution's channels go."""

STAYS: dict[str, tuple[Callable[[Spelled, Tensor], Tensor], str]] = {
    "mean over channels": (lambda m, x: x * x.mean(1, keepdim=True), r"mean\(\) in <lambda>"),
    "max over channels": (lambda m, x: x * x.max(dim=1, keepdim=True)[0], r"max\(\)"),
    "softmax over channels": (lambda m, x: x * x.softmax(1), r"softmax\(\)"),
    "pad channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 8))[:, 4:36], r"padded by pad\(\)"),
    "chunk": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), r"divided by chunk\(\)"),
    "gated halves": (lambda m, x: x[:, :16].repeat(1, 2, 1, 1), r"getitem\(\)"),
    "glu": (lambda m, x: F.glu(x, 1).repeat(1, 2, 1, 1), r"glu\(\)"),
    "permuted channels": (lambda m, x: x[:, m.order], r"getitem\(\)"),
    "flip channels": (lambda m, x: x.flip(1), r"flip\(\)"),
    "roll channels": (lambda m, x: torch.roll(x, 1, 1), r"roll\(\)"),
    "shuffle": (channel_shuffle, r"rearranged by view\(\) in channel_shuffle \(user_modules_pruning\.py, line \d+\)"),
    "counted": (lambda m, x: x.view(-1, CHANNELS, SIZE * SIZE).view(x.shape), r"fixed number in view\(\)"),
    "layer norm": (lambda m, x: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), r"feeds LayerNorm \(layer\)"),
    "one group": (lambda m, x: m.all_group(x), r"GroupNorm \(all_group\), which normalises over all channels"),
    "response norm": (grn, r"mean\(\) in grn"),
    "products": (lambda m, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view_as(x), r"matmul\(\)"),
    "cumulated": (lambda m, x: x.cumsum(1), r"cumsum\(\)"),
    "unknown": (lambda m, x: torch.trapezoid(x, dim=3)[..., None], r"trapezoid\(\) in <lambda> \(user_modules_pruning"),
    "made in forward": (lambda m, x: x * torch.arange(32.0).view(1, -1, 1, 1), r"fixed"),
}
"""What must not be pruned, and what the reason has to name."""


class Tied(nn.Module):
    """Two convolutions share a weight, two more a bias; a Linear and a function share another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, CHANNELS)
        self.one, self.two = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(2))
        self.two.weight = self.one.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(2))
        self.left, self.right = nn.Conv2d(CHANNELS, 48, 1), nn.Conv2d(CHANNELS, 48, 1)
        self.right.bias = self.left.bias
        self.hidden, self.head = nn.Linear(48, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.norms[0](self.one(x)))
        x = torch.relu(self.norms[1](self.two(x)))
        x = (self.left(x) * self.right(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)) + F.linear(torch.sin(x), self.hidden.weight, self.hidden.bias))


class TiedOtherwise(nn.Module):
    """A weight that one layer applies and another function of the model reads in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn(3, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.free, self.head = conv_bn(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(self.stem(x)))
        x = F.conv2d(x, self.body.weight.transpose(0, 1))
        return self.head(self.free(x).mean((2, 3)))


class Recurrent(nn.Module):
    """One block called three times, with and without its residual, and one BatchNorm for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
        self.block = nn.Sequential(conv_bn(CHANNELS, 48), nn.Conv2d(48, CHANNELS, 1))
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.norm(self.block(x) + x)
        x = self.block(self.block(x))
        return self.head(x.mean((2, 3)))


class Mostly(nn.Module):
    """Nearly all parameters lie in layers whose channels are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.wide = conv_bn(3, 16), nn.Conv2d(16, 256, 3, padding=1)
        self.wider, self.head = nn.Conv2d(256, 64, 3), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wider(channel_shuffle(None, self.wide(self.small(x)))).sort(1)[0].mean((2, 3)))
