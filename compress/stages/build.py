"""Stage 6: an engine for every runtime that has its tools here, compared with the torch model where it can run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress import equality, quantization
from compress.engines import RUNTIMES, Built, Runtime
from compress.equality.outputs import of_batches
from compress.errors import EngineError, HandoffError
from compress.report import Engine, Handoff
from compress.request import Request
from compress.runs import Run
from compress.stages import steps
from compress.stages.results import BuildResult, ExportResult, Variant
from compress.stages.workspace import Reference, compared_images, load_quantized, padded, references
from compress.workload import Workload

LARGEST_BUILT_FOR = 8
"""Images of a call that an engine is tuned for, at most; it takes any number up to the request's batch size."""


def build(run: Run, workload: Workload, exported: ExportResult) -> BuildResult:
    """Engines of the variant that is deployed; where engines run, of the earlier ones too: a gain is against something.

    Raises:
        HandoffError: the runtime that was asked for refuses the file, or answers differently.
    """
    deployed, images = exported.deployed, compared_images(workload)
    quantized = load_quantized(run, workload) if deployed.precision == "int8" else None
    present, notes = _present(quantized.grids.flavours if quantized else quantization.FLAVOURS)
    builder = _Builder(run, workload, images, references(run, workload, quantized, images))
    for number, runtime in enumerate(present):
        for variant in exported.variants if runtime.ahead_of_time and runtime.runs_here else [deployed]:
            run.progress("build", number / len(present), f"{runtime.name}, {variant.name}")
            try:
                builder.build(runtime, variant, is_deployed=variant == deployed)
            except HandoffError as error:
                builder.refused[runtime.name] = left_out(run.request, runtime, error)
                break
    return BuildResult(
        engines=tuple(builder.engines),
        handoffs=tuple(builder.handoffs),
        files=tuple(builder.parents),
        parents=builder.parents,
        agreeing=tuple(builder.agreeing),
        kernels=builder.kernels,
        refused=builder.refused,
        notes=(*notes, *builder.refused.values()),
    )


class _Builder:
    """Builds one engine after the other and compares it."""

    def __init__(self, run: Run, workload: Workload, images: Sequence[Tensor], reference: Reference) -> None:
        self._run, self._workload, self._images, self._reference = run, workload, images, reference
        self.engines: list[Engine] = []
        self.handoffs: list[Handoff] = []
        self.parents: dict[str, str] = {}
        self.agreeing: list[str] = []
        self.kernels: dict[str, dict[str, str]] = {}
        self.refused: dict[str, str] = {}

    def build(self, runtime: Runtime, variant: Variant, *, is_deployed: bool) -> None:
        onnx_path = self._run.artifacts / variant.file_for(runtime.flavour)
        engine_path = self._run.artifacts / f"{onnx_path.stem}.{runtime.name}.engine"
        request = self._run.request
        spec = steps.build_spec(request, self._workload, min(request.batch_size, LARGEST_BUILT_FOR))
        built = runtime.build(onnx_path, engine_path, spec)
        layers = {layer["name"]: layer["precision"] for layer in built.passport.get("layers", [])}
        if runtime.runs_here:
            handoff, layers = self._compare(runtime, variant, built.path or onnx_path)
            self.handoffs.append(handoff)
            if not handoff.passed:
                self.refused[runtime.name] = _disagreement(request, runtime, handoff)
            elif is_deployed:
                self.agreeing.append(runtime.name)
        if built.path:
            files = f"artifacts/{built.path.name}", f"artifacts/{built.path.name}.json"
            self.parents |= dict.fromkeys(files, f"artifacts/{onnx_path.name}")
        self.kernels[runtime.name] = layers
        self.engines.append(_engine(runtime, variant, built, onnx_path, layers))

    def _compare(self, runtime: Runtime, variant: Variant, path: Path) -> tuple[Handoff, dict[str, str]]:
        """The hand-off from the torch model, and the precision of each layer as the runtime executes it."""
        expected, images, request = self._reference(variant, runtime.flavour), self._images, self._run.request
        if runtime.ahead_of_time and len(images[0]) > request.batch_size:  # the engine takes no larger batch
            images = [part for batch in images for part in batch.split(request.batch_size)]
        spec = steps.build_spec(request, self._workload, len(images[0]))
        spec = replace(spec, threads=torch.get_num_threads())
        with runtime.load(path, spec) as session:
            got = of_batches(partial(padded, session, len(images[0])), images)
            layers = {kernel.name: kernel.precision for kernel in session.kernels()}
        _require_outputs(runtime, path, expected, got)
        source = "fake-quantized, torch" if variant.precision == "int8" else f"{variant.name}, torch"
        target = f"{path.name} on {runtime.name}"
        return equality.judge(source, target, expected, got, variant.precision, self._workload.task), layers


def _engine(runtime: Runtime, variant: Variant, built: Built, onnx_path: Path, layers: dict[str, str]) -> Engine:
    return Engine(
        runtime=runtime.name,
        variant=variant.name,
        file=built.path.name if built.path else onnx_path.name,
        ran=built.ran,
        text=built.text,
        layer_precisions=dict(Counter(layers.values())),
    )


def _present(flavours: Sequence[quantization.Flavour]) -> tuple[list[Runtime], list[str]]:
    """The runtimes that have their tools here and a file to build, and a note for each reason why others have not."""
    reasons: dict[str, list[str]] = {}
    present = []
    for runtime in RUNTIMES.values():
        reason = runtime.missing() or (None if runtime.flavour in flavours else quantization.NO_TENSORRT_FILE)
        if reason is None:
            present.append(runtime)
        else:
            reasons.setdefault(reason, []).append(runtime.name)
    return present, [f"Left out: {', '.join(names)}. {reason}" for reason, names in reasons.items()]


def is_requested(request: Request, runtime: Runtime) -> bool:
    """Whether the request names this runtime, or an engine for it; a run then ends when it fails."""
    return request.runtime == runtime.name or bool(request.engine_targets and runtime.builds_for_targets)


def left_out(request: Request, runtime: Runtime, error: HandoffError) -> str:
    """A note for the report; raises `error` when this runtime was asked for."""
    if is_requested(request, runtime):
        raise error
    return f"{runtime.name} was left out: {error}"


def _require_outputs(runtime: Runtime, path: Path, expected: np.ndarray, got: np.ndarray) -> None:
    """Raises `EngineError` when the outputs are not even finite numbers of the model's shape."""
    if got.shape == expected.shape and np.isfinite(got).all():
        return
    shapes = [" x ".join(map(str, one.shape[1:])) for one in (got, expected)]
    numbers = "numbers that are not finite" if got.shape == expected.shape else f"{shapes[0]} numbers"
    raise EngineError(
        runtime.name,
        f"{runtime.title} answers an image with {numbers} from {path.name}, where the model has {shapes[1]} logits.",
    )


def _disagreement(request: Request, runtime: Runtime, handoff: Handoff) -> str:
    """Why `auto` does not take this runtime; raises it when the runtime was asked for."""
    text = (
        f"{runtime.name} answers differently from the model it was given: {100 * handoff.top1_agreement:.1f} % equal "
        f"top-1 on {handoff.n_images} images, where {handoff.tolerance} is allowed.{equality.saturation()}"
    )
    if request.runtime == runtime.name:
        raise HandoffError(text)
    return text
