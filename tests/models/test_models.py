"""Architectures recognised from shapes, counts against torchvision's own, shrunk models saved and rebuilt."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from compress import models
from compress.errors import CheckpointError, RequestError, StorageError
from compress.models import Architecture, architectures
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.integration

RECIPE = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
]


def meta_tensors(name: str, classes: int = 7, **kwargs: object) -> dict[str, torch.Tensor]:
    return dict(models.build_empty(Architecture(name, classes, dict(kwargs))).state_dict())


def shrink(model: nn.Module, conv: str, norm: str, following: str, keep: int) -> None:
    """Cut a convolution, its BatchNorm and the next convolution's input to `keep` channels, as pruning does."""
    first, batch, second = (model.get_submodule(name) for name in (conv, norm, following))
    for module, sizes in (
        (first, {"out_channels": keep}),
        (batch, {"num_features": keep}),
        (second, {"in_channels": keep}),
    ):
        for key, value in sizes.items():
            setattr(module, key, value)
    first.weight = nn.Parameter(first.weight.detach()[:keep].clone())
    second.weight = nn.Parameter(second.weight.detach()[:, :keep].clone())
    for key in ("weight", "bias"):
        setattr(batch, key, nn.Parameter(getattr(batch, key).detach()[:keep].clone()))
    for key in ("running_mean", "running_var"):
        setattr(batch, key, getattr(batch, key)[:keep].clone())


@pytest.fixture
def shrunk() -> nn.Module:
    torch.manual_seed(0)
    model = models.build(Architecture("resnet18", 10))
    shrink(model, "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", 24)
    shrink(model, "layer4.1.conv1", "layer4.1.bn1", "layer4.1.conv2", 200)
    return model


# ---- recognise ----


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recognised_from_its_shapes_alone(name):
    tensors = meta_tensors(name)
    assert models.recognise(tensors, None) == Architecture(name, 7, {})
    assert models.recognise(tensors, name) == Architecture(name, 7, {})


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_auxiliary_outputs_may_be_there_or_not_and_are_left_out(name, auxiliary):
    tensors = models.build(Architecture(name, 5, {"aux_logits": auxiliary, "init_weights": False})).state_dict()

    architecture = models.recognise(tensors, None)
    model = models.load(architecture, tensors)

    assert (architecture.name, architecture.num_classes) == (name, 5)
    assert not any("aux" in key.lower() for key in model.state_dict())
    assert torch.equal(model.fc.weight, tensors["fc.weight"])


def test_a_vision_transformers_image_size_comes_from_its_position_embeddings():
    tensors = meta_tensors("vit_b_16", image_size=96)
    architecture = models.recognise(tensors, "vit_b_16")
    assert architecture == models.fresh("vit_b_16", 7, 96) == models.recognise(tensors, None)
    assert models.build_empty(architecture).state_dict()["encoder.pos_embedding"].shape[1] == 37


def test_another_architecture_is_named_with_layer_and_both_shapes():
    with pytest.raises(CheckpointError) as refusal:
        models.recognise(meta_tensors("resnet50", 12), "resnet18")
    assert str(refusal.value) == (
        "The checkpoint is not a resnet18: layer1.0.conv1.weight is 64x64x3x3 in resnet18, but 64x64x1x1 in the file. "
        "It matches resnet50 with 12 outputs: choose that model."
    )


def test_a_changed_stem_matches_nothing_and_the_way_out_is_named():
    tensors = meta_tensors("resnet18") | {"conv1.weight": torch.empty(64, 3, 3, 3)}
    with pytest.raises(
        CheckpointError,
        match=r"conv1.weight is 64x3x7x7 in resnet18, but 64x3x3x3 in the file. It matches no torchvision",
    ):
        models.recognise(tensors, "resnet18")
    with pytest.raises(CheckpointError, match=r"122 tensors: conv1.weight 64x3x3x3.*compress.run\(model=...\)"):
        models.recognise(tensors, None)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop("fc.bias"), r"fc.bias \(7 in resnet18\) is missing in the file"),
        (
            lambda tensors: tensors.update({"head.extra": torch.empty(3)}),
            r"the file holds head.extra \(3\), which resnet18 does not have",
        ),
        (
            lambda tensors: tensors.update({"fc.weight": torch.empty(7)}),
            r"fc.weight is 1000x512 in resnet18, but 7 in the file",
        ),
    ],
)
def test_missing_extra_and_malformed_tensors_are_named(change, words):
    tensors = meta_tensors("resnet18")
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        models.recognise(tensors, "resnet18")


