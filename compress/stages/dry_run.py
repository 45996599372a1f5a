"""A run's stages on a few images, with one step of each training: what would happen to each layer, and on which runtime.

The stages are the run's own, so that what stops a run stops the dry run as well. Left out is what only judges or measures:
the accuracy of the model as it came, the search for mixed precision, latencies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from compress import quantization, runs
from compress.engines import RUNTIMES
from compress.errors import CompressError, RequestError
from compress.models import counting
from compress.request import Request
from compress.stages import deployment, steps, workspace
from compress.workload import Workload

PIXELS = 2 * 224 * 224
"""Of the images of one step: 98 of 32 pixels, 2 of 224."""
FEWEST, MOST = 4, 64
"""Images that forms of the model are compared on, and ranges calibrated with."""
ROUNDS = 2
"""Of a pruner that trains in between."""
QUICKLY_REFITTED = 5_000_000
"""Parameters up to which weights are refitted, too; the equations of resnet50's layers take 40 s of two cores."""
T = TypeVar("T")


@dataclass
class Rehearsal:
    """What a dry run found; filled step by step, so that a failure leaves what was found before it."""

    refusals: list[tuple[str, str | None]] = field(default_factory=list)
    """Each problem in a sentence, and the name that was refused, where there is one."""
    plan: dict[str, Any] = field(default_factory=lambda: {"groups": [], "left_out": [], "thinned": ()})
    shortfall: str | None = None
    """Why the plan removes far less than what was asked for."""
    float_layers: list[dict[str, str]] = field(default_factory=list)
    runtimes: dict[str, str] = field(default_factory=dict)
    """Runtime -> what it did with the file, in a sentence."""
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Runtime -> layer -> precision that it executes the layer in."""

    @property
    def problems(self) -> list[str]:
        return [text for text, _ in self.refusals]

    def attempt(self, step: Callable[[], T]) -> T | None:
        """What `step` returns, or None with its refusal among the problems."""
        try:
            return step()
        except CompressError as error:
            name = error.layer or (error.got if isinstance(error, RequestError) else None)
            if str(error) not in self.problems:
                self.refusals.append((str(error), name if isinstance(name, str) else None))
            return None

    def keep_plan(self, plan: dict[str, Any]) -> None:
        self.plan = {key: plan[key] for key in self.plan if key in plan}


class _DryRun(runs.Run):
    """Keeps its records in memory, and tells nobody how far it is."""

    def __init__(self, folder: Path, request: Request) -> None:
        super().__init__(folder, request, lambda event: None)
        self._done: dict[str, dict[str, Any]] = {}

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self._done[name] = runs.within_memory(name, work)
        return self._done[name]

    def facts(self, name: str) -> dict[str, Any]:
        return self._done[name]

    def progress(self, stage: str, fraction: float, message: str) -> None:
        """Nobody waits for it."""


def rehearse(request: Request, workload: Workload) -> Rehearsal:
    """Carries out the stages of a run of `request` up to the engines; nothing is left on disk.

    A stage that fails is a problem, and those after it are left out.
    """
    found = Rehearsal()
    found.attempt(lambda: steps.require_trainable(request, workload))
    if request.prunes:
        found.attempt(lambda: found.keep_plan(steps.usable_plan(request, workload).as_dict()))
    if found.refusals:
        return found
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        few = _with_few_images(request, workload)
        work = _DryRun(Path(folder), _shortened(request, few))
        found.attempt(lambda: _carry_out(work, few, found))
    return found


def _carry_out(work: _DryRun, workload: Workload, found: Rehearsal) -> None:
    work.stage("baseline", lambda: workspace.keep_baseline(work, workload))
    pruned = work.stage("prune", lambda: workspace.prune_and_shrink(work, workload))
    found.keep_plan(pruned)
    found.shortfall = pruned.get("shortfall")
    work.stage("finetune", lambda: workspace.fine_tune(work, workload))
    found.float_layers = work.stage("quantize", lambda: workspace.quantize(work, workload))["left_float"]
    files = work.stage("export", lambda: deployment.export(work, workload, dry=True))["variants"].get("quantized")
    for runtime in RUNTIMES.values():
        if files and f"quantized.{runtime.flavour}.onnx" not in files:
            found.runtimes[runtime.name] = f"left out: {quantization.NO_TENSORRT_FILE}"
    built = work.stage("build", lambda: deployment.build_engines(work, workload))
    found.kernels = built["kernels"]
    for name, kernels in built["kernels"].items():
        integers = sum(precision == "int8" for precision in kernels.values())
        state = "runs here" if RUNTIMES[name].runs_here else "builds here, cannot run here"
        found.runtimes[name] = f"{state}; {integers} of {len(kernels)} layers on integers"
    found.runtimes |= built["refused"]


def _with_few_images(request: Request, workload: Workload) -> Workload:
    """What one step takes and what forms are compared on; some of the training images are held out."""
    size = workload.preprocessing.input_size
    step = _step(request, size)
    train = max(step + step // 19 + 1, _compared(size))
    return replace(workload, dataset=workload.dataset.few(train, _compared(size), request.seed))


def _shortened(request: Request, few: Workload) -> Request:
    """One step of each training, and little of what only makes a result better."""
    size = few.preprocessing.input_size
    once = request.model_copy(update={"train_batch_size": _step(request, size), "training_processes": 1})
    in_epoch = steps.training_images(once, few).per_epoch if few.dataset.kind != "none" else 1
    epochs = {
        name: min(1 / in_epoch, getattr(request, name)) for name in ("pruning_epochs", "finetune_epochs", "qat_epochs")
    }
    refits = counting.count_parameters(few.model) <= QUICKLY_REFITTED
    return once.model_copy(
        update=epochs
        | {
            "pruning_steps": min(request.pruning_steps, ROUNDS),
            "calibration_images": min(request.calibration_images, _compared(size)),
            "reconstruction_images": min(request.reconstruction_images, _compared(size)) if refits else 0,
            "max_quantization_loss": None,
        }
    )


def _step(request: Request, size: int) -> int:
    """Images of a training step: as many as a process of the run takes, where they are small."""
    return min(max(1, request.train_batch_size // request.training_processes), max(2, PIXELS // size**2))


def _compared(size: int) -> int:
    return min(MOST, max(FEWEST, PIXELS // size**2))


def modules(request: Request, workload: Workload, found: Rehearsal) -> list[dict[str, str]]:
    """A line for each layer: green shrinks and runs on integers as far as asked, amber stays whole or in floating point.

    A problem of the whole request is a red line of the layer that it refuses by name, or of the model. A plan that removes
    far less than what was asked for is an amber line of the model.
    """
    whole = {row["layer"]: row["reason"] for row in found.plan["left_out"]}
    shrinks = {layer: group for group in found.plan["groups"] for layer in group["layers"]}
    floats = {row["layer"]: row["reason"] for row in found.float_layers}
    layers = [name for name, module in workload.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    lines = []
    for problem, layer in found.refusals:
        lines.append({"module": layer if layer in layers else workload.name, "level": "red", "text": problem})
    if found.refusals:
        return lines
    if found.shortfall:
        lines.append({"module": workload.name, "level": "amber", "text": found.shortfall})
    for name in layers:
        stays = [f"stays whole: {_of_the_layer(whole[name])}"] if name in whole else []
        if request.quantizes:
            stays += [f"stays in floating point: {floats[name]}"] if name in floats else []
            stays += [
                f"runs in {kernels[name]} on {runtime}"
                for runtime, kernels in found.kernels.items()
                if name not in floats and kernels.get(name, "int8") != "int8"
            ]
        group = shrinks.get(name)
        gains = [f"{group['channels_before']} to {group['channels_after']} channels"] if group else []
        gains += ["integers"] if request.quantizes and name not in floats else []
        level, text = ("amber", "; ".join(stays)) if stays else ("green", ", ".join(gains) or "exported as it is")
        lines.append({"module": name, "level": level, "text": text})
    return lines


def _of_the_layer(reason: str) -> str:
    return reason if reason.startswith("its ") else f"it {reason}"
