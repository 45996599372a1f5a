"""Espalier: make an image classifier smaller and faster, and prove what that cost.

import compress
report = compress.run(compress.Request(model="resnet18", data="fashion-mnist"), out="runs/first")
model = compress.load("runs/first")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.report import Report
from compress.request import Request

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"
__all__ = ["CompressError", "Report", "Request", "__version__", "load", "run"]


def run(
    request: Request,
    *,
    model: nn.Module | None = None,
    out: str | Path,
    resume: bool = False,
    forecast: str | Path | None = None,
    notify: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Report:
    """Carries out `request` in the folder `out`; see `compress.pipeline.run`."""
    from compress import pipeline

    given = None if forecast is None else Path(forecast)
    return pipeline.run(request, model=model, out=Path(out), resume=resume, forecast=given, notify=notify)


def load(run_folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The pruned and fine-tuned model of a finished run, rebuilt in eval mode; NNI is not needed.

    Args:
        model: a fresh instance of your own class, for a run that started from `model=`.

    Raises:
        StorageError: the folder holds no model, or it was changed after the run.
        CheckpointError: `model` is missing, not needed, or not the module that was compressed.
        RequestError: `model` cannot be opened.
    """
    from compress import models, own_modules, runs

    folder = Path(run_folder)
    if (folder / runs.MANIFEST).is_file():
        runs.require_unchanged(folder, [f"artifacts/{name}" for name in (models.SPEC_FILE, models.WEIGHTS_FILE)])
    spec = models.read_spec(folder / "artifacts")
    if model is not None and spec.architecture is None:
        bare, _ = own_modules.unwrapped(model)
        models.require_class(spec, bare)
        model = own_modules.open_module(bare, spec.preprocessing.input_size).model
    return models.rebuild(folder / "artifacts", model=model)
