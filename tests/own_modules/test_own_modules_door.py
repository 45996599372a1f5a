"""The door for a module of the user's own: what is taken off, converted and found, and what is refused with which reason."""

from __future__ import annotations

import random
import re
import threading
from types import MethodType

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from user_modules_door import (
    ANSWERS,
    CLASSES,
    SIZE,
    WIDTH,
    Answering,
    ByPlace,
    Flagged,
    KeywordOnly,
    Net,
    SecondInput,
    Sized,
    TensorDefault,
    ThreeInputs,
    TwoInputs,
    trained_values,
)

import compress
from compress import models, own_modules
from compress.errors import CheckpointError, CompressError, RequestError
from compress.own_modules import inputs
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize")
IMAGES = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def opened(model, size=SIZE):
    return own_modules.open_module(model, size)


def answer(model):
    with torch.no_grad():
        return model(IMAGES)


def refusal(model, size=SIZE) -> str:
    with pytest.raises(RequestError) as caught:
        opened(model, size)
    return str(caught.value)


# ---- random answers ----


class Random(Net):
    def __init__(self, end) -> None:
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda z: nn.functional.dropout(z, 0.3), r"dropout\(\) is random at .*forward: `.*`: give it training=self.training\.$"),
        (lambda z: z + torch.randn_like(z), r"randn_like\(\) is random at .*: use it while self.training is set only\.$"),
    ],
)
def test_a_module_that_answers_at_random_is_refused_with_the_line(end, told):
    text = refusal(Random(end))
    assert "expected a module that answers the same image alike each time, in evaluation, and " in text
    assert re.search(told, text), text


def test_random_numbers_that_change_no_answer_are_no_fault():
    model = Random(lambda z: z + 0 * torch.rand(1)).eval()
    torch.testing.assert_close(answer(opened(model).model), answer(model))


# ---- wrappers ----


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
    found = opened(WRAPPERS[name](net))
    assert type(found.model) is Net and found.notes == (f"{name} around the module was taken off.",)
    assert torch.equal(answer(found.model), answer(net)) and found.num_classes == CLASSES


def test_a_distributed_module_is_unwrapped(one_process):
    found = opened(nn.parallel.DistributedDataParallel(Net()))
    assert type(found.model) is Net and found.notes == ("DistributedDataParallel around the module was taken off.",)


def test_wrappers_within_the_module_are_taken_off():
    net = nn.Sequential(nn.DataParallel(torch.compile(trained_values(Net()))), nn.Linear(CLASSES, 3))
    found = opened(net)
    assert [type(one) for one in found.model] == [Net, nn.Linear] and type(net[0]) is nn.DataParallel
    assert "torch.compile around `0` was taken off." in found.notes
    assert torch.equal(answer(found.model), answer(nn.Sequential(net[0].module._orig_mod, net[1])))


def test_a_module_that_delegates_is_called_as_it_is():
    class Lightning(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 2

    net = trained_values(Net())
    found = opened(Lightning(net))
    assert type(found.model) is Lightning and found.notes == () and torch.equal(answer(found.model), 2 * answer(net))


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
    told = refusal(build())
    assert (
        f"this one was made by {kind}, which left no layers" in told and "give the module that it was made from" in told
    )


def test_a_sharded_module_is_refused():
    class FullyShardedDataParallel(Net):
        """Under the name of torch's: sharding needs several processes."""

    assert "split by FSDP: gather its full state dict" in refusal(FullyShardedDataParallel())


@pytest.mark.parametrize(
    ("given", "advice"),
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
def test_what_is_no_module_is_refused_with_what_to_give(given, advice):
    told = refusal(given)
    assert told.startswith("model: got ") and "expected an instance of torch.nn.Module" in told and advice in told


def test_an_exported_program_is_no_module():
    assert "a finished program without layers" in refusal(exported())


def test_a_module_without_forward_names_the_networks_in_it():
    told = refusal(nn.ModuleDict({"net": Net(), "heads": nn.ModuleList()}))
    assert "its class has none; give the network itself, if it is one of `.net`" in told


# ---- numbers ----


def mixed() -> nn.Module:
    net = trained_values(Net())
    net.head.double()
    net.conv1.half()
    net.shift = torch.full((1,), 0.5, dtype=torch.float64)  # a plain attribute, which Module.float passes over
    return net


@pytest.mark.parametrize(
    ("build", "formats"),
    [
        (lambda: trained_values(Net()).half(), "float16"),
        (lambda: trained_values(Net()).bfloat16(), "bfloat16"),
        (lambda: trained_values(Net()).double(), "float64"),
        (mixed, "float16 and float64"),
    ],
)
def test_other_number_formats_are_computed_in_float32_and_said(build, formats):
    net = build()
    before = [tensor.dtype for tensor in net.state_dict().values()]
    found = opened(net)
    assert found.notes == (f"The module has {formats} tensors; everything is computed in float32.",)
    tensors = [
        *found.model.state_dict().values(),
        *(v for v in vars(found.model).values() if isinstance(v, torch.Tensor)),
    ]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert [tensor.dtype for tensor in net.state_dict().values()] == before


def holding(name: str, tensor: torch.Tensor) -> nn.Module:
    net = Net()
    if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
        net.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        net.register_buffer(name, tensor)
    return net


def spoiled(value: float) -> nn.Module:
    net = Net()
    net.conv2.weight.data[0, 0] = value
    return net


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Net().to("meta"), "`conv1.weight` is on the meta device: load its weights"),
        (
            lambda: holding("codes", torch.zeros(3, dtype=torch.int8)),
            "`codes` is int8: give the module as it was before",
        ),
        (lambda: holding("codes", torch.zeros(3).to(torch.float8_e4m3fn)), "`codes` is float8_e4m3fn"),
        (lambda: holding("freqs", torch.zeros(3, dtype=torch.complex64)), "`freqs` holds complex ones"),
        (lambda: holding("sparse", torch.eye(3).to_sparse()), "`sparse` is sparse"),
        (lambda: spoiled(float("nan")), "`conv2.weight` holds 9 NaN or Inf values"),
        (lambda: spoiled(float("inf")), "`conv2.weight` holds 9 NaN or Inf values"),
        (
            lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4)),
            "`0.weight` is not initialised yet",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8),
            "its `head` is a Linear of torch's quantization",
        ),
    ],
)
def test_tensors_that_are_no_real_finite_floats_are_refused_by_name(build, told):
    assert told in refusal(build())


