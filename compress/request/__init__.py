"""All that a user asks for: one frozen object, JSON both ways.

A field's description is the help text of the shell and the web form, its `allowed` the end of the sentence that
refuses a wrong value. Contradictions are refused here, before anything is spent; nothing is ever repaired.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import RequestError
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
from compress.request.rules import FINE_GRAINED_PRUNER, FULL_PRECISION, HALF_PRECISION, allowed, refuse_contradictions

CHECKPOINT_SOURCES = ("auto", "published", "random")
DATA_SOURCES = ("fashion-mnist", "none")
"""What these two fields may say for no path, even where a file has that name."""
SEARCHING_PRUNERS = ("simulated-annealing", "auto-compress", "amc")


def _field(default: Any, help: str, allowed: str, **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"allowed": allowed}, **limits)


MOST_PATH = 4096
"""Characters of a path, as Linux has it."""


class Request(BaseModel):
    """One compression job. Raises `RequestError` on any value or combination that cannot work."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # ---- the model --------------------------------------------------------------------------------------------
    model: str = _field(
        "resnet18",
        "torchvision classifier, as `compress models` lists them; `custom` with compress.run(model=...)",
        "the name of a torchvision classifier; `python -m compress models` lists them",
        min_length=1,
        max_length=100,
    )
    checkpoint: str = _field(
        "auto",
        "weights: a .safetensors, .pth or .pt file, `hf://owner/name` of the Hub, `published` (torchvision's, needs a network), "
        "`random`, or `auto`: the bundled checkpoint for resnet18 on fashion-mnist, else `published`",
        "a file, `hf://owner/name`, `published`, `random` or `auto`",
        min_length=1,
        max_length=MOST_PATH,
    )
    # ---- the data ---------------------------------------------------------------------------------------------
    data: str = _field(
        "fashion-mnist",
        "`fashion-mnist` (bundled), a folder or .zip of images, or `none`",
        "`fashion-mnist`, a folder, a .zip, or `none`",
        min_length=1,
        max_length=MOST_PATH,
    )
    input_size: int | None = _field(
        None,
        "height and width of the model's input in pixels; default: the checkpoint's or the published recipe's",
        "a whole number of pixels from 16 to 1024",
        ge=16,
        le=1024,
    )
    mean: tuple[float, float, float] | None = _field(
        None, "mean of each RGB channel, of pixels scaled to 0..1", "three numbers"
    )
    std: tuple[float, float, float] | None = _field(
        None, "standard deviation of each RGB channel, of pixels scaled to 0..1", "three numbers above 0"
    )
    class_map: str | None = _field(
        None,
        'JSON file {"folder name": output index} for folders that are not the model\'s classes in order',
        "the path of a JSON file",
    )
    test_fraction: float = _field(
        0.2,
        "share of the images kept for testing when there is no test folder; 0 < x < 1",
        "a fraction strictly between 0 and 1",
        gt=0,
        lt=1,
    )
    # ---- pruning ----------------------------------------------------------------------------------------------
    pruner: PrunerName = _field(
        "l1-norm",
        "how the channels to remove are chosen, see `compress pruners`; `level` sets single weights to zero and shrinks "
        "nothing; `none` prunes nothing",
        f"one of {', '.join(get_args(PrunerName))}",
    )
    sparsity: float = _field(
        0.5,
        "fraction of output channels removed from each layer that can be pruned; 0 < x < 1 "
        "(0.5 leaves about 1/4 of the parameters); with `level` the fraction of single weights",
        "a fraction strictly between 0 and 1",
        gt=0,
        lt=1,
    )
    channel_multiple: int = _field(
        8, "kept channels are a multiple of this, which keeps kernels fast", "a whole number from 1 to 64", ge=1, le=64
    )
    exclude: tuple[str, ...] = _field(
        (), "names of layers that are not pruned", "layer names, as `compress check` prints them"
    )
    layer_sparsity: LayerRatios = _field(
        {},
        "sparsity of single layers or modules instead of the general one, such as `layer1.0.conv1=0.3`; layers that "
        "share channels share it, the longer of two names wins, 0 keeps a layer whole",
        "layer or module names with fractions from 0 to below 1, such as layer1.0.conv1=0.3",
    )
    ranking: RankingName = _field(
        "per-group",
        "`per-group` removes the sparsity from every group of layers alike; `global` lets the groups compete, so that "
        "less important ones lose more",
        "one of per-group, global",
    )
    max_layer_sparsity: float | None = _field(
        None,
        "with global ranking, no layer loses more than this fraction of its channels; default: one multiple stays",
        "a fraction strictly between 0 and 1",
        gt=0,
        lt=1,
    )
    config_list: ConfigList | None = _field(
        None,
        "an NNI config list (JSON; in the shell a file) in the keys of NNI 3.0 or 2.x, instead of sparsity, exclude, "
        "layer_sparsity, ranking and max_layer_sparsity",
        "a JSON list of objects, as in NNI's tutorials",
        min_length=1,
    )
    reconstruction_images: int = _field(
        1024,
        "training images on which the weights that stay are refitted to the original's feature maps by least "
        "squares, before any training; fewer when they are large (83 at 224 pixels); 0 is off",
        "a whole number from 0 to 100000",
        ge=0,
        le=100_000,
    )
    pruning_epochs: float = _field(
        0.5,
        "passes over the training images while choosing what to remove, for pruners that look at images or train; at "
        "least one batch for each of pruning_steps",
        "a number above 0 and at most 1000",
        gt=0,
        le=1000,
    )
    pruning_learning_rate: float = _field(
        0.02,
        "peak learning rate of pruners that train (SGD, which NNI drives)",
        "a number above 0 and at most 10",
        gt=0,
        le=10,
    )
    pruning_steps: int = _field(
        5,
        "rounds of gradual pruning (train, prune, train again) of linear, agp, admm and lottery-ticket",
        "a whole number from 1 to 1000",
        ge=1,
        le=1000,
    )
    # ---- training ---------------------------------------------------------------------------------------------
    optimizer: OptimizerName = _field("adamw", "of fine-tuning and quantization-aware training", "one of adamw, sgd")
    finetune_epochs: float = _field(
        4,
        "passes over the training images after pruning; a fraction is allowed",
        "a number from 0 to 1000",
        ge=0,
        le=1000,
    )
    learning_rate: float = _field(
        0.001,
        "peak learning rate of fine-tuning, which rises and falls once; for sgd try 0.02",
        "a number above 0 and at most 10",
        gt=0,
        le=10,
    )
    train_batch_size: int = _field(64, "images per training step", "a whole number from 2 to 4096", ge=2, le=4096)
    training_processes: int = _field(
        1,
        "processes of this machine that share each step of fine-tuning, one for each GPU (DDP); quantization-aware training "
        "stays with one",
        "a whole number from 1 to 64, at most half of train_batch_size",
        ge=1,
        le=64,
    )
    distillation_weight: float = _field(
        0.5,
        "share of the loss that follows the original model's answers; 0 is labels only",
        "a fraction from 0 to 1",
        ge=0,
        le=1,
    )
    distillation_temperature: float = _field(
        4.0, "softening of the original model's answers", "a number from 1 to 20", ge=1, le=20
    )
    label_smoothing: float = _field(
        0.0, "label smoothing of the cross-entropy part", "a fraction from 0 to below 0.5", ge=0, lt=0.5
    )
    augment: bool = _field(
        False,
        "random shifts and flips from left to right while training: for many epochs, of a model that was trained so",
        "true or false",
    )
    # ---- quantization -----------------------------------------------------------------------------------------
    quantizer: QuantizerName = _field(
        "qat",
        "how the grids of weights and activations are found, see `compress quantizers`; `none` keeps floating point",
        f"one of {', '.join(get_args(QuantizerNames))}",
    )
    weight_bits: int = _field(
        8,
        "bits per weight: 2 to 8 (1 with bnn, at most 7 with dorefa), 16 (half precision) or 32 (none)",
        "a whole number from 2 to 8, or 16, or 32",
    )
    activation_bits: int = _field(
        8, "bits per activation: 2 to 8, 16 (half precision) or 32 (none)", "a whole number from 2 to 8, or 16, or 32"
    )
    first_last_bits: int = _field(
        8,
        "the first and the last layer get at least these bits, because they bear fewer worst; 32 keeps both in floating "
        "point, 2 is no rule",
        "a whole number from 2 to 8, or 32",
    )
    layer_bits: LayerBits = _field(
        {},
        "bits of single layers or modules, such as `layer1=4 layer2.0.conv1=4/8 fc=32`: of the weights, of weights and of "
        "what the layer reads, or 32 to keep it in floating point; the longer of two names wins",
        "layer or module names with bits, such as layer1=4, conv1=4/8 or fc=32",
    )
    max_quantization_loss: float | None = _field(
        None,
        "mixed precision: points of accuracy that calibration alone may lose on held-out training images; the layers that "
        "bear few bits worst are widened (to 8 bits, or from 8 to floating point) until it holds, before any training",
        "a number of points from 0 to 100",
        ge=0,
        le=100,
    )
    quantization_config_list: ConfigList | None = _field(
        None,
        "an NNI config list for the quantizer (JSON; in the shell a file) in the keys of NNI 3.0 or 2.x, instead of "
        "weight_bits, activation_bits, first_last_bits and layer_bits",
        "a JSON list of objects, as in NNI's tutorials",
        min_length=1,
    )
    calibration: EstimatorName = _field(
        "average",
        "how calibration turns what it sees into a range: `average` of each batch's extremes, `minmax` of all, or clipped "
        "at a `percentile`, at the least `mse` or the least `entropy` lost",
        f"one of {', '.join(get_args(EstimatorName))}",
    )
    qat_epochs: float = _field(
        0.25,
        "passes over the training images with simulated quantization; 0 only calibrates, as ptq always does",
        "a number from 0 to 1000",
        ge=0,
        le=1000,
    )
    qat_learning_rate: float = _field(
        0.00003, "peak learning rate of quantization-aware training", "a number above 0 and at most 10", gt=0, le=10
    )
    calibration_images: int = _field(
        256, "training images that set the first activation ranges", "a whole number from 1 to 100000", ge=1, le=100_000
    )
    # ---- deployment -------------------------------------------------------------------------------------------
    runtime: RuntimeName = _field(
        "auto",
        "where the result will run; `auto` takes the fastest measured here",
        f"one of {', '.join(get_args(RuntimeName))}",
    )
    batch_size: int = _field(32, "batch size measured beside batch 1", "a whole number from 1 to 1024", ge=1, le=1024)
    threads: int = _field(
        1, "CPU threads of the runtimes while measuring", "a whole number from 1 to 256", ge=1, le=256
    )
    runtime_hint: RuntimeHint = _field(
        "latency",
        "what OpenVINO is tuned for: `latency` of one batch, or `throughput`, with the images of a batch as requests side "
        "by side; the other runtimes have no such choice",
        "one of latency, throughput",
    )
    engine_targets: tuple[Architecture, ...] = _field(
        (),
        "GPU architectures that TensorRT for RTX compiles for ahead of time, such as `SM86` and `SM89`; none is any that "
        "it supports",
        "GPU architectures such as SM86 and SM89",
    )
    # ---- the run ----------------------------------------------------------------------------------------------
    seed: int = _field(0, "seed of every random choice", "a whole number from 0 to 4294967295", ge=0, le=2**32 - 1)

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
        """True when layers lose channels."""
        return self.prunes and self.pruner != FINE_GRAINED_PRUNER

    @property
    def quantizes(self) -> bool:
        """True when the result runs on integers (1 to 8 bits)."""
        return self.quantizer != "none" and self.weight_bits not in (HALF_PRECISION, FULL_PRECISION)

    @property
    def half_precision(self) -> bool:
        return self.weight_bits == HALF_PRECISION

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Raises `RequestError` when the text is not a JSON object of this class's fields."""
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
        """Raises `RequestError` when the file cannot be read or holds no valid request."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError("request", str(path), f"a readable JSON file ({error})") from None


def _first_refusal(error: ValidationError, values: dict[str, Any]) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "request"
    if name == "pruner" and values["pruner"] in SEARCHING_PRUNERS:
        reason = (
            f"because this one searches a ratio for each layer: python -m compress search --strategy {values['pruner']}"
        )
        return RequestError(name, values["pruner"], f"{allowed(Request, name)}, {reason}")
    if name in Request.model_fields:
        return RequestError(name, values.get(name), allowed(Request, name))
    close = get_close_matches(name, Request.model_fields, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `python -m compress run --help` lists the fields"
    return RequestError(name, values.get(name), f"no field of this name{hint}")