def test_bare_tensors_load_into_mnasnet_which_insists_on_a_version():
    model = models.build(Architecture("mnasnet0_5", 4))
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    again = models.load(models.recognise(tensors, None), tensors)
    assert torch.equal(again.classifier[1].weight, model.classifier[1].weight)
    with pytest.raises(CheckpointError, match="do not belong to this model: they differ in classifier.1.bias"):
        models.load_weights(again, {key: value for key, value in tensors.items() if key != "classifier.1.bias"})


def test_an_architecture_that_torchvision_cannot_build_is_refused():
    with pytest.raises(CheckpointError, match="torchvision cannot build resnet18"):
        models.build(Architecture("resnet18", 10, {"image_size": 3}))


# ---- count ----


@pytest.mark.parametrize(
    "name, size", [("resnet18", 224), ("mobilenet_v2", 224), ("vit_b_32", 224), ("swin_t", 224), ("squeezenet1_1", 224)]
)
def test_counts_equal_the_published_ones(name, size):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    model = models.build(Architecture(name, 1000))
    assert models.count_parameters(model) == architectures.published(name).parameters
    assert models.count_macs(model, size) / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4)


def test_layers_are_listed_in_order_with_their_work_and_the_model_is_left_as_it_was():
    model = models.build(Architecture("resnet18", 10)).train()
    before = copy.deepcopy(model.state_dict())

    layers = models.layer_shapes(model, 32)

    assert [layer.name for layer in layers][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert layers[0] == models.LayerShape("conv1", "Conv2d", 64, 64 * 3 * 49, 64 * 3 * 49 * 16 * 16)
    assert layers[-1] == models.LayerShape("fc", "Linear", 10, 5130, 5120)
    assert sum(layer.macs for layer in layers) == models.count_macs(model, 32)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.conv1._forward_hooks


# ---- save and rebuild ----


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shrunk_model_comes_back_bit_for_bit(shrunk, layout, tmp_path):
    shrunk.to(memory_format=layout)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=layout)
    models.save(
        shrunk,
        tmp_path,
        architecture=Architecture("resnet18", 10),
        preprocessing=RECIPE,
        class_names=list("abcdefghij"),
    )

    again = models.rebuild(tmp_path)

    assert torch.equal(again(images), shrunk(images))
    assert type(again) is type(shrunk) and not again.training
    assert again.layer4[1].conv1.out_channels == 200
    spec = models.read_spec(tmp_path)
    assert set(spec.sizes) == {f"layer{block}.{part}" for block in ("1.0", "4.1") for part in ("conv1", "bn1", "conv2")}
    assert (spec.preprocessing, spec.class_names) == (RECIPE, tuple("abcdefghij"))


def test_rebuilding_needs_neither_nni_nor_a_second_library(shrunk, tmp_path):
    models.save(shrunk, tmp_path, architecture=Architecture("resnet18", 10), preprocessing=RECIPE, class_names=())
    expected = shrunk(torch.ones(1, 3, 32, 32))
    script = (
        "import sys; sys.modules['nni'] = None\n"
        "import torch; from pathlib import Path; from compress import models\n"
        f"print(models.rebuild(Path({str(tmp_path)!r}))(torch.ones(1, 3, 32, 32)).tolist())"
    )
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(answer.stdout) == expected.tolist()


class Own(nn.Module):
    """A user's own module with a parameter outside any layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = (
            nn.Conv2d(3, width, 3),
            nn.GroupNorm(4, width),
            nn.Parameter(torch.rand(width, 1, 1)),
        )
        self.head = nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((self.norm(self.conv(images)) * self.scale).mean((2, 3)))


class Derived(nn.Module):
    """Says its width from the layer within, as timm's ConvNormAct does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3))


def test_a_width_that_a_module_derives_is_not_saved(tmp_path):
    model = Derived()
    models.save(model, tmp_path, architecture=None, preprocessing=RECIPE, class_names=("a",) * 8)
    again = models.rebuild(tmp_path, model=Derived())
    assert torch.equal(again.conv.weight, model.conv.weight)


