"""The stages that leave torch: ONNX files, engines, and measurements through the runtimes that execute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import benchmark, evaluation, machine, onnx_export, quantization, stages
from compress.engines import RUNTIMES, BuildSpec, Precision, Runtime, Session
from compress.errors import HandoffError
from compress.files import atomic, write_text
from compress.runs import Run
from compress.sources import Source

Facts = dict[str, Any]

FLOAT_TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of the largest logit: torch and the runtimes add numbers in different orders."""
AGREEMENT, RMS = 0.98, 0.02
"""A quantized file passes with this share of equal top-1 answers, or when its logits are this near (root mean square), as a
share of the largest logit (a model with random weights has no clear top-1). The grids are the same; where an
activation lies on the border of two codes the order of float additions decides, and the codes after it follow."""
NO_FLAVOUR = (
    "it reads 8-bit integers whose zero is code 0, and the learnt offsets need others; take lsq, or lsq-plus with at most 7 "
    "activation bits."
)
QUANTIZED_RULE = f"{AGREEMENT:.0%} equal top-1, or logits within {RMS:.0%} (root mean square)"
COMPARED_IMAGES = 256
INFER_SCRIPT = Path(__file__).parent / "templates" / "infer.py"
PARENTS = {"baseline": "the request", "pruned": "baseline", "half": "pruned", "quantized": "pruned"}


def export(work: Run, source: Source) -> Facts:
    """ONNX files of the dense, the pruned and the quantized model, each compared with torch on the same images."""
    images = _compared_images(source)
    handoffs, variants = [], {}
    for number, (variant, folder) in enumerate(_float_variants(work).items()):
        work.progress("export", number / 4, f"{variant}.onnx")
        model = stages.load_model(work, source, folder)
        path = work.artifacts / f"{variant}.onnx"
        precision = "fp16" if variant == "half" else "fp32"
        with atomic(path) as partial_path:
            onnx_export.export(model, partial_path, input_size=source.preprocessing.input_size, precision=precision)
        expected = evaluation.logits(evaluation.torch_answer(model), images)
        handoffs.append(_float_handoff(variant, path, expected, _compare_file(path, source, images)))
        variants[variant] = [path.name]
    if work.request.quantizes:
        work.progress("export", 0.6, "quantized, both flavours")
        files = _export_quantized(work, source)
        for flavour, path in files.items():
            expected = _reference_logits(work, source, "quantized", images, flavour)
            handoffs.append(_quantized_handoff(path, expected, _compare_file(path, source, images)))
        variants["quantized"] = [path.name for path in files.values()]
    write_text(work.artifacts / "infer.py", INFER_SCRIPT.read_text(encoding="utf-8"))
    names = [f"artifacts/{name}" for files in variants.values() for name in files]
    return {
        "handoffs": handoffs,
        "variants": {
            variant: {name: (work.artifacts / name).stat().st_size for name in files}
            for variant, files in variants.items()
        },
        "parents": {f"artifacts/{name}": PARENTS[variant] for variant, files in variants.items() for name in files},
        "files": [*names, "artifacts/infer.py"],
    }


def build_engines(work: Run, source: Source) -> Facts:
    """An engine for every runtime that has its tools here, from the last variant; compared where it can run.

    Where engines run, the earlier variants get one too: a gain is measured against something.
    """
    variants = list(work.facts("export")["variants"])
    last = variants[-1]
    images = _compared_images(source)
    flavours = _flavours(work, source, last)
    reference = cache(partial(_reference_logits, work, source, images=images))
    engines, handoffs, files, parents, agreeing, notes = [], [], [], {}, [], []
    for number, runtime in enumerate(RUNTIMES.values()):
        if reason := runtime.missing():
            notes.append(f"{runtime.name} was left out: {reason}")
            continue
        if runtime.flavour not in flavours:
            notes.append(f"{runtime.name} was left out: {NO_FLAVOUR}")
            continue
        for variant in variants if runtime.ahead_of_time and runtime.runs_here else [last]:
            work.progress("build", number / len(RUNTIMES), f"{runtime.name}, {variant}")
            onnx_path = _file_for(work, variant, runtime)
            spec = _spec(work, source, min(work.request.batch_size, 8))
            try:
                built = runtime.build(onnx_path, work.artifacts / f"{onnx_path.stem}.{runtime.name}.engine", spec)
            except HandoffError as error:
                notes.append(_refused(work, runtime, error))
                break
            if built.path:
                files += [f"artifacts/{built.path.name}", f"artifacts/{built.path.name}.json"]
                parents |= dict.fromkeys(files[-2:], f"artifacts/{onnx_path.name}")
            layers = built.passport.get("layers", [])
            if runtime.runs_here:
                expected = reference(variant, flavour=runtime.flavour)
                row, layers = _compare_running(work, runtime, built.path or onnx_path, variant, expected, images)
                handoffs.append(row)
                if not row["passed"]:
                    notes.append(_disagreement(work, runtime, row))
                elif variant == last:
                    agreeing.append(runtime.name)
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
        "handoffs": handoffs,
        "files": files,
        "parents": parents,
        "agreeing": agreeing,
        "notes": notes,
    }


