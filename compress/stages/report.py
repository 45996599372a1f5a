"""Stage 8: from the results of the stages to the report, the verdict and the papers that go with them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from compress import __version__, machine
from compress.files import write_text
from compress.report import (
    Data,
    Epoch,
    Layer,
    Measurement,
    MixedStep,
    Report,
    Stage,
    Variant,
    Verdict,
    card,
    forecast,
)
from compress.request.snippets import without_folders
from compress.runs import Run, StageResult
from compress.stages import ledger
from compress.stages.results import (
    BASELINE,
    Answers,
    BaselineResult,
    BuildResult,
    ExportResult,
    FinetuneResult,
    MeasureResult,
    PruneResult,
    QuantizeResult,
    ReportResult,
    Skipped,
    last_answers,
)
from compress.workload import Workload

FILES = ("report.json", "report.html", "README.md")


def report(
    run: Run,
    workload: Workload,
    dense: BaselineResult,
    pruned: PruneResult | Skipped,
    tuned: FinetuneResult,
    quantized: QuantizeResult | Skipped,
    exported: ExportResult,
    built: BuildResult,
    measured: MeasureResult,
) -> ReportResult:
    """report.json, report.html and the model card; all numbers of the latter two are read from the first."""
    made = _Results(dense, pruned, tuned, quantized, exported, built, measured).report(run, workload)
    for name, text in zip(FILES, (made.to_json(), card.html_report(made), card.model_card(made)), strict=True):
        write_text(run.folder / name, text)
    files = (*FILES, forecast.FILE) if made.forecast else FILES
    return ReportResult(files=files, parents=exported.parents | built.parents | dict.fromkeys(files, "the run"))


@dataclass(frozen=True)
class _Results:
    """What the stages found, and how the report tells it."""

    dense: BaselineResult
    pruned: PruneResult | Skipped
    tuned: FinetuneResult
    quantized: QuantizeResult | Skipped
    exported: ExportResult
    built: BuildResult
    measured: MeasureResult

    def report(self, run: Run, workload: Workload) -> Report:
        variants = self._variants()
        in_torch = [row for result in self._in_torch for row in _ledger(result)]
        hops = ledger.collect(run.folder, workload.task, in_torch, self.measured.ledger)
        reached = verdict(variants, self.measured.measurements, self.measured.runtime, workload.dataset.has_labels)
        return Report(
            espalier_version=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            request=without_folders(run.request.model_dump(mode="json")),
            checkpoint=workload.weights,
            architecture=workload.name,
            environment=machine.describe(run.request.threads),
            seed=run.request.seed,
            data=_data(workload),
            variants=variants,
            handoffs=tuple(handoff for result in self._by_stage.values() for handoff in result.handoffs),
            ledger=hops,
            loss=ledger.loss(hops, ledger.attribute_loss(self.pruned, self.quantized, self.exported)),
            cross_checks=ledger.cross_checks(run.folder, workload.task, self.measured.ledger),
            worth=self.measured.worth,
            mixed_precision=self._mixed_precision(),
            measurements=self.measured.measurements,
            engines=self.built.engines,
            stages=tuple(
                Stage(name=name, seconds=one.seconds, peak_rss_bytes=one.peak_rss_bytes, skipped=one.skipped)
                for name, one in self._by_stage.items()
            ),
            layers=self._layers(16 if run.request.half_precision else 32),
            curves=self._curves(),
            notes=self._notes(workload),
            verdict=reached,
            forecast=forecast.came_true(run.folder, reached, min(variants[-1].file_bytes.values())),
        )

    @property
    def _in_torch(self) -> tuple[BaselineResult | PruneResult | FinetuneResult | QuantizeResult | Skipped, ...]:
        return self.dense, self.pruned, self.tuned, self.quantized

    @property
    def _by_stage(self) -> dict[str, StageResult]:
        return {
            "baseline": self.dense,
            "prune": self.pruned,
            "finetune": self.tuned,
            "quantize": self.quantized,
            "export": self.exported,
            "build": self.built,
            "measure": self.measured,
        }

    def _variants(self) -> tuple[Variant, ...]:
        """Accuracy is that of the deployed file, through the runtime that the result is for where it ran, else torch's."""
        rows = []
        for variant in self.exported.variants:
            size = self.dense if variant.name == BASELINE else self.tuned
            scored = sorted(
                (m for m in self.measured.measurements if m.variant == variant.name and m.accuracy is not None),
                key=lambda m: m.runtime != self.measured.runtime,
            )
            in_torch = self._answers_of(variant.name, variant.precision)
            deployed = scored[0] if scored else None
            rows.append(
                Variant(
                    name=variant.name,
                    parent=variant.parent,
                    parameters=size.parameters,
                    macs=size.macs,
                    file_bytes=variant.files,
                    accuracy=deployed.accuracy if deployed else in_torch.accuracy,
                    accuracy_ci95=deployed.accuracy_ci95 if deployed else in_torch.accuracy_ci95,
                    accuracy_through=deployed.runtime if deployed else in_torch.through,
                    n_test=in_torch.n,
                )
            )
        return tuple(rows)

    def _answers_of(self, name: str, precision: str) -> Answers:
        if name == BASELINE:
            return last_answers(self.dense)
        return last_answers(*(self._in_torch if precision == "int8" else self._in_torch[:3]))

    def _layers(self, float_bits: int) -> tuple[Layer, ...]:
        pruned = self.pruned if isinstance(self.pruned, PruneResult) else PruneResult(ledger=())
        quantized = self.quantized if isinstance(self.quantized, QuantizeResult) else None
        after = {layer.name: layer for layer in self.tuned.layers}
        groups = {
            name: (f"group {number}", group.reason)
            for number, group in enumerate(pruned.groups, 1)
            for name in group.layers
        }
        reasons = {row.layer: row.reason for row in pruned.left_out}
        refits = {row.layer: row for row in pruned.refits}
        rows = []
        for layer in self.dense.layers:
            name = layer.name
            group, reason = groups.get(name, (None, reasons.get(name, "nothing was pruned")))
            refit = refits.get(name)
            rows.append(
                Layer(
                    name=name,
                    type=layer.type,
                    channels_before=layer.channels,
                    channels_after=after[name].channels,
                    macs_before=layer.macs,
                    macs_after=after[name].macs,
                    weight_bits=quantized.bits.get(name, float_bits) if quantized else float_bits,
                    sqnr_db=quantized.sqnr_db.get(name) if quantized else None,
                    output_sqnr_db=quantized.noise.layers.get(name) if quantized else None,
                    file_sqnr_db={
                        file: noise.layers[name] for file, noise in self.exported.noise.items() if name in noise.layers
                    },
                    group=group,
                    reason=reason,
                    pruned_error=refit.error_before if refit else None,
                    refitted_error=refit.error_after if refit else None,
                )
            )
        return tuple(rows)

    def _mixed_precision(self) -> tuple[MixedStep, ...]:
        if not isinstance(self.quantized, QuantizeResult) or self.quantized.mixed is None:
            return ()
        return tuple(
            MixedStep(widened=step.widened, accuracy=step.score, weight_bits=step.weight_bits)
            for step in self.quantized.mixed.steps
        )

    def _curves(self) -> tuple[Epoch, ...]:
        trained = {"finetune": self.tuned.curve}
        if isinstance(self.quantized, QuantizeResult):
            trained["quantize"] = self.quantized.curve
        return tuple(Epoch(stage=name, **row.model_dump()) for name, curve in trained.items() for row in curve)

    def _notes(self, workload: Workload) -> tuple[str, ...]:
        pruned = self.pruned if isinstance(self.pruned, PruneResult) else None
        quantized = self.quantized if isinstance(self.quantized, QuantizeResult) else None
        notes: list[str | None] = [pruned.shortfall if pruned else None, *workload.notes]
        notes += [f"Stage {name}: {result.skipped}." for name, result in self._by_stage.items() if result.skipped]
        notes += [pruned.note if pruned else None, quantized.note if quantized else None]
        notes += [self.tuned.memory_note, quantized.memory_note if quantized else None, _on_images(workload)]
        if quantized:
            notes += [None if quantized.label == "int8" else f"Quantized to {quantized.label}."]
            notes += [f"{row.layer} stays in floating point: {row.reason}." for row in quantized.left_float]
        return tuple(note for note in (*notes, *self.measured.notes) if note)


