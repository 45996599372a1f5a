"""What each stage of a run hands on: frozen, typed, and JSON in the stage's record.

    baseline -> BaselineResult    the model as it came
    prune    -> PruneResult       the shrunk model, equal to the masked one
    finetune -> FinetuneResult    the float model that is deployed; `compress.load` rebuilds it
    quantize -> QuantizeResult    trained weights and their grids
    export   -> ExportResult      ONNX files, one or two for each `Variant`
    build    -> BuildResult       engines, and which runtimes answer like the model
    measure  -> MeasureResult     latencies, and answers of the files that are deployed
    report   -> ReportResult      report.json, report.html, README.md

`prune` and `quantize` may be `Skipped`. Models are handed on as folders of the run: see `load_model`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator

from compress.equality import Precision
from compress.report import Engine, Measurement, Worth
from compress.request import Request
from compress.runs import Skipped, StageResult
from compress.stages.gate import BaselineCheck

__all__ = ["Skipped", "StageResult"]

BASELINE, PRUNED, HALF, QUANTIZED = "baseline", "pruned", "half", "quantized"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Variant(_Row):
    """A form of the model that is exported: what it was made from, the precision of its files, and these."""

    name: str
    parent: str | None
    """The variant that it was made from; None for the model as it came."""
    precision: Precision
    files: dict[str, int] = {}
    """Name of an ONNX file -> its size in bytes; none before the export."""

    def file_for(self, flavour: str) -> str:
        """The name of the ONNX file that a runtime of this flavour loads."""
        return f"{self.name}.{flavour}.onnx" if self.precision == "int8" else f"{self.name}.onnx"


def variants_of(request: Request) -> tuple[Variant, ...]:
    """The variants that a run of `request` exports, the one that is deployed last."""
    variants = [Variant(name=BASELINE, parent=None, precision="fp32")]
    if request.prunes:
        variants.append(Variant(name=PRUNED, parent=BASELINE, precision="fp32"))
    parent = variants[-1].name
    if request.half_precision:
        variants.append(Variant(name=HALF, parent=parent, precision="fp16"))
    if request.quantizes:
        variants.append(Variant(name=QUANTIZED, parent=parent, precision="int8"))
    return tuple(variants)


class Answers(_Row):
    """The outputs of one form of the model for the test images, in a file, and their score: an entry of the loss ledger."""

    name: str
    through: str
    """The runtime that computed them, or `torch`."""
    accuracy: float
    accuracy_ci95: tuple[float, float]
    n: int
    answers: str
    """A .npy file, relative to the run's folder: float32 [n, ...]."""


class LayerSize(_Row):
    name: str
    type: str
    channels: int
    macs: int


class SizedResult(StageResult):
    """A model's size beside what the stage did to it."""

    parameters: int
    macs: int
    layers: tuple[LayerSize, ...]


class BaselineResult(SizedResult):
    """The model as it came, proved to work on its data."""

    FOLDER: ClassVar = "stages/baseline"
    ledger: tuple[Answers, ...]
    gate: BaselineCheck | None = None
    """What was tried to be sure of its input; None where that cannot be scored."""


class PrunedGroup(_Row):
    """Layers that lose the same channels."""

    layers: tuple[str, ...]
    channels_before: int
    channels_after: int
    reason: str
    unit: int = 1
    blocks: int = 1


class UnprunedLayer(_Row):
    """A layer that keeps all its channels, and why."""

    layer: str
    reason: str
    kind: str = "structure"
    cause: str = ""


class LayerRefit(_Row):
    """Squared error of a layer's outputs relative to the dense layer's, before and after the least-squares refit."""

    layer: str
    error_before: float
    error_after: float


class PruneResult(StageResult):
    """The shrunk model; with a fine-grained pruner, the sparse one."""

    FOLDER: ClassVar = "stages/shrunk"
    ledger: tuple[Answers, ...]
    groups: tuple[PrunedGroup, ...] = ()
    left_out: tuple[UnprunedLayer, ...] = ()
    thinned: tuple[str, ...] = ()
    """Layers in which a fine-grained pruner set weights to zero."""
    zeros: dict[str, float] = {}
    """Of such a layer, the share of its weights that is zero."""
    refits: tuple[LayerRefit, ...] = ()
    shortfall: str | None = None
    """Why far less was removed than asked for."""
    note: str | None = None


