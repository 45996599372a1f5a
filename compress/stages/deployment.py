"""The stages that leave torch: ONNX files and engines, each compared with the model that it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import equality, onnx_export, quantization
from compress.engines import RUNTIMES, BuildSpec, Built, Precision, Runtime, Session
from compress.engines.processes.remote import recording
from compress.equality import differences
from compress.errors import MORE_MEMORY, EngineError, HandoffError
from compress.files import PACKAGE, atomic, write_text
from compress.runs import Run
from compress.stages import ledger, workspace
from compress.workload import Workload

Facts = dict[str, Any]

COMPARED_IMAGES = 256
INFER_SCRIPT = PACKAGE / "report" / "templates" / "infer.py"
PARENTS = {"baseline": "the request", "pruned": "baseline", "half": "pruned", "quantized": "pruned"}


def export(work: Run, workload: Workload, *, dry: bool = False) -> Facts:
    """ONNX files of the dense, the pruned and the quantized model, each compared with torch on the same images.

    Args:
        dry: leave out the dense one where there is a pruned one, which is the same code, and the noise of files that pass.
    """
    images = _compared_images(workload)
    rows, variants, noise = [], {}, {}
    floats = _float_variants(work)
    if dry and len(floats) > 1:
        del floats["baseline"]
    for number, (variant, folder) in enumerate(floats.items()):
        work.progress("export", number / 4, f"{variant}.onnx")
        model = workspace.load_model(work, workload, folder)
        if folder == "artifacts" and not work.request.quantizes:  # else the stage that quantized it has looked
            rows.append(ledger.rebuilt(work, workload, "finetune", model))
        path = work.artifacts / f"{variant}.onnx"
        precision = "fp16" if variant == "half" else "fp32"
        with atomic(path) as partial_path:
            size = workload.preprocessing.input_size
            proof = onnx_export.export(model, partial_path, input_size=size, precision=precision, images=images[0])
        rows += [proof | {"source": f"{variant}, torch", "target": f"{variant}, BatchNorm folded"}] if proof else []
        expected = differences.logits(differences.torch_answer(model), images)
        rows.append(
            equality.checked(equality.judge(variant, path.name, expected, _compare_file(path, workload, images)))
        )
        variants[variant] = [path.name]
    if work.request.quantizes:
        work.progress("export", 0.6, "quantized, both flavours")
        quantized = workspace.load_quantized(work, workload)
        rows.append(ledger.rebuilt(work, workload, "quantize", quantization.fake_quantized(quantized)))
        files = _export_quantized(work, workload, quantized)
        for flavour, path in files.items():
            expected = _quantized_logits(quantized, flavour, images)
            row = equality.judge("quantized", path.name, expected, _compare_file(path, workload, images))
            if dry and row["passed"]:
                continue
            found = _file_noise(quantized, flavour, path, images)
            rows.append(equality.checked(row, _noisiest(found)))
            noise[path.name] = ledger.noise_facts(found)
        variants["quantized"] = [path.name for path in files.values()]
    write_text(work.artifacts / "infer.py", INFER_SCRIPT.read_text(encoding="utf-8"))
    names = [f"artifacts/{name}" for files in variants.values() for name in files]
    return {
        "handoffs": rows,
        "noise": noise,
        "variants": {
            variant: {name: (work.artifacts / name).stat().st_size for name in files}
            for variant, files in variants.items()
        },
        "parents": {f"artifacts/{name}": PARENTS[variant] for variant, files in variants.items() for name in files},
        "files": [*names, "artifacts/infer.py"],
    }


def build_engines(work: Run, workload: Workload) -> Facts:
    """An engine for every runtime that has its tools here, from the last variant; compared where it can run.

    Where engines run, the earlier variants get one too: a gain is measured against something.
    """
    variants = list(work.facts("export")["variants"])
    last = variants[-1]
    images = _compared_images(workload)
    quantized = workspace.load_quantized(work, workload) if last == "quantized" else None
    flavours = quantized.grids.flavours if quantized else quantization.FLAVOURS

    @cache
    def reference(variant: str, flavour: quantization.Flavour) -> np.ndarray:
        if variant == "quantized":
            return _quantized_logits(quantized, flavour, images)
        model = workspace.load_model(work, workload, _float_variants(work)[variant])
        return differences.logits(differences.torch_answer(model), images)

    engines, rows, files, parents, agreeing = [], [], [], {}, []
    present, absent = _present(flavours)
    refused: dict[str, str] = {}
    kernels: dict[str, dict[str, str]] = {}
    for number, runtime in enumerate(present):
        for variant in variants if runtime.ahead_of_time and runtime.runs_here else [last]:
            work.progress("build", number / len(present), f"{runtime.name}, {variant}")
            onnx_path = file_for(work, variant, runtime)
            expected = reference(variant, runtime.flavour) if runtime.runs_here else None
            try:
                built, row, layers = _built(work, workload, runtime, onnx_path, variant, expected, images)
            except HandoffError as error:
                refused[runtime.name] = left_out(work, runtime, error)
                break
            if built.path:
                files += [f"artifacts/{built.path.name}", f"artifacts/{built.path.name}.json"]
                parents |= dict.fromkeys(files[-2:], f"artifacts/{onnx_path.name}")
            if row:
                rows.append(row)
                if not row["passed"]:
                    refused[runtime.name] = _disagreement(work, runtime, row)
                elif variant == last:
                    agreeing.append(runtime.name)
            kernels[runtime.name] = {layer["name"]: layer["precision"] for layer in layers}
            engines.append(
                {
                    "runtime": runtime.name,
                    "variant": variant,
                    "file": built.path.name if built.path else onnx_path.name,
                    "ran": built.ran,
                    "text": built.text,
                    "layer_precisions": dict(Counter(layer["precision"] for layer in layers)),
                }
            )
    return {
        "engines": engines,
        "handoffs": rows,
        "files": files,
        "parents": parents,
        "agreeing": agreeing,
        "kernels": kernels,
        "refused": refused,
        "notes": absent + list(refused.values()),
    }


def _built(
    work: Run,
    workload: Workload,
    runtime: Runtime,
    onnx_path: Path,
    variant: str,
    expected: np.ndarray | None,
    images: Sequence[Tensor],
) -> tuple[Built, Facts | None, list[Facts]]:
    """What was built, its hand-off from the torch model's answers `expected` if it runs here, and its layers."""
    engine_path = work.artifacts / f"{onnx_path.stem}.{runtime.name}.engine"
    built = runtime.build(onnx_path, engine_path, spec_for(work, workload, min(work.request.batch_size, 8)))
    if expected is None:
        return built, None, built.passport.get("layers", [])
    return built, *_compare_running(work, runtime, built.path or onnx_path, variant, expected, images)


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


