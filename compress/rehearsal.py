"""A run's steps on a few synthetic images, without training: what would happen to each layer, and on which runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compress import data, onnx_export, pruning, quantization, recipes
from compress.engines import RUNTIMES, BuildSpec, Kernel, Runtime
from compress.errors import CompressError
from compress.request import Request
from compress.sources import Source

CALIBRATION_IMAGES = 4
WEIGHTS_ONLY = "l1-norm"
"""Stands in for a pruner that looks at images: the plan, and so every shape, is the same."""


@dataclass
class Rehearsal:
    """What a dry run found; filled step by step, so that a failure leaves what was found before it."""

    problems: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=lambda: {"groups": [], "left_out": [], "thinned": ()})
    float_layers: list[dict[str, str]] = field(default_factory=list)
    runtimes: dict[str, str] = field(default_factory=dict)
    """Runtime -> what it did with the file, in a sentence."""
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Runtime -> layer -> precision that it executes the layer in."""

    def attempt(self, step: Callable[[], Any]) -> Any:
        """What `step` returns, or None with its refusal among the problems."""
        try:
            return step()
        except CompressError as error:
            self.problems.append(str(error))
            return None


def rehearse(request: Request, source: Source) -> Rehearsal:
    """Prune, shrink with proof, calibrate, export and build as `request` says; nothing is left on disk.

    A step that fails is a problem, and the steps that need its result are left out.
    """
    found = Rehearsal()
    model: nn.Module | None = source.model
    if request.prunes:
        model = found.attempt(lambda: _shrunk(request, source, found))
    if model is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        files = found.attempt(lambda: _exported(request, source, model, Path(folder), found))
        for runtime in RUNTIMES.values() if files else ():
            if runtime.flavour not in files:
                found.runtimes[runtime.name] = f"left out: {quantization.NO_TENSORRT_FILE}"
            elif runtime.missing() is None:
                _build(request, source, runtime, files[runtime.flavour], found)
    return found


def modules(request: Request, source: Source, found: Rehearsal) -> list[dict[str, str]]:
    """A line for each layer: green shrinks and runs on integers as far as asked, amber stays whole or in floating point.

    A problem of the whole request is a red line of the layer that it refuses by name, or of the model.
    """
    whole = {row["layer"]: row["reason"] for row in found.plan["left_out"]}
    shrinks = {layer: group for group in found.plan["groups"] for layer in group["layers"]}
    floats = {row["layer"]: row["reason"] for row in found.float_layers}
    layers = [name for name, module in source.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    lines = []
    for problem in found.problems:
        refused = next((name for name in layers if f"got {name!r}" in problem), source.name)
        lines.append({"module": refused, "level": "red", "text": problem})
    if found.problems:
        return lines
    for name in layers:
        stays = [f"stays whole: it {whole[name]}"] if name in whole else []
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


def _shrunk(request: Request, source: Source, found: Rehearsal) -> nn.Module:
    plan = recipes.usable_plan(request, source)
    found.plan = plan.as_dict()
    if not request.shrinks:
        return pruning.zero_weights(source.model, plan, request.sparsity).model.eval()
    pruner = WEIGHTS_ONLY if pruning.PRUNERS[request.pruner].needs_images else request.pruner
    return pruning.prune(source.model, source.example, plan, pruner).model.eval()


def _exported(
    request: Request, source: Source, model: nn.Module, folder: Path, found: Rehearsal
) -> dict[quantization.Flavour, Path]:
    """Flavour -> the file that the runtimes of this flavour would load."""
    size = source.preprocessing.input_size
    if not request.quantizes:
        path = folder / "float.onnx"
        onnx_export.export(model, path, input_size=size, precision="fp16" if request.half_precision else "fp32")
        return dict.fromkeys(quantization.FLAVOURS, path)
    images = data.calibration_images(source.dataset, CALIBRATION_IMAGES, source.preprocessing, request.seed)
    prepared, plan = recipes.prepared_with_bits(request, model, images)
    found.float_layers = quantization.left_float(prepared)
    quantized = quantization.quantize(
        prepared,
        plan,
        quantizer=request.quantizer,
        estimator=request.calibration,
        calibration=[images],
        train=None,
    )
    paths = {flavour: folder / f"quantized.{flavour}.onnx" for flavour in quantized.ranges.flavours}
    onnx_export.export_flavours(quantized, paths, input_size=size)
    return paths


def _build(request: Request, source: Source, runtime: Runtime, path: Path, found: Rehearsal) -> None:
    """A runtime that refuses the file is a problem when it was asked for; with `auto` another one is taken."""
    precision = "int8" if request.quantizes else "fp16" if request.half_precision else "fp32"
    spec = BuildSpec(
        source.preprocessing.input_size,
        threads=request.threads,
        precision=precision,
        hint=request.runtime_hint,
        targets=request.engine_targets,
    )
    try:
        built = runtime.build(path, path.with_name(f"{path.stem}.{runtime.name}.engine"), spec)
        kernels = [Kernel(**row) for row in built.passport.get("layers", [])]
        if runtime.runs_here:
            with runtime.load(built.path or path, spec) as session:
                kernels = list(session.kernels())
    except CompressError as error:
        found.runtimes[runtime.name] = str(error)
        if request.runtime == runtime.name or (request.engine_targets and runtime.name == "tensorrt-rtx"):
            found.problems.append(str(error))
        return
    integers = sum(kernel.precision == "int8" for kernel in kernels)
    state = "runs here" if runtime.runs_here else "builds here, cannot run here"
    found.runtimes[runtime.name] = f"{state}; {integers} of {len(kernels)} layers on integers"
    found.kernels[runtime.name] = {kernel.name: kernel.precision for kernel in kernels}
