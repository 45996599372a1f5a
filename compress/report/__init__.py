"""The measured facts of a run: frozen, JSON both ways. Charts, card and web page read only this.

Every key is always present; what is not known is null, never invented. Units stand in the names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Environment(_Facts):
    """The machine a number depends on."""

    cpu: str
    cpu_features: tuple[str, ...]
    """Those present of the instruction sets that decide int8 speed, such as avx2, avx512_vnni and amx_int8."""
    cores: int
    gpu: str | None
    threads: int
    versions: dict[str, str]


class Data(_Facts):
    source: str
    kind: str
    """labelled, unlabelled or none."""
    n_train: int
    n_test: int
    class_names: tuple[str, ...]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether accuracy is against labels; else it is the agreement with the original model."""
        return self.kind == "labelled"

    @property
    def score_name(self) -> str:
        return "accuracy" if self.labelled else "agreement"


class Variant(_Facts):
    """A model at one point of the run."""

    name: str
    parent: str | None
    parameters: int
    macs: int
    """Multiply-accumulates of one image through every Conv2d and Linear."""
    file_bytes: dict[str, int]
    accuracy: float | None
    """Fraction 0..1 of the test images, or of agreement with the baseline when the images have no labels."""
    accuracy_ci95: tuple[float, float] | None
    accuracy_through: str | None
    """The runtime, or `torch`, that answered."""
    n_test: int


class Handoff(_Facts):
    """A model passing from one form to the next, compared on the same images."""

    source: str
    target: str
    check: str
    max_abs_diff: float
    reference_scale: float
    """Largest absolute logit of the source."""
    top1_agreement: float
    n_images: int
    tolerance: str
    passed: bool


class Hop(_Facts):
    """The same test images at one point of the way from the dense model to the deployed file."""

    name: str
    through: str
    """The runtime, or `torch`, that answered."""
    accuracy: float
    """Fraction 0..1; of agreement with the baseline when the images have no labels."""
    accuracy_ci95: tuple[float, float]
    previous: str | None
    """The hop it is compared with: where its model, or its file, came from; null for the first."""
    agreement_with_previous: float | None
    lost: int | None
    """Answers that were right at the previous hop and are wrong here; `n` images, as `gained`."""
    gained: int | None
    n: int


class CrossCheck(_Facts):
    """One file on two runtimes: the same images, the answers compared with each other."""

    file: str
    first: str
    second: str
    n: int
    different: int
    """Images that get another class."""
    accuracy_difference_points: float
    """Of the second runtime minus the first."""
    agrees: bool
    text: str


class Loss(_Facts):
    """Where most was lost on the way, in one sentence."""

    text: str
    hop: str | None
    """Null when no hop turned more answers wrong than right."""
    through: str | None
    layer: str | None
    """Null where no layer can be named: training, and what a runtime does inside."""


class Worth(_Facts):
    """Whether 8-bit integers pay on one runtime: medians of one image, measured in the same race, of one structure."""

    runtime: str
    variant: str
    """The float model of the same structure."""
    text: str
    fp32_ms: float
    half_precision: str | None
    """bf16 or fp16, read back; null where the runtime offers neither on this machine."""
    half_ms: float | None
    int8_ms: float
    speedup: float
    """Of int8 over the faster of the two."""
    float_layers: tuple[str, ...]
    """Quantized layers that the runtime executes in floating point all the same."""
    conversions: int | None
    """Operations left in the int8 file that only turn floats into integers or back; null where it cannot be told."""
    layer_bits: dict[str, int]
    """What to ask for instead: these layers in 32 bits; empty when int8 pays, or when there is no layer to exclude."""
    excluded_ms: float | None
    """int8_ms as it changes with those layers in floating point, measured; null where there are none, or the runtime
    refuses such a file."""


