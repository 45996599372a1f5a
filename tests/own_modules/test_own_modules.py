"""Modules of the user's own: left as they were, refused in one sentence, the fault found in the user's own line."""

from __future__ import annotations

import statistics

import pytest
import torch
from pruning_networks import TwoHeads, conv_bn
from torch import Tensor, nn

from compress import Request
from compress.errors import PruningError, RequestError
from compress.tracing.graph import trace
from compress.workload import open_workload

REQUEST = Request(model="custom", input_size=32, data="none")


class Named(nn.Module):
    """Its answers in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.both = TwoHeads()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.both(x)
        return {"left": left, "right": right}


@pytest.mark.parametrize(("build", "kind"), [(TwoHeads, "tuple"), (Named, "dict")])
def test_several_answers_are_refused_before_anything_is_spent(build, kind):
    with pytest.raises(
        RequestError, match=f"it answered a {kind}: .*; of several answers, give a module that returns the"
    ):
        open_workload(REQUEST, build())


def test_a_partly_frozen_module_stays_as_it_was():
    model = nn.Sequential(conv_bn(3, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).train()
    model[0].eval().requires_grad_(False)
    modes = [module.training for module in model.modules()]
    source = open_workload(REQUEST, model)
    assert [module.training for module in model.modules()] == modes and not source.model.training
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in source.model.parameters()] == flags == [False] * 3 + [True] * 2


class ThroughALibrary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * statistics.fmean(x)


def test_the_users_own_line_is_named_where_a_library_fails():
    with pytest.raises(PruningError, match=r"at test_own_modules\.py, line \d+, in forward: `return x \* statistics"):
        trace(ThroughALibrary())


def test_the_module_given_is_not_the_one_that_is_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    source = open_workload(REQUEST, model)
    assert source.model is not model and torch.equal(source.model[0].weight, model[0].weight)
