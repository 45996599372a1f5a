"""Wrappers that are removed from around a user's module, and objects that are refused because they are no module."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torchvision
from opening import IMAGES, answer, opened, refusal
from torch import nn
from torch.optim.swa_utils import AveragedModel
from user_classifiers import CLASSES, Net, trained_values

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "AveragedModel": AveragedModel,
    "torch.compile and DataParallel": lambda net: torch.compile(nn.DataParallel(net)),
    "DataParallel and AveragedModel and torch.compile": lambda net: nn.DataParallel(AveragedModel(torch.compile(net))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off_and_named(name):
    net = trained_values(Net())
    opening = opened(WRAPPERS[name](net))
    assert type(opening.model) is Net and opening.notes == (f"{name} around the module was taken off.",)
    assert torch.equal(answer(opening.model), answer(net)) and opening.num_classes == CLASSES


def test_a_distributed_module_is_unwrapped(one_process):
    opening = opened(nn.parallel.DistributedDataParallel(Net()))
    assert type(opening.model) is Net and opening.notes == ("DistributedDataParallel around the module was taken off.",)


def test_wrappers_within_the_module_are_taken_off():
    net = nn.Sequential(nn.DataParallel(torch.compile(trained_values(Net()))), nn.Linear(CLASSES, 3))
    opening = opened(net)
    assert [type(one) for one in opening.model] == [Net, nn.Linear] and type(net[0]) is nn.DataParallel
    assert "torch.compile around `0` was taken off." in opening.notes
    assert torch.equal(answer(opening.model), answer(nn.Sequential(net[0].module._orig_mod, net[1])))


def test_a_module_that_delegates_is_called_as_it_is():
    class Lightning(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 2

    net = trained_values(Net())
    opening = opened(Lightning(net))
    assert type(opening.model) is Lightning and opening.notes == () and torch.equal(answer(opening.model), 2 * answer(net))


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Net().eval(), (IMAGES,))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: torch.jit.script(Net()), "torch.jit"),
        (lambda: torch.jit.trace(Net().eval(), IMAGES), "torch.jit"),
        (lambda: nn.Sequential(torch.jit.script(Net())), "torch.jit (its `0`)"),
        (lambda: exported().module(), "torch.export"),
    ],
)
def test_finished_programs_are_refused_with_what_to_give(build, kind):
    text = refusal(build())
    assert (
        f"this one was made by {kind}, which left no layers" in text and "give the module that it was made from" in text
    )


def test_a_sharded_module_is_refused():
    class FullyShardedDataParallel(Net):
        """Under the name of torch's: sharding needs several processes."""

    assert "split by FSDP: gather its full state dict" in refusal(FullyShardedDataParallel())


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Net, "this is the class: give model=Net(...)"),
        (torchvision.models.resnet18, "this is a function: give the module that it makes"),
        (Net().state_dict(), "this is a dictionary of weights: build the module, call its load_state_dict"),
        ({"epoch": 3, "net": Net()}, "this is a dictionary that holds one: give model=...['net']"),
        ("net.pth", "this is a path or a name"),
        (torchvision.models.ResNet18_Weights.DEFAULT, "these are published weights: name the architecture instead"),
        ([Net()], "a list is none"),
        (torch.zeros(3), "a Tensor is none"),
    ],
)
def test_what_is_no_module_is_refused_with_what_to_give(value, advice):
    text = refusal(value)
    assert text.startswith("model: got ") and "expected an instance of torch.nn.Module" in text and advice in text


def test_an_exported_program_is_no_module():
    assert "a finished program without layers" in refusal(exported())


def test_a_module_without_forward_names_the_networks_in_it():
    text = refusal(nn.ModuleDict({"net": Net(), "heads": nn.ModuleList()}))
    assert "its class has none; give the network itself, if it is one of `.net`" in text