def _ledger(result: BaselineResult | PruneResult | FinetuneResult | QuantizeResult | Skipped) -> tuple[Answers, ...]:
    return () if isinstance(result, Skipped) else result.ledger


def _on_images(workload: Workload) -> str | None:
    """What the score means where there are no labels."""
    if not workload.dataset.has_images:
        return (
            "No images were given: nothing was trained, ranges come from synthetic images, and agreement with the original "
            "is on those."
        )
    if not workload.dataset.has_labels:
        return (
            "The images have no labels: the model was trained to answer like the original, and agreement with it stands for "
            "accuracy."
        )
    return None


def verdict(
    variants: tuple[Variant, ...], measurements: tuple[Measurement, ...], runtime: str | None, labelled: bool
) -> Verdict:
    """What was gained and lost, in one sentence; the gain is against the fastest real fp32 of the dense model.

    Args:
        runtime: the one that the result is for; None when it cannot run here.
        labelled: whether accuracy is against labels, or else agreement with the original.
    """
    dense, last = variants[0], variants[-1]
    dense_bytes, last_bytes = min(dense.file_bytes.values()), min(last.file_bytes.values())
    single = [m for m in measurements if m.batch_size == 1]
    reference = min((m for m in single if m.variant == dense.name and m.precision == "fp32"), key=lambda m: m.p50_ms)
    result = min(
        (m for m in single if m.variant == last.name and m.runtime == runtime), key=lambda m: m.p50_ms, default=None
    )
    speedup = reference.p50_ms / result.p50_ms if result else None
    parts = [f"{dense_bytes / last_bytes:.1f}x smaller ({dense_bytes / 1e6:.1f} to {last_bytes / 1e6:.1f} MB)"]
    if result and speedup:
        word = (
            f"{speedup:.1f}x faster"
            if speedup >= 1.05
            else "no faster"
            if speedup > 0.95
            else f"{1 / speedup:.1f}x SLOWER"
        )
        parts.append(
            f"{word} ({reference.p50_ms:.2f} to {result.p50_ms:.2f} ms per image, {result.runtime} {result.precision})"
        )
    drop = None
    if last.accuracy is not None and dense.accuracy is not None:
        drop = 100 * (dense.accuracy - last.accuracy)
        parts.append(_accuracy_text(dense, last, drop, labelled))
    text = f"{', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else parts[0] + "."
    if result is None:
        text += " The engine asked for was built, not run: there is no device for it here."
    return Verdict(
        text=text,
        runtime=runtime,
        speedup_vs_fastest_fp32=speedup,
        size_ratio=dense_bytes / last_bytes,
        accuracy_drop_points=drop,
    )


def _accuracy_text(dense: Variant, last: Variant, drop: float, labelled: bool) -> str:
    if not labelled:
        return f"{100 * (last.accuracy or 0):.1f} % of its answers agree with the original's on {last.n_test:,} images"
    change = (
        f"{drop:.1f} points of accuracy lost"
        if drop >= 0.05
        else f"{-drop:.1f} points of accuracy gained"
        if drop <= -0.05
        else "no accuracy lost"
    )
    before, after = 100 * (dense.accuracy or 0), 100 * (last.accuracy or 0)
    return f"{change} ({before:.1f} to {after:.1f} %, {last.n_test:,} test images)"


def _data(workload: Workload) -> Data:
    dataset, recipe = workload.dataset, workload.preprocessing
    return Data(
        source=dataset.source,
        kind=dataset.kind,
        n_train=len(dataset.train),
        n_test=len(dataset.test),
        class_names=workload.class_names,
        input_size=recipe.input_size,
        mean=recipe.mean,
        std=recipe.std,
        notes=dataset.notes,
    )
