"""Hooks, what cannot be copied, and that nothing of the user's module changes."""

from __future__ import annotations

import random
import threading
from types import MethodType

import numpy as np
import pytest
import torch
from opening import answer, opened, refusal
from torch import nn
from torch.nn.utils import prune
from user_classifiers import SIZE, Flagged, Net, trained_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


class Store:
    def __init__(self) -> None:
        self.maps = []

    def __call__(self, module, inputs, output) -> None:
        self.maps.append(output)


def test_hooks_that_look_on_are_left_out():
    net, store = Net(), Store()
    net.conv2.register_forward_hook(store)
    net(torch.rand(2, 3, SIZE, SIZE))  # a feature map with its history is held now
    opening = opened(net)
    assert opening.notes == ("The hooks of `conv2` were left out; the answers are the same without.",)
    assert not opening.model.conv2._forward_hooks and len(net.conv2._forward_hooks) == 1 and len(store.maps) == 1


class ReadsItsHook(Net):
    """Its forward reads what a hook has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2.register_forward_hook(self.keep)

    def keep(self, module, inputs, output) -> None:
        self.kept = output

    def forward(self, x):
        self.features(x)
        return self.head(self.kept.mean((2, 3)))


def hooked(name: str, kind: str, hook) -> nn.Module:
    net = trained_values(Net())
    getattr(net.get_submodule(name), f"register_forward_{kind}")(hook)
    net.norm1.register_forward_hook(Store())  # not to blame
    return net


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: hooked("conv2", "hook", lambda module, inputs, output: 2 * output), "`conv2`"),
        (lambda: hooked("", "pre_hook", lambda module, inputs: (inputs[0] - 1,)), "the module"),
        (ReadsItsHook, "`norm2`"),
    ],
)
def test_hooks_that_change_the_answers_are_refused_by_name(build, name):
    assert f"a hook of {name} changes them: write what the hook does into forward" in refusal(build())


def test_the_hooks_of_a_wrapped_child_are_found():
    child = nn.DataParallel(hooked("conv2", "hook", lambda module, inputs, output: 2 * output))
    assert "a hook of `0.conv2` changes them" in refusal(nn.Sequential(child))
    child.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert "put the hook on the module inside it" in refusal(child)


class Greeting(Net):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_call_beside_forward_is_refused():
    assert "its class also has a __call__ of its own" in refusal(Greeting())


class Forgetful(Net):
    """Its train() returns nothing, as people write it to keep a BatchNorm in eval mode."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.norm1.eval()


def test_a_train_that_returns_nothing_returns_the_module():
    model = opened(Forgetful()).model
    assert model.eval() is model and model.train() is model and type(model).__name__ == "Forgetful"
    assert model.norm2.training and not model.norm1.training


def test_what_cannot_be_copied_is_named():
    net = Net()
    net.conv2.lock = threading.Lock()
    assert "`conv2.lock`, a lock, cannot be copied (cannot pickle '_thread.lock' object): take it off" in refusal(net)


def test_kept_feature_maps_do_not_stop_the_copy():
    net = Net()
    net.kept = {"maps": [net.features(torch.rand(2, 3, SIZE, SIZE))]}
    assert opened(net).notes == ()


def test_a_forward_that_was_put_on_the_instance_is_taken_along_or_refused():
    net = trained_values(Net())
    net.forward = MethodType(lambda self, x: 2 * self.head(self.features(x)), net)
    assert torch.equal(answer(opened(net).model), answer(net)) and "forward" in vars(net)
    net.forward = lambda x: net.head(net.features(x))
    assert "a function was put in its place: write a subclass" in refusal(net)


def test_nothing_of_the_users_changes():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Flagged()).half().train()
    net.conv1.requires_grad_(False).eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    prune.l1_unstructured(net.conv2, "weight", 0.25)
    net.conv2.register_forward_hook(Store())
    wrapped = nn.DataParallel(net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    facts = [
        (type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in wrapped.modules()
    ]
    flags = [(one.requires_grad, one.grad is None, one.dtype) for one in wrapped.parameters()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    opened(wrapped)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert facts == [
        (type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in wrapped.modules()
    ]
    assert flags == [(one.requires_grad, one.grad is None, one.dtype) for one in wrapped.parameters()]
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()