def _refused(work: Run, runtime: Runtime, error: HandoffError) -> str:
    """Ends the run when this runtime, or an engine for it, was asked for; otherwise a note."""
    if work.request.runtime == runtime.name or (work.request.engine_targets and runtime.name == "tensorrt-rtx"):
        raise error
    return f"{runtime.name} was left out: {error}"


def _spec(work: Run, source: Source, batch_size: int, precision: Precision = "fp32") -> BuildSpec:
    return BuildSpec(
        source.preprocessing.input_size,
        batch_size,
        max(batch_size, work.request.batch_size),
        work.request.threads,
        precision,
        hint=work.request.runtime_hint,
        targets=work.request.engine_targets,
    )


def measure(work: Run, source: Source) -> Facts:
    """Latency of every variant through every runtime that runs here, in turns; accuracy through the deployed files."""
    contenders = _contenders(work)
    rows: list[Facts] = []
    ledger: list[Facts] = []
    sizes = sorted({1, work.request.batch_size})
    for number, batch_size in enumerate(sizes):
        with ExitStack() as stack:
            sessions = [stack.enter_context(contender.load(work, source, batch_size)) for contender in contenders]
            images = _timing_images(source, batch_size)
            timings = benchmark.race(
                [partial(session.run, images) for session in sessions],
                progress=lambda done, n=number: work.progress(
                    "measure", (n + done) / len(sizes) * 0.8, "latency, in turns"
                ),
            )
            scores: list[Facts | None] = [None] * len(sessions)
            if batch_size == sizes[-1]:
                scores = [
                    _score(work, source, contender, session, batch_size)
                    for contender, session in zip(contenders, sessions, strict=True)
                ]
                ledger += [
                    score for contender, score in zip(contenders, scores, strict=True) if score and contender.is_last
                ]
            for contender, session, timing, score in zip(contenders, sessions, timings, scores, strict=True):
                rows.append(_measurement(work, source, contender, session, batch_size, timing, score))
    return {
        "measurements": rows,
        "ledger": ledger,
        "runtime": _chosen_runtime(work, rows),
        "notes": work.facts("build")["notes"],
    }


# ---- comparing ----------------------------------------------------------------------------------------------------


def _float_variants(work: Run) -> dict[str, str]:
    """Variant -> folder of its weights."""
    variants = {"baseline": "stages/baseline"}
    if work.request.prunes:
        variants["pruned"] = "artifacts"
    if work.request.half_precision:
        variants["half"] = "artifacts"
    return variants


def _compared_images(source: Source) -> list[Tensor]:
    """The first test images, in batches."""
    batches, count = [], 0
    for images, _ in stages.test_batches(source, 32):
        batches.append(images)
        count += len(images)
        if count >= _compared_count(source):
            break
    return batches


def _compared_count(source: Source) -> int:
    """Fewer large images: the comparison must not take longer than what it checks."""
    return COMPARED_IMAGES if source.preprocessing.input_size <= 96 else COMPARED_IMAGES // 4


