"""Checkpoints as people really write them: every kind is read, and the model answers as if loaded by hand."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from checkpoint_files import edit_zip
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import models
from compress.checkpoints import reader
from compress.checkpoints.loader import Loader
from compress.errors import CheckpointError
from torture.rows import Outcome, Row

State = dict[str, Tensor]


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def _written(model: nn.Module) -> nn.Module:
    """With statistics that differ from those of a new model."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model


@dataclass(frozen=True)
class Kind:
    """How a model is written, and how its author would read it again."""

    make: Callable[[nn.Module], Any] = lambda model: model.state_dict()
    pick: Callable[[Any], State] = lambda loaded: loaded
    save: Callable[[Any, Path], None] = torch.save
    suffix: str = ".pth"
    model: Callable[[], nn.Module] = small_model
    size: int = 16


def _prefixed(prefix: str) -> Kind:
    return Kind(
        lambda model: {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()},
        lambda loaded: {name.removeprefix(prefix): tensor for name, tensor in loaded.items()},
    )


def _under(*keys: str, **beside: Any) -> Kind:
    def make(model: nn.Module) -> Any:
        made: Any = model.state_dict()
        for key in reversed(keys):
            made = {key: made}
        return {**made, **beside}

    def pick(loaded: Any) -> State:
        for key in keys:
            loaded = loaded[key]
        return loaded

    return Kind(make, pick)


def _as(dtype: torch.dtype, **options: Any) -> Kind:
    return Kind(lambda model: model.to(dtype).state_dict(), **options)


def _changed(change: Callable[[Tensor], Tensor]) -> Kind:
    return Kind(lambda model: {name: change(tensor) for name, tensor in model.state_dict().items()})


def _rezipped(keep: Callable[[str], bool], rename: Callable[[str], str] = str) -> Callable[[Any, Path], None]:
    def save(value: Any, path: Path) -> None:
        whole = path.with_name("whole.pth")
        torch.save(value, whole)
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                if keep(entry.filename):
                    new.writestr(rename(entry.filename), old.read(entry))

    return save


def _on_a_gpu(value: Any, path: Path) -> None:
    """As a machine with two devices writes it: only the location of each storage differs."""
    whole = path.with_name("whole.pth")
    torch.save(value, whole)
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1"
    edit_zip(whole, path, lambda name, data: data.replace(cpu, cuda) if name.endswith("data.pkl") else data)


def _through_a_buffer(value: Any, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())


def _safetensors(**metadata: str) -> Callable[[Any, Path], None]:
    return lambda value, path: save_file(dict(value), path, metadata=metadata or None)