class EpochRow(_Row):
    epoch: int
    train_loss: float
    learning_rate: float
    seconds: float
    accuracy: float | None


class FinetuneResult(SizedResult):
    """The float model that is deployed, trained or not: `skipped` says why not."""

    FOLDER: ClassVar = "artifacts"
    ledger: tuple[Answers, ...] = ()
    """Empty where nothing was trained."""
    curve: tuple[EpochRow, ...] = ()
    memory_note: str | None = None


class MixedStepRow(_Row):
    widened: tuple[str, ...]
    score: float
    weight_bits: float


class MixedPrecision(_Row):
    sensitivity: dict[str, float]
    """Layer -> SQNR in decibels with this layer alone quantized, the most sensitive first."""
    steps: tuple[MixedStepRow, ...]


class FloatLayer(_Row):
    """A part of the model that stays in floating point, and why."""

    layer: str
    type: str
    reason: str


class Noise(_Row):
    """The noise that each layer adds to its output, in decibels of SQNR, and the layer that adds most."""

    layers: dict[str, float] = {}
    noisiest: str = ""
    noisiest_db: float = 0.0


class QuantizeResult(StageResult):
    FOLDER: ClassVar = "stages/quantized"
    ledger: tuple[Answers, ...]
    curve: tuple[EpochRow, ...] = ()
    label: str
    """Of the number formats, such as int8."""
    mixed: MixedPrecision | None = None
    note: str | None = None
    memory_note: str | None = None
    left_float: tuple[FloatLayer, ...] = ()
    bits: dict[str, int]
    """Layer -> bits of its weights."""
    sqnr_db: dict[str, float]
    """Layer -> SQNR of its weights."""
    noise: Noise


class ExportResult(StageResult):
    variants: tuple[Variant, ...]
    """The one that is deployed last."""
    noise: dict[str, Noise] = {}
    """Of the quantized files, against the fake-quantized model."""
    parents: dict[str, str] = {}
    """Artifact -> the variant that it was made from."""

    @field_validator("variants", mode="before")
    @classmethod
    def _of_an_older_record(cls, value: Any) -> Any:
        """Records were {variant: {file: bytes}}."""
        if not isinstance(value, dict):
            return value
        precisions = {HALF: "fp16", QUANTIZED: "int8"}
        structure = PRUNED if PRUNED in value else BASELINE
        parents = {BASELINE: None, PRUNED: BASELINE}
        return [
            {
                "name": name,
                "parent": parents.get(name, structure),
                "precision": precisions.get(name, "fp32"),
                "files": files,
            }
            for name, files in value.items()
        ]

    @property
    def deployed(self) -> Variant:
        return self.variants[-1]

    def variant(self, name: str | None) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)


class BuildResult(StageResult):
    engines: tuple[Engine, ...]
    agreeing: tuple[str, ...]
    """Runtimes that answer like the deployed model."""
    kernels: dict[str, dict[str, str]] = {}
    """Runtime -> layer -> precision that the runtime executes it in."""
    refused: dict[str, str] = {}
    """Runtime -> why it does not take the file or answers differently."""
    parents: dict[str, str] = {}
    notes: tuple[str, ...] = ()


class MeasureResult(StageResult):
    measurements: tuple[Measurement, ...]
    ledger: tuple[Answers, ...] = ()
    worth: tuple[Worth, ...] = ()
    runtime: str | None
    """The one that the result is for; None where it cannot run here."""
    notes: tuple[str, ...] = ()


class ReportResult(StageResult):
    parents: dict[str, str] = {}
    """Artifact -> the file or variant that it was made from, for the manifest."""


TorchResult = BaselineResult | PruneResult | FinetuneResult | QuantizeResult | Skipped


def last_answers(*results: TorchResult) -> Answers:
    """Of the model as it is after these stages: the answers of the last that changed it."""
    return [row for result in results if not isinstance(result, Skipped) for row in result.ledger][-1]
