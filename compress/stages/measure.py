"""The stage that measures: latency of every variant through every runtime, and answers of the files that are deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import quantization
from compress.engines import RUNTIMES, BuildSpec, Precision, Runtime, Session, benchmark
from compress.errors import EngineError, HandoffError
from compress.runs import Run
from compress.stages import ledger, verdict
from compress.stages.deployment import file_for, left_out, padded, spec_for
from compress.workload import Workload

Facts = dict[str, Any]

FEWEST_ANSWERS, ANSWERED_PIXELS = 256, 2000 * 96 * 96
"""How many test images a file answers that is not deployed on ONNX Runtime: 2,000 at 96 x 96 and 367 at 224 x 224."""


def measure(work: Run, workload: Workload) -> Facts:
    """Latency of every variant through every runtime that runs here, in turns; accuracy through the deployed files.

    When a runtime fails, at another batch size than it was built for perhaps, everything is measured again without it, so
    that the contenders of all races are the same.

    Raises:
        EngineError: of the runtime that was asked for, or of the last one here.
    """
    notes: dict[str, str] = {}
    while True:
        try:
            facts = _measured(work, workload, without=notes)
            return facts | {"notes": [*work.facts("build")["notes"], *notes.values()]}
        except EngineError as error:
            if error.runtime in notes:  # it is not used any more, so this would be for ever
                raise
            notes[error.runtime] = left_out(work, RUNTIMES[error.runtime], error)
            if not _runtimes(work, without=notes):
                raise


def _measured(work: Run, workload: Workload, without: Collection[str]) -> Facts:
    rows: list[Facts] = []
    hops = _file_hops(work, workload) if "onnxruntime" not in without else []
    verdicts: list[Facts] = []
    sizes = sorted({1, work.request.batch_size})
    for number, batch_size in enumerate(sizes):
        with ExitStack() as stack:
            running = _loaded(work, workload, batch_size, stack, without)
            images = _timing_images(workload, batch_size)
            timings = benchmark.race(
                [session.timed(images) for _, session in running],
                progress=lambda done, n=number: work.progress(
                    "measure", (n + done) / len(sizes) * 0.8, "latency, in turns"
                ),
            )
            if batch_size == 1:
                verdicts = _worth(work, workload, running, timings)
            for (contender, session), timing in zip(running, timings, strict=True):
                score = _score(work, workload, contender, session, batch_size) if batch_size == sizes[-1] else None
                hops += [score] if score and contender.is_last else []
                rows.append(_measurement(work, workload, contender, session, batch_size, timing, score))
    return {
        "measurements": rows,
        "ledger": hops,
        "worth": verdicts,
        "runtime": _chosen_runtime(work, rows),
    }


@dataclass(frozen=True)
class _Contender:
    variant: str
    runtime: Runtime
    onnx: Path
    """The file that the runtime loads, or that its engine was built from."""
    path: Path
    precision: Precision
    is_last: bool

    def load(self, work: Run, workload: Workload, batch_size: int) -> Session:
        return self.runtime.load(self.path, spec_for(work, workload, batch_size, self.precision))


def _runtimes(work: Run, without: Collection[str]) -> list[Runtime]:
    """Those that run here and took the last variant, but for those of the names `without`."""
    last = list(work.facts("export")["variants"])[-1]
    built = {row["runtime"] for row in work.facts("build")["engines"] if row["variant"] == last}
    names = [name for name in RUNTIMES if name in built and name not in without]
    return [RUNTIMES[name] for name in names if RUNTIMES[name].runs_here]


def _contenders(work: Run, without: Collection[str]) -> list[_Contender]:
    """Every variant through every runtime of `_runtimes`."""
    variants = list(work.facts("export")["variants"])
    built = {(row["runtime"], row["variant"]): row["file"] for row in work.facts("build")["engines"]}
    here = _runtimes(work, without)
    found = []
    for variant in variants:
        precision: Precision = {"quantized": "int8", "half": "fp16"}.get(variant, "fp32")
        for runtime in here:
            path = file_for(work, variant, runtime)
            loads = work.artifacts / built[runtime.name, variant] if runtime.ahead_of_time else path
            found.append(_Contender(variant, runtime, path, loads, precision, variant == variants[-1]))
    if work.request.quantizes:  # what int8 has to beat: the same structure in 16-bit floats
        for runtime in here:
            if half := runtime.half_precision:
                path = file_for(work, variants[-2], runtime)
                found.append(_Contender(variants[-2], runtime, path, path, half, is_last=False))
    return found


def _loaded(
    work: Run, workload: Workload, batch_size: int, stack: ExitStack, without: Collection[str]
) -> list[tuple[_Contender, Session]]:
    """Each contender with its session; one in 16-bit floats only where the runtime really computes in them."""
    found = []
    for contender in _contenders(work, without):
        session = stack.enter_context(contender.load(work, workload, batch_size))
        if contender.variant == "half" or contender.precision in ("fp32", "int8", session.precision):
            found.append((contender, session))
    return found


def _timing_images(workload: Workload, batch_size: int) -> np.ndarray:
    batches = islice(ledger.test_batches(workload, 32), batch_size // 32 + 1)
    images = torch.cat([images for images, _ in batches])
    return images[torch.arange(batch_size) % len(images)].numpy()


# ---- answers of the files -----------------------------------------------------------------------------------------


def _file_hops(work: Run, workload: Workload) -> list[Facts]:
    """Quantized files that ONNX Runtime executes but is not raced with, so that each engine has its file before it.

    Their flavour is slow there: of large images fewer than all are answered.
    """
    if not work.request.quantizes:
        return []
    size, hops = workload.preprocessing.input_size, []
    exact = RUNTIMES["onnxruntime"]
    raced = file_for(work, "quantized", exact).name
    for name in work.facts("export")["variants"]["quantized"]:
        if name == raced:
            continue
        work.progress("measure", 0.0, f"{name} through {exact.title}")
        spec = BuildSpec(size, static=False, threads=work.request.threads)
        with exact.load(work.artifacts / name, spec) as session:
            limit = max(FEWEST_ANSWERS, ANSWERED_PIXELS // size**2)
            hops.append(ledger.hop(work, workload, name, exact.name, session.run, limit=limit))
    return hops


def _score(work: Run, workload: Workload, contender: _Contender, session: Session, batch_size: int) -> Facts | None:
    """Accuracy through the deployed file; the float variants through ONNX Runtime only, which answers as torch does."""
    if not contender.is_last and contender.runtime.name != "onnxruntime":
        return None
    answer = partial(padded, session, batch_size)
    return ledger.hop(work, workload, contender.onnx.name, contender.runtime.name, answer, batch_size)


# ---- facts --------------------------------------------------------------------------------------------------------


def _worth(
    work: Run, workload: Workload, running: Sequence[tuple[_Contender, Session]], timings: Sequence[benchmark.Timing]
) -> list[Facts]:
    """For each runtime: int8 against the floats of the same structure, one image at a time."""
    if not work.request.quantizes:
        return []
    medians = {
        (contender.runtime.name, contender.variant, contender.precision): timing.p50_ms
        for (contender, _), timing in zip(running, timings, strict=True)
    }
    structure = list(work.facts("export")["variants"])[-2]
    layers, agreeing = work.facts("quantize")["sqnr_db"], work.facts("build")["agreeing"]
    found = []
    for contender, session in running:
        if contender.precision != "int8":
            continue
        name = contender.runtime.name
        half = [(p, medians[name, structure, p]) for p in ("bf16", "fp16") if (name, structure, p) in medians]
        raced = verdict.Raced(
            runtime=name,
            variant=structure,
            fp32_ms=medians[name, structure, "fp32"],
            int8_ms=medians[name, contender.variant, "int8"],
            half=half[0] if half else None,
            kernels=session.kernels(),
            conversions=session.conversions,
            agrees=name in agreeing,
        )
        excluded = verdict.to_exclude(raced, layers)
        changed = _race_without(excluded, contender, session, spec_for(work, workload, 1, "int8")) if excluded else None
        found.append(verdict.judge(raced, excluded, changed and raced.int8_ms * changed))
    return found


def _race_without(layers: Collection[str], contender: _Contender, session: Session, spec: BuildSpec) -> float | None:
    """Time of the int8 file with `layers` in floating point over that of the file as it is, in turns.

    None where the runtime refuses such a file.
    """
    images = np.zeros((spec.batch_size, 3, spec.input_size, spec.input_size), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / contender.onnx.name
        quantization.exclude_layers(contender.onnx, layers, contender.runtime.flavour, path)
        try:
            with _tried(contender.runtime, path, spec) as changed:
                before, after = benchmark.race([session.timed(images), changed.timed(images)])
        except HandoffError:
            return None
    return after.p50_ms / before.p50_ms


def _tried(runtime: Runtime, path: Path, spec: BuildSpec) -> Session:
    """A crash on this file costs none of the sessions that are raced."""
    engine = runtime.build(path, path.with_suffix(".engine"), spec).path if runtime.ahead_of_time else None
    return runtime.load(engine or path, spec, trial=True)


def _measurement(
    work: Run,
    workload: Workload,
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
        "input_size": workload.preprocessing.input_size,
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