def test_a_users_own_module_is_rebuilt_from_an_instance_that_stays_as_it_is(tmp_path):
    small, template = Own(4).eval(), Own(8)
    models.save(small, tmp_path, architecture=None, preprocessing=RECIPE, class_names=("a", "b"))
    images = torch.randn(2, 3, 8, 8)

    again = models.rebuild(tmp_path, model=template)

    assert torch.equal(again(images), small(images))
    assert (again.conv.out_channels, again.norm.num_channels, again.head.in_features) == (4, 4, 4)
    assert template.conv.weight.shape[0] == 8


def test_a_missing_wrong_or_needless_instance_is_refused(shrunk, tmp_path):
    models.save(Own(), tmp_path / "own", architecture=None, preprocessing=RECIPE, class_names=())
    models.save(
        shrunk, tmp_path / "known", architecture=Architecture("resnet18", 10), preprocessing=RECIPE, class_names=()
    )
    with pytest.raises(CheckpointError, match=r"is a .*Own of your own: give a fresh instance of it with model="):
        models.rebuild(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"but model= is a torch.nn.modules.linear.Linear"):
        models.rebuild(tmp_path / "own", model=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="is torchvision's resnet18 and is built from that: leave model= out"):
        models.rebuild(tmp_path / "known", model=Own())
    other = Own()
    other.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="not built like the saved one: they differ in extra.bias"):
        models.rebuild(tmp_path / "own", model=other)


def test_only_a_model_of_its_architecture_is_saved(shrunk, tmp_path):
    with pytest.raises(CheckpointError, match="which resnet50 does not have there"):
        models.save(shrunk, tmp_path, architecture=Architecture("resnet50", 10), preprocessing=RECIPE, class_names=())
    shrunk.fc = nn.Linear(512, 10, bias=False)
    with pytest.raises(CheckpointError, match="not those of resnet18: they differ in fc.bias"):
        models.save(shrunk, tmp_path, architecture=Architecture("resnet18", 10), preprocessing=RECIPE, class_names=())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_missing_or_damaged_file_is_found_before_anything_is_loaded(shrunk, tmp_path):
    with pytest.raises(StorageError, match="holds no saved model"):
        models.rebuild(tmp_path)
    models.save(shrunk, tmp_path, architecture=Architecture("resnet18", 10), preprocessing=RECIPE, class_names=())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(StorageError, match="its SHA-256 differs"):
        models.rebuild(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(StorageError, match="is damaged: restore it"):
        models.rebuild(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(StorageError, match="another version"):
        models.rebuild(tmp_path)


# ---- catalog ----


def test_the_catalog_lists_torchvisions_classifiers_with_what_is_published():
    assert len(architectures.names()) == 80 and "fasterrcnn_resnet50_fpn" not in architectures.names()
    resnet = architectures.published("resnet18")
    assert resnet.preprocessing == Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, "bilinear")
    assert (len(resnet.class_names), resnet.class_names[0], resnet.parameters) == (1000, "tench", 11_689_512)
    assert architectures.published("efficientnet_b0").preprocessing.interpolation == "bicubic"
    assert architectures.published("inception_v3").preprocessing == Preprocessing(
        299, (0.5,) * 3, (0.5,) * 3, 342, "bilinear"
    )
    with pytest.raises(RequestError, match="resnet19"):
        architectures.published("resnet19")


def test_inceptions_published_input_step_equals_its_normalisation_here():
    pixels = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = torchvision.models.inception_v3(init_weights=False, transform_input=True)
    assert torch.allclose(model._transform_input((pixels - mean) / std), (pixels - 0.5) / 0.5, atol=1e-6)


def test_without_a_network_the_download_is_one_sentence(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent-cache")
    monkeypatch.setattr(torch.hub.os, "makedirs", lambda *arguments, **options: None)
    with pytest.raises(
        CheckpointError,
        match=r"resnet18 cannot be downloaded here \(Name or service not known\): connect.*--checkpoint",
    ):
        architectures.published_weights("resnet18")


# ---- with real pruning ----


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_what_nni_shrinks_comes_back_bit_for_bit(name, tmp_path):
    from compress import pruning

    torch.manual_seed(0)
    architecture = Architecture(name, 10)
    model, images = models.build(architecture), torch.rand(2, 3, 64, 64)
    pruned = pruning.prune(model, images[:1], pruning.plan(model, images[:1], sparsity=0.5), "l1-norm").model.eval()

    models.save(pruned, tmp_path, architecture=architecture, preprocessing=RECIPE, class_names=())

    again = models.rebuild(tmp_path)
    assert torch.equal(again(images), pruned(images))
    assert models.count_parameters(again) < 0.4 * models.count_parameters(model)
