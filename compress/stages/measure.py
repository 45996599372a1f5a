"""Stage 7: latency of every variant through every runtime, in turns, and the answers of the files that are deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from compress import quantization
from compress.engines import RUNTIMES, BuildSpec, Precision, Runtime, Session, benchmark, int8_verdict
from compress.errors import EngineError, HandoffError
from compress.report import Measurement, Worth
from compress.request import Request
from compress.runs import Run
from compress.stages import ledger, steps
from compress.stages.build import left_out
from compress.stages.results import (
    Answers,
    BuildResult,
    ExportResult,
    MeasureResult,
    QuantizeResult,
    Skipped,
    Variant,
)
from compress.stages.workspace import padded
from compress.workload import Workload

FEWEST_ANSWERS, ANSWERED_PIXELS = 256, 2000 * 96 * 96
"""How many test images a file answers that is not deployed on ONNX Runtime: 2,000 at 96 x 96 and 367 at 224 x 224."""


def measure(
    run: Run, workload: Workload, quantized: QuantizeResult | Skipped, exported: ExportResult, built: BuildResult
) -> MeasureResult:
    """
    When a runtime fails, at another batch size than it was built for perhaps, everything is measured again without it, so
    that the contenders of all races are the same.

    Raises:
        EngineError: of the runtime that was asked for, or of the last one here.
    """
    notes: dict[str, str] = {}
    while True:
        meter = _Meter(run, workload, quantized, exported, built, without=notes)
        try:
            return meter.measured().model_copy(update={"notes": (*built.notes, *notes.values())})
        except EngineError as error:
            if error.runtime in notes:  # it is not used any more, so this would be for ever
                raise
            notes[error.runtime] = left_out(run.request, RUNTIMES[error.runtime], error)
            if not runtimes_that_run(exported, built, without=notes):
                raise


@dataclass(frozen=True)
class _Contender:
    """A variant through a runtime."""

    variant: Variant
    runtime: Runtime
    onnx: Path
    """The file that the runtime loads, or that its engine was built from."""
    path: Path
    precision: Precision
    is_deployed: bool


class _Meter:
    """One attempt at all races."""

    def __init__(
        self,
        run: Run,
        workload: Workload,
        quantized: QuantizeResult | Skipped,
        exported: ExportResult,
        built: BuildResult,
        without: Collection[str],
    ) -> None:
        self._run, self._request, self._workload = run, run.request, workload
        self._quantized, self._exported, self._built, self._without = quantized, exported, built, without

    def measured(self) -> MeasureResult:
        rows: list[Measurement] = []
        answers = list(self._answers_beside_the_races()) if "onnxruntime" not in self._without else []
        worth: tuple[Worth, ...] = ()
        sizes = sorted({1, self._request.batch_size})
        for number, batch_size in enumerate(sizes):
            with ExitStack() as stack:
                running = self._loaded(batch_size, stack)
                timings = self._race(running, batch_size, number / len(sizes), 0.8 / len(sizes))
                if batch_size == 1 and isinstance(self._quantized, QuantizeResult):
                    worth = tuple(self._worth(running, timings, self._quantized))
                for (contender, session), timing in zip(running, timings, strict=True):
                    scored = self._answers(contender, session, batch_size) if batch_size == sizes[-1] else None
                    answers += [scored] if scored and contender.is_deployed else []
                    rows.append(self._measurement(contender, session, batch_size, timing, scored))
        runtime = chosen_runtime(self._request, self._exported, self._built, rows)
        return MeasureResult(measurements=tuple(rows), ledger=tuple(answers), worth=worth, runtime=runtime)

    # ---- the races ----

    def _race(
        self, running: Sequence[tuple[_Contender, Session]], batch_size: int, before: float, share: float
    ) -> list[benchmark.Timing]:
        images = _timing_images(self._workload, batch_size)
        return benchmark.race(
            [session.timed(images) for _, session in running],
            progress=lambda done: self._run.progress("measure", before * 0.8 + done * share, "latency, in turns"),
        )

    def _loaded(self, batch_size: int, stack: ExitStack) -> list[tuple[_Contender, Session]]:
        """Each contender with its session; one in 16-bit floats only where the runtime really computes in them."""
        running = []
        for contender in self._contenders():
            spec = steps.build_spec(self._request, self._workload, batch_size, contender.precision)
            session = stack.enter_context(contender.runtime.load(contender.path, spec))
            exported_so = contender.variant.precision == "fp16"
            if exported_so or contender.precision in ("fp32", "int8", session.precision):
                running.append((contender, session))
        return running

    def _contenders(self) -> list[_Contender]:
        """Every variant through every runtime that runs here."""
        built = {(row.runtime, row.variant): row.file for row in self._built.engines}
        runtimes = runtimes_that_run(self._exported, self._built, without=self._without)
        deployed = self._exported.deployed
        contenders = []
        for variant in self._exported.variants:
            for runtime in runtimes:
                path = self._file(variant, runtime)
                engine = built.get((runtime.name, variant.name)) if runtime.ahead_of_time else None
                loads = self._run.artifacts / engine if engine else path
                contenders.append(_Contender(variant, runtime, path, loads, variant.precision, variant == deployed))
        if deployed.precision == "int8":  # what int8 has to beat: the same structure in 16-bit floats
            structure = self._exported.variant(deployed.parent)
            for runtime in runtimes:
                if half := runtime.half_precision:
                    path = self._file(structure, runtime)
                    contenders.append(_Contender(structure, runtime, path, path, half, is_deployed=False))
        return contenders

    def _file(self, variant: Variant, runtime: Runtime) -> Path:
        return self._run.artifacts / variant.file_for(runtime.flavour)

    def _measurement(
        self,
        contender: _Contender,
        session: Session,
        batch_size: int,
        timing: benchmark.Timing,
        scored: Answers | None,
    ) -> Measurement:
        kernels = session.kernels()
        return Measurement(
            variant=contender.variant.name,
            runtime=contender.runtime.name,
            file=contender.path.name,
            precision_requested=contender.precision,
            precision=session.precision,
            integer_layers=sum(kernel.precision == "int8" for kernel in kernels),
            candidate_layers=len(kernels),
            batch_size=batch_size,
            threads=self._request.threads,
            input_size=self._workload.preprocessing.input_size,
            samples_ms=tuple(round(sample, 5) for sample in timing.samples_ms),
            p50_ms=timing.p50_ms,
            p90_ms=timing.p90_ms,
            p99_ms=timing.p99_ms,
            throughput_per_s=1000 * batch_size / timing.p50_ms,
            noisy=timing.noisy,
            accuracy=scored.accuracy if scored else None,
            accuracy_ci95=scored.accuracy_ci95 if scored else None,
            notes=tuple(session.notes),
        )

    # ---- answers of the files ----

    def _answers_beside_the_races(self) -> Sequence[Answers]:
        """Of quantized files that ONNX Runtime executes but is not raced with, so that each engine has its file before it.

        Their flavour is slow there: of large images fewer than all are answered.
        """
        deployed, exact = self._exported.deployed, RUNTIMES["onnxruntime"]
        if deployed.precision != "int8":
            return []
        size, answers = self._workload.preprocessing.input_size, []
        raced = deployed.file_for(exact.flavour)
        for name in deployed.files:
            if name == raced:
                continue
            self._run.progress("measure", 0.0, f"{name} through {exact.title}")
            spec = BuildSpec.any_batch(size, self._request.threads)
            limit = max(FEWEST_ANSWERS, ANSWERED_PIXELS // size**2)
            with exact.load(self._run.artifacts / name, spec) as session:
                answers.append(
                    ledger.answers(self._run, self._workload, name, exact.name, session.run, limit=limit)
                )
        return answers

    def _answers(self, contender: _Contender, session: Session, batch_size: int) -> Answers | None:
        """Of the deployed file; of the float variants through ONNX Runtime only, which answers as torch does."""
        if not contender.is_deployed and contender.runtime.name != "onnxruntime":
            return None
        answer = partial(padded, session, batch_size)
        name, through = contender.onnx.name, contender.runtime.name
        return ledger.answers(self._run, self._workload, name, through, answer, batch_size)

    # ---- is int8 worth it ----

    def _worth(
        self,
        running: Sequence[tuple[_Contender, Session]],
        timings: Sequence[benchmark.Timing],
        quantized: QuantizeResult,
    ) -> list[Worth]:
        """For each runtime: int8 against the floats of the same structure, one image at a time."""
        medians = {
            (contender.runtime.name, contender.variant.name, contender.precision): timing.p50_ms
            for (contender, _), timing in zip(running, timings, strict=True)
        }
        structure = self._exported.variant(self._exported.deployed.parent).name
        rows = []
        for contender, session in running:
            if contender.precision != "int8":
                continue
            name = contender.runtime.name
            half = [(p, medians[name, structure, p]) for p in ("bf16", "fp16") if (name, structure, p) in medians]
            comparison = int8_verdict.LatencyComparison(
                runtime=name,
                variant=structure,
                fp32_ms=medians[name, structure, "fp32"],
                int8_ms=medians[name, contender.variant.name, "int8"],
                half=half[0] if half else None,
                kernels=session.kernels(),
                conversions=session.conversions,
                agrees=name in self._built.agreeing,
            )
            excluded = int8_verdict.to_exclude(comparison, quantized.sqnr_db)
            spec = steps.build_spec(self._request, self._workload, 1, "int8")
            changed = race_without(excluded, contender, session, spec) if excluded else None
            rows.append(int8_verdict.judge(comparison, excluded, comparison.int8_ms * changed if changed else None))
        return rows


def race_without(layers: Collection[str], contender: _Contender, session: Session, spec: BuildSpec) -> float | None:
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


def runtimes_that_run(exported: ExportResult, built: BuildResult, without: Collection[str]) -> list[Runtime]:
    """Those that run here and took the deployed variant, but for those of the names `without`."""
    took = {row.runtime for row in built.engines if row.variant == exported.deployed.name}
    return [one for name, one in RUNTIMES.items() if name in took and name not in without and one.runs_here]


def chosen_runtime(
    request: Request, exported: ExportResult, built: BuildResult, rows: Sequence[Measurement]
) -> str | None:
    """What was asked for, where it runs here; with `auto` the fastest of those that answer like the model."""
    if request.runtime != "auto":
        return request.runtime if request.runtime in built.agreeing else None
    name = exported.deployed.name
    usable = [row for row in rows if row.variant == name and row.batch_size == 1 and row.runtime in built.agreeing]
    return min(usable, key=lambda row: row.p50_ms).runtime if usable else None


def _tried(runtime: Runtime, path: Path, spec: BuildSpec) -> Session:
    """A crash on this file costs none of the sessions that are raced."""
    engine = runtime.build(path, path.with_suffix(".engine"), spec).path if runtime.ahead_of_time else None
    return runtime.load(engine or path, spec, trial=True)


def _timing_images(workload: Workload, batch_size: int) -> np.ndarray:
    """float32 [batch_size, 3, H, W], normalised: the first test images, again from the start where there are fewer."""
    batches = islice(ledger.test_batches(workload, 32), batch_size // 32 + 1)
    images = torch.cat([images for images, _ in batches])
    return images[torch.arange(batch_size) % len(images)].numpy()