def test_an_infinite_mask_is_no_fault():
    assert opened(holding("mask", torch.full((2,), -float("inf")))).notes == ()


# ---- reparametrizations ----


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


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrizations_are_made_permanent_on_the_copy_alone(name):
    build, told = REPARAMETRIZED[name]
    net = build().eval()
    before, state = answer(net), {key: value.clone() for key, value in net.state_dict().items()}
    found = opened(net)
    assert len(found.notes) == 1 and told in found.notes[0]
    assert torch.allclose(answer(found.model), before, atol=1e-6)
    assert set(found.model.state_dict()) == set(Net().state_dict()), "plain weights under their plain names"
    assert [type(one) for one in found.model.modules()] == [type(one) for one in Net().modules()]
    assert not any(one._forward_pre_hooks for one in found.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()) and len(state) == len(
        net.state_dict()
    )
    assert torch.equal(answer(net), before), "the user's module still computes its weights"


def test_a_frozen_weight_stays_frozen_when_it_is_made_permanent():
    net = parametrizations.weight_norm(Net().conv2).requires_grad_(False)
    found = opened(nn.Sequential(Net().conv1, net, nn.AdaptiveAvgPool2d(1), nn.Flatten())).model
    assert [one.requires_grad for one in found[1].parameters()] == [False, False] and found[0].weight.requires_grad


