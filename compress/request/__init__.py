"""`Request`: the settings of a compression job, frozen, with JSON serialization.

The docstring of a field is its help on the command line, in the web form and in the API; its `allowed` text ends the error
message for an invalid value. Contradictory settings are refused before any work starts; values are never corrected silently.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import RequestError
from compress.methods.pruners import PRUNERS, SEARCHES
from compress.request.fields import (
    Architecture,
    ConfigList,
    EstimatorName,
    LayerBits,
    LayerRatios,
    OptimizerName,
    PrunerName,
    QuantizerName,
    QuantizerNames,
    RankingName,
    RuntimeHint,
    RuntimeName,
)
from compress.request.rules import FULL_PRECISION, HALF_PRECISION, allowed, refuse_contradictions

CHECKPOINT_SOURCES = ("auto", "published", "random")
DATA_SOURCES = ("fashion-mnist", "none")
"""Keywords of these two fields; they take precedence over a file of that name."""


def _field(default: Any, allowed: str, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"allowed": allowed}, **limits)


MAX_PATH_LENGTH = 4096
"""Characters of a path (PATH_MAX of Linux)."""


class Request(BaseModel):
    """One compression job. Raises `RequestError` for an invalid value or a contradiction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    # ---- the model --------------------------------------------------------------------------------------------
    model: str = _field(
        "resnet18",
        "the name of a torchvision classifier; `python -m compress models` lists them",
        min_length=1,
        max_length=100,
    )
    """Architecture: a torchvision classifier that `compress models` lists, or `custom` for a module passed as compress.run(model=...)."""
    checkpoint: str = _field(
        "auto", "a file, `hf://owner/name`, `published`, `random` or `auto`", min_length=1, max_length=MAX_PATH_LENGTH
    )
    """Weights to start from: a .safetensors, .pth or .pt file with a state dict, a Hub repository `hf://owner/name`, `published`
    (torchvision's, downloaded), `random`, or `auto`, which is the bundled checkpoint for resnet18 on fashion-mnist and `published`
    otherwise."""
    # ---- the data ---------------------------------------------------------------------------------------------
    data: str = _field(
        "fashion-mnist", "`fashion-mnist`, a folder, a .zip, or `none`", min_length=1, max_length=MAX_PATH_LENGTH
    )
    """Images for training, calibration and testing: `fashion-mnist` (bundled), a folder or .zip with one subfolder per class, or `none`.
    Without images nothing is trained and no accuracy is reported."""
    input_size: int | None = _field(None, "a whole number of pixels from 16 to 1024", ge=16, le=1024)
    """Height and width of the model's input, in pixels. Default: the size stored with the checkpoint or of torchvision's published
    weights. Set it if the model was trained at another size."""
    mean: tuple[float, float, float] | None = _field(None, "three numbers")
    """Per-channel mean (R, G, B) of the input normalization, for pixel values in 0..1. Default: stored with the checkpoint or of the
    published weights. Set it together with std."""
    std: tuple[float, float, float] | None = _field(None, "three numbers above 0")
    """Per-channel standard deviation (R, G, B) of the input normalization, for pixel values in 0..1. Default: stored with the checkpoint
    or of the published weights. Set it together with mean."""
    class_map: str | None = _field(None, "the path of a JSON file")
    """JSON file that maps folder names to output indices, {"folder name": index}. Needed if the folders, sorted by name, are not the
    model's classes in order."""
    test_fraction: float = _field(0.2, "a fraction strictly between 0 and 1", gt=0, lt=1)
    """Fraction of the images held out for testing if the data has no test folder; 0 < x < 1."""
    # ---- pruning ----------------------------------------------------------------------------------------------
    pruner: PrunerName = _field("l1-norm", f"one of {', '.join(get_args(PrunerName))}")
    """Importance criterion that selects the channels to remove; `compress pruners` lists them. `level` zeroes individual weights and
    does not shrink layers; `none` disables pruning."""
    sparsity: float = _field(0.5, "a fraction strictly between 0 and 1", gt=0, lt=1)
    """Fraction of output channels to remove from each prunable layer; 0 < x < 1. 0.5 leaves about 1/4 of the parameters. With `level`,
    the fraction of individual weights to zero."""
    channel_multiple: int = _field(8, "a whole number from 1 to 64", ge=1, le=64)
    """Round the number of remaining channels of each layer to a multiple of this. Multiples of 8 keep convolution kernels fast; 1 allows
    any number."""
    exclude: tuple[str, ...] = _field((), "layer names, as `compress check` prints them")
    """Names of layers to leave unpruned, as `compress check` prints them."""
    layer_sparsity: LayerRatios = _field(
        {}, "layer or module names with fractions from 0 to below 1, such as layer1.0.conv1=0.3"
    )
    """Sparsity of individual layers or modules, overriding sparsity, such as `layer1.0.conv1=0.3`; 0 leaves a layer unpruned. The most
    specific name applies; layers that share channels must agree."""
    ranking: RankingName = _field("per-group", "one of per-group, global")
    """Scope in which channels are ranked. `per-group` removes the same fraction from every group of coupled layers; `global` ranks all
    channels together, so that less important groups lose more."""
    max_layer_sparsity: float | None = _field(None, "a fraction strictly between 0 and 1", gt=0, lt=1)
    """Upper limit of the sparsity of any layer with `global` ranking. Default: no limit, but channel_multiple channels remain in every
    layer."""
    config_list: ConfigList | None = _field(None, "a JSON list of objects, as in NNI's tutorials", min_length=1)
    """NNI pruning config list (JSON; on the command line also a file) with the keys of NNI 3.0 or 2.x. Replaces sparsity, exclude,
    layer_sparsity, ranking and max_layer_sparsity."""
    reconstruction_images: int = _field(1024, "a whole number from 0 to 100000", ge=0, le=100_000)
    """Number of training images for the least-squares reconstruction, which refits the remaining weights to the original feature maps
    before any training; 0 disables it. Fewer are used for large inputs (83 at 224 pixels)."""
    pruning_epochs: float = _field(0.5, "a number above 0 and at most 1000", gt=0, le=1000)
    """Epochs over the training images while a data-driven pruner selects channels; at least one batch for each of pruning_steps. Ignored
    by pruners that only read weights."""
    pruning_learning_rate: float = _field(0.02, "a number above 0 and at most 10", gt=0, le=10)
    """Peak learning rate (SGD) of pruners that train while they prune."""
    pruning_steps: int = _field(5, "a whole number from 1 to 1000", ge=1, le=1000)
    """Number of prune-and-train iterations of the pruners that prune step by step."""
    # ---- training ---------------------------------------------------------------------------------------------
    optimizer: OptimizerName = _field("adamw", "one of adamw, sgd")
    """Optimizer of fine-tuning and quantization-aware training."""
    finetune_epochs: float = _field(4, "a number from 0 to 1000", ge=0, le=1000)
    """Epochs of fine-tuning after pruning; may be fractional. 0 skips it. More epochs recover more accuracy."""
    learning_rate: float = _field(0.001, "a number above 0 and at most 10", gt=0, le=10)
    """Peak learning rate of fine-tuning (one-cycle schedule). Use about 0.02 with sgd."""
    train_batch_size: int = _field(64, "a whole number from 2 to 4096", ge=2, le=4096)
    """Training batch size, in images per optimizer step. Lower it if memory runs out."""
    training_processes: int = _field(1, "a whole number from 1 to 64, at most half of train_batch_size", ge=1, le=64)
    """Number of data-parallel (DDP) fine-tuning processes on this machine, one per GPU; each step's batch is divided among them.
    Quantization-aware training always uses one."""
    distillation_weight: float = _field(0.5, "a fraction from 0 to 1", ge=0, le=1)
    """Weight of the knowledge-distillation loss, with the original model as the teacher; the cross-entropy loss gets the rest. 0 trains
    on labels only."""
    distillation_temperature: float = _field(4.0, "a number from 1 to 20", ge=1, le=20)
    """Temperature of the softmax in the distillation loss; higher values soften the teacher's probabilities."""
    label_smoothing: float = _field(0.0, "a fraction from 0 to below 0.5", ge=0, lt=0.5)
    """Label smoothing of the cross-entropy loss; 0 disables it."""
    augment: bool = _field(False, "true or false")
    """Augment training images with random shifts and horizontal flips. Use it for many epochs if the original model was trained with
    such augmentation."""
    # ---- quantization -----------------------------------------------------------------------------------------
    quantizer: QuantizerName = _field("qat", f"one of {', '.join(get_args(QuantizerNames))}")
    """Quantization method, which determines the scales and zero points of weights and activations; `compress quantizers` lists them.
    `none` keeps floating point."""
    weight_bits: int = _field(8, "a whole number from 2 to 8, or 16, or 32")
    """Bits per weight: 2 to 8 (1 with bnn, at most 7 with dorefa), 16 (half precision) or 32 (no quantization). Fewer than 8 are stored
    in 8-bit integers."""
    activation_bits: int = _field(8, "a whole number from 2 to 8, or 16, or 32")
    """Bits per activation: 2 to 8, 16 (half precision) or 32 (no quantization)."""
    first_last_bits: int = _field(8, "a whole number from 2 to 8, or 32")
    """Minimum bits of the first and the last layer, which are the most sensitive to quantization. 32 keeps both in floating point; 2
    imposes no minimum."""
    layer_bits: LayerBits = _field({}, "layer or module names with bits, such as layer1=4, conv1=4/8 or fc=32")
    """Bits of individual layers or modules, such as `layer1=4 layer2.0.conv1=4/8 fc=32`: weight bits, weight bits/input activation bits,
    or 32 for floating point. The most specific name applies."""
    max_quantization_loss: float | None = _field(None, "a number of points from 0 to 100", ge=0, le=100)
    """Mixed precision: maximum accuracy loss by calibration alone, in percentage points on held-out training images. The layers most
    sensitive to quantization get more bits (8, or floating point instead of 8) until it is met. Default: no limit."""
    quantization_config_list: ConfigList | None = _field(
        None, "a JSON list of objects, as in NNI's tutorials", min_length=1
    )
    """NNI quantization config list (JSON; on the command line also a file) with the keys of NNI 3.0 or 2.x. Replaces weight_bits,
    activation_bits, first_last_bits and layer_bits."""
    calibration: EstimatorName = _field("average", f"one of {', '.join(get_args(EstimatorName))}")
    """Range estimator for calibration: `average` (mean of the per-batch minima and maxima), `minmax` (global minimum and maximum), or a
    range clipped at a `percentile`, by minimum `mse`, or by minimum relative `entropy`."""
    qat_epochs: float = _field(0.25, "a number from 0 to 1000", ge=0, le=1000)
    """Epochs of quantization-aware training. 0 only calibrates; ptq always does."""
    qat_learning_rate: float = _field(0.00003, "a number above 0 and at most 10", gt=0, le=10)
    """Peak learning rate of quantization-aware training."""
    calibration_images: int = _field(256, "a whole number from 1 to 100000", ge=1, le=100_000)
    """Number of training images for calibrating the activation ranges."""
    # ---- deployment -------------------------------------------------------------------------------------------
    runtime: RuntimeName = _field("auto", f"one of {', '.join(get_args(RuntimeName))}")
    """Target runtime for deployment; `auto` selects the fastest one measured on this machine."""
    batch_size: int = _field(32, "a whole number from 1 to 1024", ge=1, le=1024)
    """Batch size to benchmark in addition to batch size 1."""
    threads: int = _field(1, "a whole number from 1 to 256", ge=1, le=256)
    """CPU threads of the runtimes during benchmarks. Use the number that the deployed model will have."""
    runtime_hint: RuntimeHint = _field("latency", "one of latency, throughput")
    """OpenVINO performance hint: `latency` of one batch, or `throughput`, which runs the images of a batch as parallel requests. Other
    runtimes have no such option."""
    engine_targets: tuple[Architecture, ...] = _field((), "GPU architectures such as SM86 and SM89")
    """GPU architectures for which TensorRT for RTX compiles engines ahead of time, such as `SM86` and `SM89`. Default: all that it
    supports."""
    # ---- the run ----------------------------------------------------------------------------------------------
    seed: int = _field(0, "a whole number from 0 to 4294967295", ge=0, le=2**32 - 1)
    """Seed of all random number generators."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_refusal(error, values) from None
        refuse_contradictions(self)

    @property
    def prunes(self) -> bool:
        return self.pruner != "none"

    @property
    def shrinks(self) -> bool:
        """True if layers lose channels."""
        return self.prunes and not PRUNERS[self.pruner].fine_grained

    @property
    def quantizes(self) -> bool:
        """True if the result computes with integers (1 to 8 bits)."""
        return self.quantizer != "none" and self.weight_bits not in (HALF_PRECISION, FULL_PRECISION)

    @property
    def half_precision(self) -> bool:
        return self.weight_bits == HALF_PRECISION

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Raises `RequestError` unless the text is a JSON object of this class's fields."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(
                "request", f"text that is not JSON ({error})", "a JSON object, as request.json of a run"
            ) from None
        if not isinstance(values, dict):
            raise RequestError("request", type(values).__name__, "a JSON object, as request.json of a run")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Request:
        """Raises `RequestError` if the file cannot be read or does not contain a valid request."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError("request", str(path), f"a readable JSON file ({error})") from None


def _first_refusal(error: ValidationError, values: dict[str, Any]) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "request"
    if name == "pruner" and values["pruner"] in SEARCHES:
        reason = (
            f"because this one searches a ratio for each layer: python -m compress search --strategy {values['pruner']}"
        )
        return RequestError(name, values["pruner"], f"{allowed(Request, name)}, {reason}")
    if name in Request.model_fields:
        return RequestError(name, values.get(name), allowed(Request, name))
    close = get_close_matches(name, Request.model_fields, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `python -m compress run --help` lists the fields"
    return RequestError(name, values.get(name), f"no field of this name{hint}")


for _definition in Request.model_fields.values():  # a docstring is wrapped in the source, a help text where it is shown
    _definition.description = " ".join((_definition.description or "").split())