def _reference_logits(
    work: Run, source: Source, variant: str, images: Sequence[Tensor], flavour: quantization.Flavour | None = None
) -> np.ndarray:
    """Answers of the torch model that a file was made from; a quantized one on the grid that the flavour holds."""
    if variant == "quantized":
        model = quantization.fake_quantized(stages.load_quantized(work, source), flavour)
    else:
        model = stages.load_model(work, source, _float_variants(work)[variant])
    return evaluation.logits(evaluation.torch_answer(model), images)


def _flavours(work: Run, source: Source, variant: str) -> tuple[quantization.Flavour, ...]:
    """Those that a variant has a file for."""
    quantized = variant == "quantized"
    return stages.load_quantized(work, source).ranges.flavours if quantized else quantization.FLAVOURS


def _export_quantized(work: Run, source: Source) -> dict[quantization.Flavour, Path]:
    quantized = stages.load_quantized(work, source)
    paths = {flavour: work.artifacts / f"quantized.{flavour}.onnx" for flavour in quantized.ranges.flavours}
    with ExitStack() as stack:
        partials = {flavour: stack.enter_context(atomic(path)) for flavour, path in paths.items()}
        onnx_export.export_flavours(quantized, partials, input_size=source.preprocessing.input_size)
    return paths


def _compare_file(path: Path, source: Source, images: Sequence[Tensor]) -> np.ndarray:
    """Answers of an ONNX file through ONNX Runtime, which executes either flavour exactly."""
    spec = BuildSpec(source.preprocessing.input_size, static=False, threads=torch.get_num_threads())
    with RUNTIMES["onnxruntime"].load(path, spec) as session:
        return evaluation.logits(session.run, images)


def _float_handoff(variant: str, path: Path, expected: np.ndarray, got: np.ndarray) -> Facts:
    tolerance = HALF_TOLERANCE if variant == "half" else FLOAT_TOLERANCE
    difference = evaluation.compare(expected, got)
    passed = difference.relative <= tolerance
    return _checked(
        stages.handoff(
            f"{variant}, torch", path.name, "logits", difference, f"{tolerance:g} of the largest logit", passed
        )
    )


def _quantized_handoff(path: Path, expected: np.ndarray, got: np.ndarray) -> Facts:
    return _checked(_judge_quantized("fake-quantized, torch", path.name, expected, got))


def _judge_quantized(source: str, target: str, expected: np.ndarray, got: np.ndarray) -> Facts:
    difference = evaluation.compare(expected, got)
    rms = float(np.sqrt(np.mean(np.square(expected - got))))
    passed = difference.top1_agreement >= AGREEMENT or rms <= RMS * difference.reference_scale
    return stages.handoff(source, target, "top-1 and logits", difference, QUANTIZED_RULE, passed)


def _checked(row: Facts) -> Facts:
    """Raises `HandoffError` with both numbers when the hand-off is out of tolerance."""
    if not row["passed"]:
        raise HandoffError(
            f"{row['source']} and {row['target']} answer differently: the logits differ by up to "
            f"{row['max_abs_diff']:.3g} of {row['reference_scale']:.3g} and {100 * row['top1_agreement']:.1f} % of "
            f"{row['n_images']} images get the same class, where {row['tolerance']} is allowed. "
            "The file is not handed on; please report this model."
        )
    return row


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
        got = evaluation.logits(partial(_padded, session, len(images[0])), images)
        layers = [{"precision": kernel.precision} for kernel in session.kernels()]
    if variant == "quantized":
        row = _judge_quantized("fake-quantized, torch", f"{path.name} on {runtime.name}", expected, got)
    else:
        difference = evaluation.compare(expected, got)
        tolerance = HALF_TOLERANCE if variant == "half" else FLOAT_TOLERANCE
        row = stages.handoff(
            f"{variant}, torch",
            f"{path.name} on {runtime.name}",
            "logits",
            difference,
            f"{tolerance:g} of the largest logit",
            difference.relative <= tolerance,
        )
    return row, layers


def _disagreement(work: Run, runtime: Runtime, row: Facts) -> str:
    """Ends the run when this runtime was asked for; otherwise says why `auto` does not take it."""
    saturates = (
        ""
        if machine.has_int8_dot_product()
        else (
            " This CPU has no int8 dot product, and sums of 8-bit products saturate in its kernels: choose onnxruntime, or "
            "--weight-bits 7, which cannot saturate."
        )
    )
    text = (
        f"{runtime.name} answers differently from the model it was given: {100 * row['top1_agreement']:.1f} % equal "
        f"top-1 on {row['n_images']} images, where {row['tolerance']} is allowed.{saturates}"
    )
    if work.request.runtime == runtime.name:
        raise HandoffError(text)
    return text


