"""A run's stages on a few images, with one step of each training: what would happen to each layer, and on which runtime.

The stages are the run's own, so that what stops a run stops the dry run as well. Left out is what only judges or measures:
the accuracy of the model as it came, the search for mixed precision, latencies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import nn

from compress import quantization
from compress.engines import RUNTIMES
from compress.errors import CompressError, RequestError
from compress.models import counting
from compress.pruning.interface import clause
from compress.request import Request
from compress.runs import R, Run, within_memory
from compress.stages import steps
from compress.stages.baseline import baseline
from compress.stages.build import build
from compress.stages.export import export
from compress.stages.finetune import finetune
from compress.stages.prune import prune
from compress.stages.quantize import quantize
from compress.stages.results import FloatLayer, PruneResult, QuantizeResult
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
class DryRun:
    """What a dry run found; filled step by step, so that a failure leaves what was found before it."""

    refusals: list[tuple[str, str | None]] = field(default_factory=list)
    """Each problem in a sentence, and the name that was refused, where there is one."""
    plan: PruneResult = field(default_factory=lambda: PruneResult(ledger=()))
    """Its groups and layers; all empty where nothing is pruned."""
    float_layers: tuple[FloatLayer, ...] = ()
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


class _DryRunFolder(Run):
    """A run that keeps no records, and tells nobody how far it is."""

    def _execute(self, name: str, result_types: tuple[type[R], ...], work: Callable[[], R]) -> R:
        return within_memory(name, work)

    def progress(self, stage: str, fraction: float, message: str) -> None:
        """Nobody waits for it."""


def dry_run(request: Request, workload: Workload) -> DryRun:
    """Executes the stages of a run of `request` up to the engines on a few images; nothing is left on disk.

    A stage that fails is a problem, and those after it are left out.
    """
    found = DryRun()
    found.attempt(lambda: steps.require_trainable(request, workload))
    if request.prunes:
        found.attempt(lambda: _plan(found, request, workload))
    if found.refusals:
        return found
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        few = _with_few_images(request, workload)
        run = _DryRunFolder(Path(folder), _shortened(request, few), lambda event: None)
        found.attempt(lambda: _execute(run, few, found))
    return found


def _plan(found: DryRun, request: Request, workload: Workload) -> None:
    found.plan = PruneResult(ledger=(), **steps.usable_plan(request, workload).as_dict())


def _execute(run: Run, workload: Workload, found: DryRun) -> None:
    dense = run.stage(partial(baseline, scored=False), workload)
    pruned = run.stage(prune, workload, dense)
    if isinstance(pruned, PruneResult):
        found.plan = pruned
    tuned = run.stage(finetune, workload, dense, pruned)
    quantized = run.stage(quantize, workload, dense, pruned, tuned)
    found.float_layers = quantized.left_float if isinstance(quantized, QuantizeResult) else ()
    exported = run.stage(partial(export, dry=True), workload, dense, pruned, tuned, quantized)
    deployed = exported.deployed
    for runtime in RUNTIMES.values():
        if deployed.precision == "int8" and deployed.file_for(runtime.flavour) not in deployed.files:
            found.runtimes[runtime.name] = f"left out: {quantization.NO_TENSORRT_FILE}"
    built = run.stage(build, workload, exported)
    found.kernels = built.kernels
    for name, kernels in built.kernels.items():
        integers = sum(precision == "int8" for precision in kernels.values())
        state = "runs here" if RUNTIMES[name].runs_here else "builds here, cannot run here"
        found.runtimes[name] = f"{state}; {integers} of {len(kernels)} layers on integers"
    found.runtimes |= built.refused


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
    in_epoch = steps.training_images(once, few).per_epoch if few.dataset.has_images else 1
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


def modules(request: Request, workload: Workload, found: DryRun) -> list[dict[str, str]]:
    """A line for each layer: green shrinks and runs on integers as far as asked, amber is not pruned or stays in floating point.

    A problem of the whole request is a red line of the layer that it refuses by name, or of the model. A plan that removes
    far less than what was asked for is an amber line of the model.
    """
    whole = {row.layer: row.reason for row in found.plan.left_out}
    shrinks = {layer: group for group in found.plan.groups for layer in group.layers}
    floats = {row.layer: row.reason for row in found.float_layers}
    layers = [name for name, module in workload.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    lines: list[dict[str, str]] = []
    for problem, layer in found.refusals:
        module = layer if layer is not None and layer in layers else workload.name
        lines.append({"module": module, "level": "red", "text": problem})
    if found.refusals:
        return lines
    if found.plan.shortfall:
        lines.append({"module": workload.name, "level": "amber", "text": found.plan.shortfall})
    for name in layers:
        stays = [f"not pruned: {clause('it', whole[name])}"] if name in whole else []
        if request.quantizes:
            stays += [f"stays in floating point: {floats[name]}"] if name in floats else []
            stays += [
                f"runs in {kernels[name]} on {runtime}"
                for runtime, kernels in found.kernels.items()
                if name not in floats and kernels.get(name, "int8") != "int8"
            ]
        group = shrinks.get(name)
        gains = [f"{group.channels_before} to {group.channels_after} channels"] if group else []
        gains += ["integers"] if request.quantizes and name not in floats else []
        level, text = ("amber", "; ".join(stays)) if stays else ("green", ", ".join(gains) or "exported as it is")
        lines.append({"module": name, "level": level, "text": text})
    return lines
