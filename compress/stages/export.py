"""Stage 5: ONNX files of every variant, each compared with the torch model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress import equality, onnx_export, quantization
from compress.engines import RUNTIMES, BuildSpec
from compress.engines.processes.remote import recording
from compress.equality.outputs import of_batches
from compress.errors import MORE_MEMORY, EngineError, HandoffError
from compress.files import PACKAGE, atomic, write_text
from compress.report import Handoff
from compress.runs import Run
from compress.stages import ledger
from compress.stages.results import (
    BASELINE,
    Answers,
    BaselineResult,
    ExportResult,
    FinetuneResult,
    Noise,
    PruneResult,
    QuantizeResult,
    Skipped,
    Variant,
    last_answers,
    variants_of,
)
from compress.stages.workspace import (
    Reference,
    compared_images,
    folder_of,
    load_model,
    load_quantized,
    prove_rebuilt,
    references,
)
from compress.workload import Workload

INFER_SCRIPT = PACKAGE / "report" / "templates" / "infer.py"
INFER = "artifacts/infer.py"


def export(
    run: Run,
    workload: Workload,
    dense: BaselineResult,
    pruned: PruneResult | Skipped,
    tuned: FinetuneResult,
    quantized: QuantizeResult | Skipped,
    *,
    dry: bool = False,
) -> ExportResult:
    """
    Args:
        dry: leave out the dense file where there is a pruned one, which is the same code, and the noise of files that pass.

    Raises:
        HandoffError: a model cannot be exported, or a file answers differently from it.
    """
    variants = variants_of(run.request)
    if dry and sum(variant.precision != "int8" for variant in variants) > 1:
        variants = tuple(variant for variant in variants if variant.name != BASELINE)
    exporter = _Exporter(run, workload, compared_images(workload))
    exported: list[Variant] = []
    for number, variant in enumerate(variants):
        run.progress("export", number / len(variants), f"{variant.name}.onnx")
        if isinstance(quantized, QuantizeResult) and variant.precision == "int8":
            exported.append(exporter.integer(variant, quantized, dry))
        else:  # a quantized model was looked at when it was quantized
            before = last_answers(dense, pruned, tuned) if isinstance(quantized, Skipped) else None
            exported.append(exporter.float(variant, None if variant.name == BASELINE else before))
    write_text(run.folder / INFER, INFER_SCRIPT.read_text(encoding="utf-8"))
    parents = {f"artifacts/{file}": variant.parent or "the request" for variant in exported for file in variant.files}
    return ExportResult(
        variants=tuple(exported),
        noise=exporter.noise,
        parents=parents,
        handoffs=tuple(exporter.handoffs),
        files=(*parents, INFER),
    )


class _Exporter:
    """Writes the files of one variant after the other, with the hand-offs that prove them."""

    def __init__(self, run: Run, workload: Workload, images: Sequence[Tensor]) -> None:
        self._run, self._workload, self._images = run, workload, images
        self.handoffs: list[Handoff] = []
        self.noise: dict[str, Noise] = {}

    def float(self, variant: Variant, before: Answers | None) -> Variant:
        """
        Args:
            before: what the model answered when it was saved, where nothing has compared it since.
        """
        model = load_model(self._run, self._workload, folder_of(variant))
        if before:
            self.handoffs.append(prove_rebuilt(self._run, self._workload, before, model))
        path = self._path(variant.file_for(""))
        with atomic(path) as partial:
            proof = onnx_export.export(
                model,
                partial,
                input_size=self._workload.preprocessing.input_size,
                precision="fp16" if variant.precision == "fp16" else "fp32",
                images=self._images[0],
            )
        names = f"{variant.name}, torch", f"{variant.name}, BatchNorm folded"
        if proof:
            self.handoffs.append(proof.model_copy(update={"source": names[0], "target": names[1]}))
        expected = references(self._run, self._workload, None, self._images)(variant, "onnxruntime")
        handoff = equality.judge(
            names[0], path.name, expected, self._outputs(path), variant.precision, self._workload.task
        )
        self.handoffs.append(equality.checked(handoff))
        return variant.model_copy(update={"files": {path.name: path.stat().st_size}})

    def integer(self, variant: Variant, result: QuantizeResult, dry: bool) -> Variant:
        """One file for each Q/DQ convention that the quantized model can be written in."""
        quantized = load_quantized(self._run, self._workload)
        rebuilt = quantization.fake_quantized(quantized)
        self.handoffs.append(prove_rebuilt(self._run, self._workload, result.ledger[-1], rebuilt, quantized=True))
        paths = {flavour: self._path(variant.file_for(flavour)) for flavour in quantized.grids.flavours}
        with ExitStack() as stack:
            partials = {flavour: stack.enter_context(atomic(path)) for flavour, path in paths.items()}
            onnx_export.export_flavours(quantized, partials, input_size=self._workload.preprocessing.input_size)
        reference = references(self._run, self._workload, quantized, self._images)
        for flavour, path in paths.items():
            self._prove_integer(variant, quantized, flavour, path, reference, dry)
        return variant.model_copy(update={"files": {path.name: path.stat().st_size for path in paths.values()}})

    def _prove_integer(
        self,
        variant: Variant,
        quantized: quantization.Quantized,
        flavour: quantization.Flavour,
        path: Path,
        reference: Reference,
        dry: bool,
    ) -> None:
        expected, got = reference(variant, flavour), self._outputs(path)
        handoff = equality.judge("fake-quantized, torch", path.name, expected, got, "int8", self._workload.task)
        if dry and handoff.passed:
            return
        rows = _file_noise(quantized, flavour, path, self._images)
        worst = quantization.noisiest(rows)
        where = f"They part at {worst.name}: given the same inputs, its output has {worst.sqnr_db:.1f} dB of SQNR."
        self.handoffs.append(equality.checked(handoff, where))
        self.noise[path.name] = ledger.noise(rows)

    def _path(self, file: str) -> Path:
        return self._run.artifacts / file

    def _outputs(self, path: Path) -> np.ndarray:
        """Of an ONNX file through ONNX Runtime, which executes either flavour exactly."""
        size = self._workload.preprocessing.input_size
        spec = BuildSpec.any_batch(size, torch.get_num_threads())
        try:
            with RUNTIMES["onnxruntime"].load(path, spec) as session:
                return of_batches(session.run, self._images)
        except EngineError as error:
            short = error.advice == MORE_MEMORY
            advice = "End other programs on this machine and resume the run." if short else "Please report this model."
            raise HandoffError(
                f"{path.name} cannot be proved equal to the model that it was made from: {error.what} {advice}"
            ) from error


def _file_noise(
    quantized: quantization.Quantized, flavour: quantization.Flavour, path: Path, images: Sequence[Tensor]
) -> list[quantization.LayerSqnr]:
    """Where a quantized file leaves the model that it was made from, point by point."""
    nodes = {point: f"{point}.dequantize" for point in quantized.grids.activations}
    with recording(RUNTIMES["onnxruntime"], path, nodes, torch.get_num_threads()) as values:

        def record(batch: Tensor) -> dict[str, Tensor]:
            return {point: torch.from_numpy(value) for point, value in values(batch.numpy()).items()}

        return quantization.file_noise(quantized, flavour, record, ledger.traced(torch.cat(list(images))))