# ---- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contender:
    variant: str
    runtime: Runtime
    path: Path
    precision: Precision
    is_last: bool

    def load(self, work: Run, source: Source, batch_size: int) -> Session:
        return self.runtime.load(self.path, _spec(work, source, batch_size, self.precision))


def _contenders(work: Run) -> list[_Contender]:
    """Every variant through every runtime that runs here and took the last variant."""
    variants = list(work.facts("export")["variants"])
    built = {(row["runtime"], row["variant"]): row["file"] for row in work.facts("build")["engines"]}
    found = []
    for variant in variants:
        precision: Precision = {"quantized": "int8", "half": "fp16"}.get(variant, "fp32")
        for runtime in RUNTIMES.values():
            if runtime.runs_here and (runtime.name, variants[-1]) in built:
                file = built[runtime.name, variant] if runtime.ahead_of_time else _file_for(work, variant, runtime)
                found.append(_Contender(variant, runtime, work.artifacts / file, precision, variant == variants[-1]))
    return found


def _file_for(work: Run, variant: str, runtime: Runtime) -> Path:
    return work.artifacts / (f"quantized.{runtime.flavour}.onnx" if variant == "quantized" else f"{variant}.onnx")


def _timing_images(source: Source, batch_size: int) -> np.ndarray:
    images = torch.cat([images for images, _ in stages.test_batches(source, 32)][: batch_size // 32 + 1])
    return images[torch.arange(batch_size) % len(images)].numpy()


def _padded(session: Session, batch_size: int, images: np.ndarray) -> np.ndarray:
    """A static session takes full batches only; the last one is filled up and the surplus answers dropped."""
    missing = batch_size - len(images)
    if missing:
        images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
    return session.run(images)[: batch_size - missing]


def _score(work: Run, source: Source, contender: _Contender, session: Session, batch_size: int) -> Facts | None:
    """Accuracy through the deployed file; the float variants through ONNX Runtime only, which answers as torch does."""
    if not contender.is_last and contender.runtime.name != "onnxruntime":
        return None
    return stages.ledger_hop(
        work, source, contender.variant, contender.runtime.name, partial(_padded, session, batch_size), batch_size
    )


def _measurement(
    work: Run,
    source: Source,
    contender: _Contender,
    session: Session,
    batch_size: int,
    timing: benchmark.Timing,
    score: Facts | None,
) -> Facts:
    kernels = session.kernels()
    return {
        "variant": contender.variant,
        "runtime": contender.runtime.name,
        "file": contender.path.name,
        "precision_requested": contender.precision,
        "precision": session.precision,
        "integer_layers": sum(kernel.precision == "int8" for kernel in kernels),
        "candidate_layers": len(kernels),
        "batch_size": batch_size,
        "threads": work.request.threads,
        "input_size": source.preprocessing.input_size,
        "samples_ms": [round(sample, 5) for sample in timing.samples_ms],
        "p50_ms": timing.p50_ms,
        "p90_ms": timing.p90_ms,
        "p99_ms": timing.p99_ms,
        "throughput_per_s": 1000 * batch_size / timing.p50_ms,
        "noisy": timing.noisy,
        "accuracy": score and score["accuracy"],
        "accuracy_ci95": score and score["accuracy_ci95"],
        "notes": list(session.notes),
    }


def _chosen_runtime(work: Run, rows: list[Facts]) -> str | None:
    """What was asked for, where it runs here; with `auto` the fastest of those that answer like the model."""
    asked, agreeing = work.request.runtime, work.facts("build")["agreeing"]
    if asked != "auto":
        return asked if asked in agreeing else None
    last = list(work.facts("export")["variants"])[-1]
    usable = [row for row in rows if row["variant"] == last and row["batch_size"] == 1 and row["runtime"] in agreeing]
    return min(usable, key=lambda row: row["p50_ms"])["runtime"] if usable else None