def left_out(work: Run, runtime: Runtime, error: HandoffError) -> str:
    """Ends the run when this runtime, or an engine for it, was asked for; otherwise a note for the report."""
    if work.request.runtime == runtime.name or (work.request.engine_targets and runtime.name == "tensorrt-rtx"):
        raise error
    return f"{runtime.name} was left out: {error}"


def spec_for(work: Run, workload: Workload, batch_size: int, precision: Precision = "fp32") -> BuildSpec:
    """How a runtime loads a file of this run for `batch_size` images a call."""
    return BuildSpec(
        workload.preprocessing.input_size,
        batch_size,
        max(batch_size, work.request.batch_size),
        work.request.threads,
        precision,
        hint=work.request.runtime_hint,
        targets=work.request.engine_targets,
    )


# ---- comparing ----------------------------------------------------------------------------------------------------


def _float_variants(work: Run) -> dict[str, str]:
    """Variant -> folder of its weights."""
    variants = {"baseline": "stages/baseline"}
    if work.request.prunes:
        variants["pruned"] = "artifacts"
    if work.request.half_precision:
        variants["half"] = "artifacts"
    return variants


def _compared_images(workload: Workload) -> list[Tensor]:
    """The first test images, in batches."""
    batches, count = [], 0
    for images, _ in ledger.test_batches(workload, 32):
        batches.append(images)
        count += len(images)
        if count >= _compared_count(workload):
            break
    return batches


def _compared_count(workload: Workload) -> int:
    """Fewer large images: the comparison must not take longer than what it checks."""
    return COMPARED_IMAGES if workload.preprocessing.input_size <= 96 else COMPARED_IMAGES // 4


def _quantized_logits(
    quantized: quantization.Quantized, flavour: quantization.Flavour, images: Sequence[Tensor]
) -> np.ndarray:
    """Answers of the torch model that a quantized file was made from, on the grid that the flavour holds."""
    return differences.logits(differences.torch_answer(quantization.fake_quantized(quantized, flavour)), images)


