"""Every kind of input through the real pipeline, with a small network of the user's own so that it takes seconds."""

import errno
import json
import zipfile

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import compress
from compress import files, pipeline, runs
from compress.errors import HandoffError, RequestError, StorageError
from compress.stages.results import QuantizeResult

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("short_run")]


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Own(nn.Module):
    """A residual network that torchvision does not know."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def paint(seed, colour):
    """A noisy 16 x 16 image whose brightest channel tells the class."""
    pixels = np.random.default_rng(seed).integers(0, 120, (16, 16, 3))
    pixels[..., colour] += 100
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Own()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        labels = torch.randint(0, 3, (32,), generator=generator)
        pixels = torch.randint(0, 120, (32, 3, 16, 16), generator=generator).float()
        pixels[torch.arange(32), labels] += 100
        loss = nn.functional.cross_entropy(model((pixels / 255 - 0.5) / 0.25), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "colours"
    for colour, name in enumerate(("a red", "b green", "c blue")):
        (root / name).mkdir(parents=True)
        for index in range(40):
            paint(100 * colour + index, colour).save(root / name / f"{index}.png")
    return root


def ask(**changes):
    values = {
        "model": "custom", "input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 4, "train_batch_size": 16,
        "finetune_epochs": 2, "qat_epochs": 1, "data": "none", "calibration_images": 64,
    }  # fmt: skip
    return compress.Request(**(values | changes))


def torch_hops(report):
    return [hop.name for hop in report.ledger if hop.through == "torch"]


def test_a_module_of_ones_own_with_a_zip_of_labelled_images(trained, folder, tmp_path):
    archive = tmp_path / "colours.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder.parent))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    report = compress.run(ask(data=str(archive)), model=trained, out=tmp_path / "run")
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items()), (
        "the caller's model is untouched"
    )
    assert report.data.kind == "labelled" and report.data.class_names == ("a red", "b green", "c blue")
    assert report.variant("baseline").accuracy > 0.9 and report.variant("quantized").accuracy > 0.8
    assert torch_hops(report) == ["baseline", "pruned and refitted", "fine-tuned", "fake-quantized"]
    pruned = {layer.name: (layer.channels_before, layer.channels_after) for layer in report.layers}
    assert pruned["blocks.0.conv1"] == (32, 16) and pruned["fc"] == (3, 3)
    loaded = compress.load(tmp_path / "run", model=Own())
    assert loaded.fc.in_features == 16
    named = [
        name
        for name in runs.manifest(tmp_path / "run")
        if str(tmp_path).encode() in (tmp_path / "run" / name).read_bytes()
    ]
    assert named == ["request.json"], "nothing else tells where the files lie, or it would be published"


def test_unlabelled_images_train_by_distillation_and_report_agreement(trained, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    report = compress.run(ask(data=str(flat)), model=trained, out=tmp_path / "run")
    assert report.data.kind == "unlabelled" and report.variant("baseline").accuracy == 1.0
    assert 0.5 < report.variant("quantized").accuracy <= 1.0
    assert "agree with the original's" in report.verdict.text
    assert any("no labels" in note for note in report.notes)
    assert {epoch.stage for epoch in report.curves} == {"finetune", "quantize"} and report.curves[0].accuracy is None


def zero_share(weights):
    weights = np.concatenate([np.asarray(weight).reshape(-1) for weight in weights])
    return float((weights == 0).mean())


def test_zeros_of_single_weights_last_through_training_quantization_and_export(trained, folder, tmp_path):
    report = compress.run(ask(data=str(folder), pruner="level", sparsity=0.6), model=trained, out=tmp_path / "run")
    loaded = compress.load(tmp_path / "run", model=Own())
    layers = [module for module in loaded.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert loaded.fc.weight.shape == trained.fc.weight.shape and not torch.equal(loaded.fc.weight, trained.fc.weight)
    assert zero_share(layer.weight.detach() for layer in layers) == pytest.approx(0.6, abs=0.01)
    for name in ("pruned", "quantized.onnxruntime", "quantized.tensorrt"):
        graph = onnx.load(tmp_path / "run" / "artifacts" / f"{name}.onnx").graph
        tensors = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
        assert zero_share(tensor for tensor in tensors if tensor.ndim > 1) >= 0.59, name
    assert report.variant("quantized").accuracy > 0.8
    assert any(
        "stay zero. Every layer keeps its shape, so no runtime here computes faster" in note for note in report.notes
    )
    assert all(layer.channels_before == layer.channels_after for layer in report.layers)
    assert report.layers[0].reason == "keeps its shape: its smallest weights become zero"


def test_a_pruner_that_trains_runs_through_and_one_without_images_is_refused(trained, folder, tmp_path):
    request = ask(data=str(folder), pruner="agp", pruning_epochs=1, pruning_steps=2)
    report = compress.run(request, model=trained, out=tmp_path / "run")
    pruned = {layer.name: (layer.channels_before, layer.channels_after) for layer in report.layers}
    assert pruned["blocks.0.conv1"] == (32, 16) and report.variant("quantized").accuracy > 0.8
    with pytest.raises(
        RequestError, match="pruner: got 'agp', expected one that needs no images, because data is `none`"
    ):
        compress.run(ask(pruner="agp"), model=trained, out=tmp_path / "refused")
    found = pipeline.check(ask(pruner="slim", data="none"), model=trained)
    assert not found["possible"] and "l1-norm, l2-norm, fpgm, level" in found["text"]
    assert "6 layers with zeros among the weights" in pipeline.check(ask(pruner="level"), model=trained)["text"]


def test_without_images_nothing_is_trained_and_the_report_says_so(trained, tmp_path):
    report = compress.run(ask(), model=trained, out=tmp_path / "run")
    assert report.curves == () and report.data.kind == "none"
    assert (
        next(stage for stage in report.stages if stage.name == "finetune").skipped
        == "no images were given, so nothing was trained"
    )
    assert any(note.startswith("No images were given") for note in report.notes)
    assert torch_hops(report) == ["baseline", "pruned", "fake-quantized"]


def test_half_precision_is_read_back_and_rebuilt(trained, tmp_path):
    report = compress.run(ask(weight_bits=16, activation_bits=16), model=trained, out=tmp_path / "run")
    assert [variant.name for variant in report.variants] == ["baseline", "pruned", "half"]
    sizes = {variant.name: sum(variant.file_bytes.values()) for variant in report.variants}
    assert sizes["half"] < 0.7 * sizes["pruned"]
    assert next(h for h in report.handoffs if h.target == "half.onnx").passed
    assert torch_hops(report) == ["baseline", "pruned"]


def test_quantizing_without_pruning_and_pruning_without_quantizing(trained, folder, tmp_path):
    only_bits = compress.run(ask(pruner="none", data=str(folder)), model=trained, out=tmp_path / "bits")
    assert [v.name for v in only_bits.variants] == ["baseline", "quantized"] and only_bits.variants[
        1
    ].parent == "baseline"
    assert only_bits.variants[0].parameters == only_bits.variants[1].parameters
    assert {s.name: s.skipped for s in only_bits.stages}["prune"] == "not pruned, as asked"
    assert torch_hops(only_bits) == ["baseline", "fake-quantized"]
    only_pruned = compress.run(ask(quantizer="none", data=str(folder)), model=trained, out=tmp_path / "channels")
    assert [v.name for v in only_pruned.variants] == ["baseline", "pruned"]
    assert {layer.weight_bits for layer in only_pruned.layers} == {32}
    assert torch_hops(only_pruned) == ["baseline", "pruned and refitted", "fine-tuned"]


def test_fewer_bits_are_called_what_they_are(trained, folder, tmp_path):
    report = compress.run(ask(weight_bits=4, data=str(folder)), model=trained, out=tmp_path / "run")
    assert any("4-bit weights and 8-bit activations in int8 containers, except" in note for note in report.notes)
    bits = [layer.weight_bits for layer in report.layers]
    assert (bits[0], bits[-1], set(bits[1:-1])) == (8, 8, {4}), "the first and the last layer keep 8 bits"


def test_a_wrong_hand_off_ends_the_run_with_both_numbers(trained, tmp_path, monkeypatch):
    from compress import onnx_export

    real = onnx_export.export

    def damaged(model, path, **options):
        model.fc.weight.data[0] += 1.0
        real(model, path, **options)
        model.fc.weight.data[0] -= 1.0

    monkeypatch.setattr(onnx_export, "export", damaged)
    with pytest.raises(
        HandoffError,
        match=r"baseline, torch and baseline.onnx answer differently: the logits differ by up to .* of .* allowed",
    ):
        compress.run(ask(), model=trained, out=tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["state"] == "failed" and "answer differently" in last["error"]


@pytest.mark.parametrize("target", ["baseline.onnx", "report.html", "quantization.json"])
def test_a_full_disk_is_one_sentence_and_the_run_resumes(trained, tmp_path, monkeypatch, target):
    real = files._sync

    def full(path):
        if path.name.endswith(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(StorageError, match="The disk is full: .* Free some space and resume the run"):
        compress.run(ask(), model=trained, out=tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert not list((tmp_path / "run").rglob(f"{files.PARTIAL}*"))
    monkeypatch.setattr(files, "_sync", real)
    report = compress.run(ask(), model=trained, out=tmp_path / "run", resume=True)
    assert report.verdict.size_ratio > 1


def test_a_run_interrupted_between_stages_gives_the_same_model_when_resumed(trained, folder, tmp_path, monkeypatch):
    whole = compress.run(ask(data=str(folder)), model=trained, out=tmp_path / "whole")
    real = pipeline.quantize

    def quantize(*_: object) -> QuantizeResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", quantize)
    with pytest.raises(KeyboardInterrupt):
        compress.run(ask(data=str(folder)), model=trained, out=tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "events.jsonl").read_text().splitlines()[-1])["state"] == "cancelled"
    monkeypatch.setattr(pipeline, "quantize", real)
    resumed = compress.run(ask(data=str(folder)), model=trained, out=tmp_path / "cut", resume=True)
    assert resumed.variant("quantized").accuracy == pytest.approx(whole.variant("quantized").accuracy, abs=0.05)
    assert [hop.name for hop in resumed.ledger] == [hop.name for hop in whole.ledger]


def test_a_module_of_ones_own_needs_its_name_and_size(trained, tmp_path):
    with pytest.raises(RequestError, match="model: got 'resnet18', expected 'custom'"):
        compress.run(ask(model="resnet18"), model=trained, out=tmp_path / "run")
    with pytest.raises(RequestError, match="input_size: got None, expected a number of pixels"):
        compress.run(ask(input_size=None), model=trained, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