def test_synced_batch_norms_become_those_of_their_dimensions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(trained_values(net))
    net[1].weight.requires_grad_(False)
    found = opened(net)
    assert found.notes == ("2 SyncBatchNorm layers were turned into BatchNorm1d and BatchNorm2d.",)
    assert (type(found.model[1]), type(found.model[4])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    assert not found.model[1].weight.requires_grad and found.model[1].bias.requires_grad
    assert torch.equal(answer(found.model), answer(net)) and type(net[1]) is nn.SyncBatchNorm


# ---- hooks, copies, and the module that is given ----


class Store:
    def __init__(self) -> None:
        self.maps = []

    def __call__(self, module, inputs, output) -> None:
        self.maps.append(output)


def test_hooks_that_look_on_are_left_out():
    net, store = Net(), Store()
    net.conv2.register_forward_hook(store)
    net(torch.rand(2, 3, SIZE, SIZE))  # a feature map with its history is held now
    found = opened(net)
    assert found.notes == ("The hooks of `conv2` were left out; the answers are the same without.",)
    assert not found.model.conv2._forward_hooks and len(net.conv2._forward_hooks) == 1 and len(store.maps) == 1


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


# ---- answers ----


def plain_logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.head(net.features(IMAGES))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_logits_are_found_in_what_the_module_answers_with(name):
    net = trained_values(Answering(ANSWERS[name]))
    found = opened(net)
    assert torch.equal(answer(found.model), plain_logits(net)) and found.num_classes == CLASSES
    assert found.notes and [key for key, _ in found.model.named_modules()] == [key for key, _ in net.named_modules()]
    assert isinstance(found.model, Answering) and type(found.model).__qualname__ == "Answering"


def test_the_note_says_which_part_of_the_answer_is_taken():
    notes = opened(Answering(ANSWERS["a dictionary with features"])).notes
    assert notes == ("The module answers with a dict: the logits are answer['logits'], and the rest is left out.",)


def test_another_answer_in_training_mode_stays_as_it_is():
    class Training(Answering):
        def forward(self, x):
            return [self.head(self.features(x))] * 2 if self.training else super().forward(x)

    model = opened(Training(ANSWERS["a dictionary"])).model
    assert isinstance(model.train()(IMAGES), list) and isinstance(model.eval()(IMAGES), torch.Tensor)


def test_a_graph_module_that_answers_with_a_dictionary():
    net = trained_values(Answering(ANSWERS["a dictionary with features"]))
    found = opened(fx.symbolic_trace(net))
    assert torch.equal(answer(found.model), plain_logits(net)) and found.notes


@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (
            lambda z, f: (z, f),
            "it answered a tuple: answer[0] of shape [N, 4], answer[1] of shape [N, 32]; of several answers",
        ),
        (
            lambda z, f: {"a": z, "b": z + 1},
            "a dict: answer['a'] of shape [N, 4], answer['b'] of shape [N, 4]; of several",
        ),
        (lambda z, f: None, "it answered nothing (None)"),
        (lambda z, f: {"loss": None}, "it answered a dict without tensors"),
        (lambda z, f: z[:, :, None, None].expand(-1, -1, 8, 8), "it answered a tensor of shape [N, 4, 8, 8]"),
        (lambda z, f: z[:, None].expand(-1, 7, -1), "it answered a tensor of shape [N, 7, 4]"),
        (lambda z, f: z.argmax(1), "it answered int64 numbers ([N]): return the scores, before argmax"),
        (lambda z, f: z * float("nan"), "its scores for an image of random pixels are NaN"),
        (lambda z, f: z.sigmoid(), "its forward ends in a sigmoid: return the 4 logits, without the sigmoid"),
        (lambda z, f: {"labels": z.sigmoid_().view(-1, 4)}, "its forward ends in a sigmoid"),
        (
            lambda z, f: z.mean(1),
            "return two, 0 and the score z [N, 1] before its sigmoid: torch.cat([torch.zeros_like(z), z]",
        ),
    ],
)
def test_other_answers_are_refused_with_what_to_return(pack, told):
    assert told in refusal(trained_values(Answering(pack)))


@pytest.mark.parametrize("end", [lambda z: z.softmax(1), lambda z: z.log_softmax(1), lambda z: z * z.sigmoid()])
def test_other_ends_than_a_sigmoid_are_scores(end):
    assert opened(Answering(lambda z, f: end(z))).num_classes == CLASSES


@pytest.mark.parametrize(
    "end", [lambda z: z, lambda z: z.squeeze(1), lambda z: z.sigmoid(), lambda z: {"p": z.sigmoid()}]
)
def test_the_recipe_for_two_logits_gives_the_same_probability(end):
    class Binary(Net):
        def forward(self, x):
            return end(super().forward(x))

    net = trained_values(Binary(classes=1))
    told = refusal(net)
    assert "give `head` two outputs, the first of them 0" in told and f"two = torch.nn.Linear({WIDTH}, 2)" in told
    recipe = told.partition("torch.nn.functional.pad: ")[2].partition("; softmax")[0]
    names = {"torch": torch, "old": net.head, "pad": nn.functional.pad}
    exec(recipe, names)  # noqa: S102 - as the reader would
    with torch.no_grad():
        features = net.features(IMAGES)
        assert torch.allclose(names["two"](features).softmax(1)[:, 1:], net.head(features).sigmoid())


# ---- inputs ----


@pytest.mark.parametrize("build", [Flagged, KeywordOnly, SecondInput, ByPlace, TensorDefault])
def test_a_forward_with_more_inputs_is_called_with_images_alone(build):
    net = trained_values(build())
    found = opened(net)
    scale = 2.0 if build is TensorDefault else 1.0
    with torch.no_grad():
        assert torch.equal(answer(found.model), net.head(net.features(IMAGES) * scale))


def test_the_defaults_that_are_used_are_said():
    told = (
        "forward is called with images alone; its other inputs keep their defaults: return_features=False, mask=None."
    )
    assert opened(Flagged()).notes == (told,) and opened(KeywordOnly()).notes == ()


def test_a_flag_does_not_stop_the_tracer():
    assert fx.symbolic_trace(opened(Flagged()).model)(IMAGES).shape == (3, CLASSES)


@pytest.mark.parametrize(("build", "names"), [(TwoInputs, "`meta`"), (ThreeInputs, "`age` and `sex`")])
def test_inputs_without_defaults_are_named(build, names):
    assert f"this one also needs {names}: give {names} a default value" in refusal(build())


