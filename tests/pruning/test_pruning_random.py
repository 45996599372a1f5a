"""A property: whatever network is drawn, its shrunk form is equal to its masked one. `make test-all` draws 200."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pruning_networks import conv_bn, randomise, training
from torch import Tensor, nn

from compress.errors import PruningError
from compress.pruning import PRUNERS, plan, prune

pytestmark = pytest.mark.integration

NETWORKS = int(os.environ.get("ESPALIER_RANDOM_NETWORKS", "60"))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Self-attention over the positions of a map, and a transformer's MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(x.shape)


class PreActivation(nn.Module):
    """BatchNorm before the convolution: it reads a stream that others add to."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner),
                                  nn.ReLU(), nn.Conv2d(inner, width, 3, padding=1))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Drawn(nn.Module):
    """A random network: each step is one block on the running tensor."""

    def __init__(self, steps: list[tuple[str, int]], ending: str) -> None:
        super().__init__()
        self.stem, width = conv_bn(3, 32), 32
        self.kinds, self.blocks, self.ending = [], nn.ModuleList(), ending
        for kind, size in steps:
            block, width = self._block(kind, width, size)
            self.kinds.append(kind)
            self.blocks.append(block)
        width = 16 * width if ending == "flatten" else width
        hidden = nn.Sequential(nn.Linear(width, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5))
        self.head = nn.Linear(width, 5) if ending == "linear" else hidden

    @staticmethod
    def _block(kind: str, width: int, size: int) -> tuple[nn.Module, int]:
        match kind:
            case "residual":
                return nn.Sequential(conv_bn(width, size), nn.Conv2d(size, width, 1), nn.BatchNorm2d(width)), width
            case "preactivation":
                return PreActivation(width, size), width
            case "concat":
                return conv_bn(width, size), width + size
            case "depthwise":
                return conv_bn(width, width, groups=width), width
            case "grouped":
                return nn.Sequential(conv_bn(width, 2 * size), conv_bn(2 * size, 2 * size, groups=8)), 2 * size
            case "gate":
                return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, size, 1), nn.SiLU(),
                                     nn.Conv2d(size, width, 1), nn.Sigmoid()), width  # fmt: skip
            case "attention":
                return Attention(width, size), width
        return conv_bn(width, size), size

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind in ("residual", "preactivation"):
                x = x + block(x)
            elif kind == "concat":
                x = torch.cat([x, block(x)], dim=1)
            elif kind == "gate":
                x = x * block(x)
            else:
                x = block(x)
        if self.ending == "flatten":
            return self.head(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))
        return self.head(x.mean((2, 3)))


SHRINKING = sorted(name for name, pruner in PRUNERS.items() if not pruner.fine_grained)
_KINDS = ["plain", "residual", "preactivation", "concat", "depthwise", "grouped", "gate", "attention"]


@settings(max_examples=NETWORKS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.sampled_from(_KINDS), st.sampled_from([8, 16, 24, 40])), min_size=2, max_size=6),
    ending=st.sampled_from(["linear", "mlp", "flatten"]),
    sparsity=st.floats(0.1, 0.9),
    multiple=st.sampled_from([1, 4, 8]),
    pruner=st.sampled_from(SHRINKING),
)
def test_random_networks_are_equal_to_their_masked_models(steps, ending, sparsity, multiple, pruner):
    torch.manual_seed(0)
    model = randomise(Drawn(steps, ending))
    try:
        found = plan(model, IMAGES, sparsity=sparsity, multiple=multiple)
    except PruningError as error:
        assert str(error).startswith("Nothing in Drawn can be pruned")
        reject()
    result = prune(model, IMAGES, found, pruner, training(16))
    assert result.max_abs_diff <= 1e-5 * result.reference_scale
    assert sum(one.numel() for one in result.model.parameters()) < sum(one.numel() for one in model.parameters())