def _export_quantized(
    work: Run, workload: Workload, quantized: quantization.Quantized
) -> dict[quantization.Flavour, Path]:
    paths = {flavour: work.artifacts / f"quantized.{flavour}.onnx" for flavour in quantized.grids.flavours}
    with ExitStack() as stack:
        partials = {flavour: stack.enter_context(atomic(path)) for flavour, path in paths.items()}
        onnx_export.export_flavours(quantized, partials, input_size=workload.preprocessing.input_size)
    return paths


def _file_noise(
    quantized: quantization.Quantized, flavour: quantization.Flavour, path: Path, images: Sequence[Tensor]
) -> list[quantization.LayerSqnr]:
    """Where a quantized file leaves the model that it was made from, point by point."""
    nodes = {point: f"{point}.dequantize" for point in quantized.grids.activations}
    with recording(RUNTIMES["onnxruntime"], path, nodes, torch.get_num_threads()) as values:

        def record(batch: Tensor) -> dict[str, Tensor]:
            return {point: torch.from_numpy(value) for point, value in values(batch.numpy()).items()}

        return quantization.file_noise(quantized, flavour, record, ledger.traced(torch.cat(list(images))))


def _noisiest(noise: list[quantization.LayerSqnr]) -> str:
    worst = quantization.noisiest(noise)
    return f"They part at {worst.name}: given the same inputs, its output has {worst.sqnr_db:.1f} dB of SQNR."


def _compare_file(path: Path, workload: Workload, images: Sequence[Tensor]) -> np.ndarray:
    """Answers of an ONNX file through ONNX Runtime, which executes either flavour exactly."""
    spec = BuildSpec(workload.preprocessing.input_size, static=False, threads=torch.get_num_threads())
    try:
        with RUNTIMES["onnxruntime"].load(path, spec) as session:
            return differences.logits(session.run, images)
    except EngineError as error:
        short = error.advice == MORE_MEMORY
        advice = "End other programs on this machine and resume the run." if short else "Please report this model."
        raise HandoffError(
            f"{path.name} cannot be proved equal to the model that it was made from: {error.what} {advice}"
        ) from error


def _compare_running(
    work: Run, runtime: Runtime, path: Path, variant: str, expected: np.ndarray, images: Sequence[Tensor]
) -> tuple[Facts, list[Facts]]:
    if runtime.ahead_of_time and len(images[0]) > work.request.batch_size:  # the engine takes no larger batch
        images = [part for batch in images for part in batch.split(work.request.batch_size)]
    spec = BuildSpec(
        images[0].shape[-1],
        len(images[0]),
        work.request.batch_size,
        torch.get_num_threads(),
        hint=work.request.runtime_hint,
    )
    with runtime.load(path, spec) as session:
        got = differences.logits(partial(padded, session, len(images[0])), images)
        layers = [{"name": kernel.name, "precision": kernel.precision} for kernel in session.kernels()]
    _require_logits(runtime, path, expected, got)
    row = equality.judge(variant, f"{path.name} on {runtime.name}", expected, got)
    return row, layers


def _require_logits(runtime: Runtime, path: Path, expected: np.ndarray, got: np.ndarray) -> None:
    """Raises `EngineError` when the answers are not even numbers for the classes that the model has."""
    if got.shape == expected.shape and np.isfinite(got).all():
        return
    answers = "numbers that are not finite" if got.shape == expected.shape else f"{got.shape[1]} numbers"
    raise EngineError(
        runtime.name,
        f"{runtime.title} answers an image with {answers} from {path.name}, where the model has {expected.shape[1]} logits.",
    )


def _disagreement(work: Run, runtime: Runtime, row: Facts) -> str:
    """Ends the run when this runtime was asked for; otherwise says why `auto` does not take it."""
    text = (
        f"{runtime.name} answers differently from the model it was given: {100 * row['top1_agreement']:.1f} % equal "
        f"top-1 on {row['n_images']} images, where {row['tolerance']} is allowed.{equality.saturation()}"
    )
    if work.request.runtime == runtime.name:
        raise HandoffError(text)
    return text


# ---- what measuring needs as well --------------------------------------------------------------------------------------


def file_for(work: Run, variant: str, runtime: Runtime) -> Path:
    return work.artifacts / (f"quantized.{runtime.flavour}.onnx" if variant == "quantized" else f"{variant}.onnx")


def padded(session: Session, batch_size: int, images: np.ndarray) -> np.ndarray:
    """A static session takes full batches only; the last one is filled up and the surplus answers dropped."""
    missing = batch_size - len(images)
    if missing:
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
    return session.run(images)[: batch_size - missing]