class Measurement(_Facts):
    """Latency of one batch through one runtime, in milliseconds, samples kept."""

    variant: str
    runtime: str
    file: str
    precision_requested: str
    precision: str
    """Read back from the runtime."""
    integer_layers: int | None
    candidate_layers: int | None
    """Convolutions and fully connected layers of the file; integer_layers of them run on integers."""
    batch_size: int
    threads: int
    input_size: int
    samples_ms: tuple[float, ...]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    noisy: bool
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None
    notes: tuple[str, ...]


class Engine(_Facts):
    """A file built for one runtime; `ran` is False where there was no device to run it."""

    runtime: str
    variant: str
    file: str | None
    ran: bool
    text: str
    layer_precisions: dict[str, int]


class Stage(_Facts):
    name: str
    seconds: float
    peak_rss_bytes: int
    skipped: str | None
    """Why the stage did nothing; null when it ran."""


class Layer(_Facts):
    name: str
    type: str
    channels_before: int
    channels_after: int
    macs_before: int
    macs_after: int
    weight_bits: int
    sqnr_db: float | None
    """Signal to quantization noise ratio of the layer's weights."""
    output_sqnr_db: float | None
    """Of its output in the fake-quantized model, given the inputs that it has there: the noise that this layer adds."""
    file_sqnr_db: dict[str, float]
    """Local SQNR of its output in each ONNX file against the fake-quantized model; 144.5 when they are equal."""
    group: str | None
    """Layers of one group lose the same channels; null when the layer is not pruned."""
    reason: str
    """Why it is pruned together, or why it stays."""
    pruned_error: float | None
    """After pruning, of its answers in the kept channels: squared distance to the original's, relative to them."""
    refitted_error: float | None
    """The same after the refit by least squares; null when the layer keeps its weights."""


class Epoch(_Facts):
    stage: str
    epoch: int
    train_loss: float
    learning_rate: float
    seconds: float
    accuracy: float | None
    """Top-1 on held-out images of the training part, never on the test part."""


class MixedStep(_Facts):
    """A point of the trade-off of mixed precision, by calibration alone."""

    widened: tuple[str, ...]
    """Layers with more bits than asked, the most sensitive first."""
    accuracy: float
    """On held-out images of the training part, 0..1; of agreement where the images have no labels."""
    weight_bits: float
    """Mean over all weights."""


class Verdict(_Facts):
    text: str
    runtime: str | None
    speedup_vs_fastest_fp32: float | None
    size_ratio: float | None
    accuracy_drop_points: float | None


class Expected(_Facts):
    """What a forecast says of a run before it is trained; see `compress.report.forecast`."""

    sparsity: float
    points_lost: float
    """Percentage points of accuracy below the original, and a 95 % interval of it."""
    points_lost_low: float
    points_lost_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    file_bytes: float
    runtime: str
    n_images: int
    """Held out from the training images; `points_lost` is of these."""


class Came(_Facts):
    """What the run reached, in the same units; null where it was not measured."""

    points_lost: float | None
    speedup: float | None
    file_bytes: int


class Forecast(_Facts):
    """What was forecast, and what came true."""

    expected: Expected
    came: Came
    text: str


class Report(_Facts):
    """Everything that is known about a finished run."""

    espalier_version: str
    created: str
    request: dict[str, Any]
    checkpoint: str
    architecture: str
    environment: Environment
    seed: int
    data: Data
    variants: tuple[Variant, ...]
    handoffs: tuple[Handoff, ...]
    ledger: tuple[Hop, ...]
    loss: Loss
    cross_checks: tuple[CrossCheck, ...]
    worth: tuple[Worth, ...]
    """Empty when nothing was quantized."""
    mixed_precision: tuple[MixedStep, ...]
    """In the order tried, the last one chosen; empty when no budget was given."""
    measurements: tuple[Measurement, ...]
    engines: tuple[Engine, ...]
    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    curves: tuple[Epoch, ...]
    notes: tuple[str, ...]
    verdict: Verdict
    forecast: Forecast | None = None
    """Null where the run was given none."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_file(cls, path: str | Path) -> Report:
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)