def _training(model: nn.Module) -> dict[str, Any]:
    """A whole training state: weights, an optimizer that has stepped, a schedule, a gradient scaler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.ones(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "epoch": 7,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "best": 0.93,
        "classes": ["cat", "dog"],
    }


def _lightning(model: nn.Module) -> dict[str, Any]:
    return {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "current_score": None}},
        "optimizer_states": [torch.optim.SGD(model.parameters(), lr=0.1).state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1, "layers": (1, 2)},
    }


def _averaged(model: nn.Module) -> State:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def _tied(model: nn.Module) -> State:
    """Weights that are slices of one storage."""
    state = model.state_dict()
    joined = torch.cat([state["1.weight"], state["1.bias"]])
    return {**state, "1.weight": joined[:8], "1.bias": joined[8:]}


def _torchvision(name: str) -> Kind:
    return Kind(model=lambda: torchvision.models.get_model(name, num_classes=5), size=64)


def _own(keys: str) -> Callable[[Any], State]:
    return lambda loaded: {name.removeprefix(keys): value for name, value in loaded.items() if name.startswith(keys)}


KINDS: dict[str, Kind] = {
    "state_dict()": Kind(),
    "named .pt": Kind(suffix=".pt"),
    "named .bin": Kind(suffix=".bin"),
    "named .ckpt": Kind(suffix=".ckpt"),
    "through a buffer": Kind(save=_through_a_buffer),
    "state_dict(keep_vars=True)": Kind(lambda model: model.state_dict(keep_vars=True)),
    "a plain dictionary": Kind(lambda model: dict(model.state_dict())),
    "half": _as(torch.float16),
    "bfloat16": _as(torch.bfloat16),
    "double": _as(torch.float64),
    "half in safetensors": _as(torch.float16, save=_safetensors(), suffix=".safetensors"),
    "bfloat16 in safetensors": _as(torch.bfloat16, save=_safetensors(), suffix=".safetensors"),
    "safetensors": Kind(save=_safetensors(), suffix=".safetensors"),
    "safetensors of timm": Kind(save=_safetensors(format="pt"), suffix=".safetensors"),
    "safetensors with class names": Kind(save=_safetensors(class_names='["a", "b"]'), suffix=".safetensors"),
    "DataParallel": _prefixed("module."),
    "torch.compile": _prefixed("_orig_mod."),
    "compiled and parallel": _prefixed("module._orig_mod."),
    "a wrapper's model.": _prefixed("model."),
    "a wrapper's backbone.": _prefixed("backbone."),
    "a wrapper's net.": _prefixed("net."),
    "under state_dict": _under("state_dict", epoch=3),
    "under model": _under("model", optimizer={"state": {}, "param_groups": []}),
    "under net": _under("net", acc=91.5),
    "under net, beside ema": _under("net", ema={"0.weight": torch.zeros(2)}),
    "under network": _under("network"),
    "under weights": _under("weights"),
    "under params": _under("params"),
    "under ema": _under("ema"),
    "under model and state_dict": _under("model", "state_dict"),
    "of timm": _under("state_dict", arch="resnet", epoch=1, version=2, metric=80.1),
    "a whole training state": Kind(_training, lambda loaded: loaded["model_state_dict"]),
    "of Lightning": Kind(
        _lightning,
        lambda loaded: {name.removeprefix("model."): tensor for name, tensor in loaded["state_dict"].items()},
    ),
    "of AveragedModel": Kind(_averaged, _own("module.")),
    "with numbers beside": Kind(
        lambda model: {**model.state_dict(), "epoch": 3, "note": "x", "lr": 0.1, "done": True, "best": None},
        lambda loaded: {name: value for name, value in loaded.items() if isinstance(value, Tensor)},
    ),
    "channels last": Kind(lambda model: model.to(memory_format=torch.channels_last).state_dict()),
    "transposed in memory": _changed(lambda tensor: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor),
    "slices of one storage": Kind(_tied),
    "slices of larger storages": _changed(lambda tensor: torch.stack([tensor, tensor])[1]),
    "written on a GPU": Kind(save=_on_a_gpu),
    "of torch 1.6": Kind(save=_rezipped(lambda name: "data/" in name or name.endswith(("data.pkl", "version")))),
    "zipped again": Kind(save=_rezipped(bool)),
    "another folder inside": Kind(save=_rezipped(bool, lambda name: f"archive/{name.partition('/')[2]}")),
    **{f"torchvision's {name}": _torchvision(name) for name in ("squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5")},
    **{f"torchvision's {name}": _torchvision(name) for name in ("shufflenet_v2_x0_5", "regnet_y_400mf", "resnet18")},
}


def run(folder: Path, full: bool) -> Outcome:
    del full  # all of it is quick
    with Loader() as loader:
        failures = [f"{name}: {wrong}" for name in KINDS if (wrong := difference(name, folder, loader))]
    accepted = len(KINDS) - len(failures)
    return Outcome(f"{accepted} of {len(KINDS)} kinds accepted with equal answers", tuple(failures))


def difference(name: str, folder: Path, loader: Loader) -> str | None:
    """What is wrong with how a kind is read; None when nothing is."""
    kind, path = KINDS[name], folder / f"honest{KINDS[name].suffix}"
    torch.manual_seed(0)
    kind.save(kind.make(_written(kind.model())), path)
    loaded = (
        load_file(path) if kind.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    )
    try:
        read = reader.read(path, loader=loader)
    except CheckpointError as error:
        return f"refused: {error}"
    if any(not torch.equal(tensor, read[key].to(tensor.dtype)) for key, tensor in kind.pick(loaded).items()):
        return "a tensor differs"
    by_hand, by_gate = _answers(kind, kind.pick(loaded)), _answers(kind, read)
    return None if torch.equal(by_hand, by_gate) else "the answers differ"


def _answers(kind: Kind, state: State) -> Tensor:
    model = kind.model().eval()
    models.load_weights(
        model, {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    with torch.no_grad():
        return model(torch.rand(2, 3, kind.size, kind.size, generator=torch.Generator().manual_seed(1)))


HONEST = Row(
    "honest", "honest checkpoints, >= 30 kinds", "100 % accepted, answers equal to those of direct loading", run
)