class Viewed(Sized):
    """Makes more rows of larger images, and so raises nothing."""

    def forward(self, x):
        return self.head(self.conv(x).relu().view(-1, self.head.in_features))


class OneAtATime(Net):
    def forward(self, x):
        return super().forward(x.view(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Net(1), "it takes grey ones, of 1 channel: images are read as RGB"),
        (lambda: Net(4), "it takes 4 channels: images are read as RGB"),
        (lambda: Sized(28, 28, 1), "it takes grey ones, of 1 channel, of 28 pixels (input_size=28)"),
        (
            lambda: Sized(64, 64),
            "input_size: got 32, expected a size that the module takes: of 16 to 512 pixels it takes 64.",
        ),
        (
            lambda: Sized(32, 96),
            "height x width such as 32 x 96, 48 x 64, 64 x 48, 96 x 32. Let a module around it resize",
        ),
        (lambda: Sized(64, 128, 1), "and 1 channel. Let a module around it resize"),
        (
            lambda: Viewed(16, 16),
            "input_size: got 32, expected a size that the module takes: of 16 to 512 pixels it takes 16.",
        ),
        (OneAtATime, "it takes one at a time: write x.shape[0] in place of 1"),
    ],
)
def test_the_true_reason_why_images_do_not_fit(build, told):
    assert told in refusal(build())


@pytest.mark.parametrize(
    ("build", "around"),
    [
        (lambda: Net(1), lambda m, x: m(x.mean(1, keepdim=True))),
        (lambda: Sized(32, 96), lambda m, x: m(nn.functional.interpolate(x, (32, 96)))),
    ],
)
def test_the_forward_that_a_refusal_advises_works(build, around):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, x):
            return around(self.model, x)

    assert opened(Around()).num_classes == CLASSES


def raising(error: Exception) -> nn.Module:
    def pack(logits, features):
        raise error

    return Answering(pack)


@pytest.mark.parametrize(
    "error", [KeyError("mask"), AssertionError(), TypeError("no"), StopIteration(), RuntimeError("a\nb")]
)
def test_the_modules_own_error_is_named_with_its_line(error, monkeypatch):
    monkeypatch.setattr(inputs, "SIDES", (32, 96))  # the search for other sizes ends sooner
    told = refusal(raising(error))
    assert f"in pack (`raise error`) raises {type(error).__name__}" in told and "\n" not in told
    assert "and test_own_modules_door.py, line " in told


# ---- a run's weights, loaded into a fresh instance ----


def flagged_in_a_wrapper() -> nn.Module:
    return nn.DataParallel(Flagged())


FRESH = {
    "wrapped": flagged_in_a_wrapper,
    "half": lambda: Net().half(),
    "synced": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()),
    "keyword": KeywordOnly,
    "logits in a dictionary": lambda: Answering(ANSWERS["a dictionary with features"]),
    "flattened": lambda: Answering(ANSWERS["maps of one pixel"]),
    **{name: build for name, (build, _) in REPARAMETRIZED.items()},
}


def saved(model: nn.Module, folder) -> nn.Module:
    """As the fine-tuned model of a run, with fewer channels."""
    small = opened(model).model
    kept = torch.arange(WIDTH // 2)
    small.conv1.weight, small.conv1.bias = (
        nn.Parameter(one.data[kept]) for one in (small.conv1.weight, small.conv1.bias)
    )
    small.conv2.weight = nn.Parameter(small.conv2.weight.data[:, kept])
    small.conv1.out_channels = small.norm1.num_features = small.conv2.in_channels = len(kept)
    for name in ("weight", "bias"):
        setattr(small.norm1, name, nn.Parameter(getattr(small.norm1, name).data[kept]))
    for name in ("running_mean", "running_var"):
        setattr(small.norm1, name, getattr(small.norm1, name)[kept])
    recipe = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)
    models.save(small, folder / "artifacts", architecture=None, preprocessing=recipe, class_names=())
    return small


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_instance_goes_through_the_same_door(name, tmp_path):
    small = saved(FRESH[name](), tmp_path)
    fresh = FRESH[name]()
    again = compress.load(tmp_path, model=fresh)
    assert torch.equal(answer(again), answer(small)) and answer(again).shape == (3, CLASSES)
    assert next(iter(fresh.state_dict().values())).shape[0] == WIDTH, "the instance stays as it is"


def test_a_plain_instance_does_for_a_reparametrized_one(tmp_path):
    small = saved(masked(), tmp_path)
    assert torch.equal(answer(compress.load(tmp_path, model=Net())), answer(small))
    with pytest.raises(CheckpointError, match="but model= is a torch.nn.modules.linear.Linear: give an instance"):
        compress.load(tmp_path, model=nn.Linear(3, 3))
    with pytest.raises(CompressError, match="this is the class: give model=Net"):
        compress.load(tmp_path, model=Net)
