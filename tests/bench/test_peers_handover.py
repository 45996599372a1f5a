"""What a peer's script is given: images counted against the budget, the dense model, Espalier's own optimizer, and names that exist."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from places import ROOT
from safetensors.torch import save_file

from bench.peers import driver, environments
from bench.peers.driver import Conditions
from bench.peers.rows import Row
from compress import training

ROW = Row("fake", "Fake", "fakes", "fake", {})


@pytest.fixture
def handover(monkeypatch):
    monkeypatch.syspath_prepend(str(driver.SCRIPTS))
    yield importlib.import_module("handover")
    sys.modules.pop("handover")


def job_of(handover, folder: Path, monkeypatch, **changes):
    """A job as a script reads it: thirty images, a budget of 70."""
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", pixels=rng.integers(0, 256, (30, 1, 32, 32), np.uint8), labels=np.arange(30) % 10)
    conditions = Conditions("mobilenet_v2", folder / "w", folder / "images.npz", "here", 0.5, 0.25, 32, 70, False)
    (folder / "job.json").write_text(json.dumps(replace(conditions, **changes).job(ROW)))
    monkeypatch.setattr(sys, "argv", ["script", str(folder / "job.json")])
    monkeypatch.setattr(handover.atexit, "register", lambda call: None)
    return handover.Job.read()


def test_the_handover_counts_training_images(handover, tmp_path, monkeypatch):
    job = job_of(handover, tmp_path, monkeypatch)
    batches = job.training(0.5)
    assert job.used == 35 and [len(images) for images, _ in batches] == [35] and len(batches) == 1
    assert [len(labels) for _, labels in job.training(0.5)] == [35], "the rest"
    with pytest.raises(ValueError, match="71 training images were taken; the budget is 70."):
        job.spend(1)


def test_every_pass_shows_every_image_once(handover, tmp_path, monkeypatch):
    job = job_of(handover, tmp_path, monkeypatch, budget=60)
    labels = torch.cat([labels for _, labels in job.training()])
    assert torch.bincount(labels[:30]).tolist() == [3] * 10 and torch.bincount(labels[30:]).tolist() == [3] * 10


def test_images_are_normalised_and_enlarged(handover, tmp_path, monkeypatch):
    job = job_of(handover, tmp_path, monkeypatch, budget=0, input_size=64)
    assert job.calibration().shape == (30, 3, 64, 64) and list(job.training()) == []
    expected = (job._pixels[0, 0, 0, 0].float() / 255 - 0.5) / 0.25
    assert torch.allclose(job.example[0, :, :2, :2], expected.expand(3, 2, 2))


def test_the_handover_builds_the_dense_model(handover, tmp_path, monkeypatch):
    model = torchvision.models.mobilenet_v2(num_classes=10).eval()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file(halves, tmp_path / "w")
    images = torch.rand(2, 3, 32, 32)
    answers = job_of(handover, tmp_path, monkeypatch).dense()(images)
    assert torch.allclose(answers, model.half().float()(images), atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_peers_are_trained_by_the_optimizer_that_espalier_trains_with(monkeypatch, optimizer):
    monkeypatch.syspath_prepend(str(driver.SCRIPTS))
    script = importlib.import_module("training")
    monkeypatch.delitem(sys.modules, "training")
    made = []
    schedule = torch.optim.lr_scheduler.OneCycleLR
    monkeypatch.setattr(
        torch.optim.lr_scheduler, "OneCycleLR", lambda o, *a, **k: made.append(o) or schedule(o, *a, **k)
    )
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    script.train(model, model, [], 0.04, optimizer)
    ours = training.build_optimizer(model, training.TrainingConfig(1, 0.04, 0.5, 4.0, optimizer=optimizer))
    assert [vars_of(group) for group in made[0].param_groups] == [vars_of(group) for group in ours.param_groups]
    assert type(made[0]) is type(ours)


def vars_of(group: dict) -> dict:
    """A group of an optimizer without what the schedule has set."""
    scheduled = {"lr", "initial_lr", "max_lr", "min_lr"}
    return {k: v for k, v in group.items() if k not in scheduled} | {"params": [id(p) for p in group["params"]]}


NAMES = {
    "torch-pruning": "import torch_pruning as tp; tp.pruner.BasePruner, tp.importance.GroupMagnitudeImportance",
    "onnxruntime": "from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static\n"
    "from onnxruntime.quantization.shape_inference import quant_pre_process",
    "nncf": "import nncf, openvino; nncf.quantize, nncf.Dataset, nncf.strip, openvino.convert_model, openvino.save_model\n"
    "from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix",
    "neural-compressor": "from neural_compressor.torch.export import export\n"
    "from neural_compressor.torch.quantization import convert, get_default_static_config, prepare",
    "modelopt": "import modelopt.torch.opt as mto, modelopt.torch.prune as mtp, modelopt.torch.quantization as mtq\n"
    "mto.save, mto.restore, mtp.prune, mtq.quantize, mtq.INT8_DEFAULT_CFG",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_the_scripts_use_exist(name):
    """Where `make bench-peers` has installed the peer."""
    home = ROOT / "build" / "peers" / name
    if not (home / environments.READY).is_file():
        pytest.skip(f"{name} is not installed")
    python = home / "venv" / "bin" / "python"
    done = subprocess.run([python, "-W", "ignore", "-c", NAMES[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
