"""The steps of a compression, from a request and a workload: plan, shrink, refit, train, prepare, quantize.

Stages, the check before a run and the search call these; each has no state and leaves no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress import pruning, quantization, training
from compress.data import dataset
from compress.data.batches import calibration_images, iter_batches, iter_numbered_batches, split_held_out
from compress.engines import BuildSpec, Precision
from compress.equality.outputs import torch_answer
from compress.errors import TrainingError
from compress.models import counting
from compress.models.calls import classes_of, logits_of, own_errors
from compress.pruning.reconstruction import Refit, reconstruct
from compress.request import Request
from compress.workload import Workload

TEST_BATCH = 128
BATCHNORM_IMAGES = 1024
FLOAT_BITS = 16
SENSITIVITY_IMAGES = 64
MOST_PIXELS = 2**22
"""Of all images together that a refit walks through: a large image has more positions to fit than a small one."""
HELD_OUT = 500
"""At most this many training images score the epochs; they are not trained on."""


def pruning_plan(request: Request, model: nn.Module, example: Tensor) -> pruning.Plan:
    """What the request's pruner will do to `model`; raises what `pruning.plan` raises."""
    if not request.shrinks:
        return pruning.plan_without_shrinking(model, exclude=request.exclude)
    return pruning.plan(
        model,
        example,
        sparsity=request.sparsity,
        multiple=request.channel_multiple,
        exclude=request.exclude,
        layer_sparsity=request.layer_sparsity,
        ranking=request.ranking,
        max_layer_sparsity=request.max_layer_sparsity,
        config_list=request.config_list,
        pruner=request.pruner,
    )


def shrink(
    request: Request, workload: Workload, model: nn.Module, plan: pruning.Plan, progress: training.Progress
) -> pruning.PrunedModel:
    """`model` without the channels that `plan` removes, chosen by the request's pruner; raises what `pruning.prune` raises."""
    training_of_pruner = pruning_training(request, workload, model, progress)
    return pruning.prune(model, workload.example, plan, request.pruner, training_of_pruner)


def usable_plan(request: Request, workload: Workload) -> pruning.Plan:
    """The plan, when the pruner can carry it out on this model and these images; raises `CompressError` otherwise."""
    plan = pruning_plan(request, workload.model, workload.example)
    has_images = workload.dataset.has_images
    pruning.require_usable(workload.model, workload.example, plan, request.pruner, has_images=has_images)
    return plan


def shortfall(request: Request, workload: Workload, plan: pruning.Plan, pruned: nn.Module) -> str | None:
    """What to tell of a plan that removes far less than the request asks for; None where it does not.

    A config list asks for a fraction of each layer that it names and for nothing else, so it cannot fall short.

    Args:
        pruned: what the plan made of the source's model.
    """
    if request.config_list is not None or not request.shrinks:
        return None
    size = workload.preprocessing.input_size
    macs = counting.count_macs(pruned, size) / counting.count_macs(workload.model, size)
    asked = min([request.sparsity, *(ratio for ratio in request.layer_sparsity.values() if ratio > 0)])
    parameters = counting.count_parameters(pruned)
    return pruning.shortfall(workload.model, plan, asked, request.channel_multiple, parameters, 1 - macs)


def prepared_with_bits(
    request: Request, model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, quantization.BitPlan]:
    """`model` ready to be quantized as asked, and the bits of each layer; `images` and errors as of `prepare`."""
    prepared = quantization.prepare(model, images)
    if request.quantization_config_list is not None:
        offsets = request.quantizer == "lsq-plus"
        plan = quantization.bits_of_config_list(model, prepared, request.quantization_config_list, offsets)
    else:
        plan = quantization.assign_bits(
            prepared,
            request.weight_bits,
            request.activation_bits,
            first_last_bits=request.first_last_bits,
            layer_bits=request.layer_bits,
        )
    if plan.keep_float:
        prepared = quantization.prepare(model, images, keep_float=plan.keep_float)
    return prepared, plan


def quantize(
    request: Request,
    prepared: fx.GraphModule,
    plan: quantization.BitPlan,
    images: Tensor,
    *,
    train: Callable[[nn.Module], None] | None = None,
) -> quantization.Quantized:
    """`prepared` on the grids of `plan`, by the request's quantizer; raises what `quantization.quantize` raises.

    Args:
        images: float32 [N, 3, H, W], normalised; what the ranges are calibrated on.
        train: trains the wrapped model in place; by calibration alone without it.
    """
    return quantization.quantize(
        prepared,
        plan,
        quantizer=request.quantizer,
        estimator=request.calibration,
        calibration=images.split(TEST_BATCH),
        train=train,
    )


def mixed_precision(
    request: Request, workload: Workload, model: nn.Module, plan: quantization.BitPlan, images: Tensor
) -> quantization.BitSearch:
    """Widens layers of `plan` until calibration alone keeps to `max_quantization_loss`."""
    pairs = _scored_pairs(request, workload, model, images)

    def widened(wider: quantization.BitPlan) -> quantization.Quantized:
        return quantize(request, quantization.prepare(model, images, keep_float=wider.keep_float), wider, images)

    def score(scored: nn.Module) -> float:
        answer = torch_answer(scored)
        right = sum(
            int(workload.task.correct(answer(batch.numpy()), targets.numpy()).sum()) for batch, targets in pairs
        )
        return right / sum(len(batch) for batch, _ in pairs)

    return quantization.search_bits(
        plan,
        widened,
        lambda quantized: score(quantization.fake_quantized(quantized)),
        images[:SENSITIVITY_IMAGES],
        score(model) - (request.max_quantization_loss or 0) / 100,
    )


def _scored_pairs(request: Request, workload: Workload, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Held-out training images and their labels; the model's own answers where there are no labels or no such images."""
    if workload.dataset.has_images and len(held_out := training_images(request, workload).held_out):
        pairs = list(iter_batches(held_out, TEST_BATCH, shuffle=False, seed=0, preprocessing=workload.preprocessing))
        if workload.dataset.has_labels:
            return pairs
        batches = [batch for batch, _ in pairs]
    else:
        batches = list(images.split(TEST_BATCH))
    answer = torch_answer(model)
    return [(batch, torch.from_numpy(workload.task.predictions(answer(batch.numpy())))) for batch in batches]


def build_spec(
    request: Request, workload: Workload, batch_size: int = 1, precision: Precision = "fp32"
) -> BuildSpec:
    """How a runtime builds or loads a file of the workload's model for `batch_size` images a call."""
    return BuildSpec(
        workload.preprocessing.input_size,
        batch_size,
        max(batch_size, request.batch_size),
        request.threads,
        precision,
        hint=request.runtime_hint,
        targets=request.engine_targets,
    )


def pruning_training(
    request: Request, workload: Workload, teacher: nn.Module, progress: training.Progress
) -> pruning.PruningTraining | None:
    """How the request's pruner looks at training images and trains; None when it needs none.

    Raises:
        TrainingError: there is not one batch.
    """
    if not pruning.PRUNERS[request.pruner].needs_images:
        return None
    images = training_images(request, workload)
    if images.per_epoch == 0:
        raise TrainingError(training.TOO_FEW_IMAGES)
    config = training_config(request, workload, request.pruning_epochs, request.pruning_learning_rate)
    return pruning.PruningTraining(
        batches=lambda epoch: (batch[:2] for batch in islice(images.batches(epoch), images.per_epoch)),
        loss=training.loss_function(
            config, teacher if config.distillation_weight > 0 else None, classes_of(workload.model, workload.example)
        ),
        steps=max(request.pruning_steps, round(config.epochs * images.per_epoch)),
        learning_rate=config.learning_rate,
        rounds=request.pruning_steps,
        progress=progress,
    )


def training_stages(request: Request, workload: Workload) -> tuple[str, ...]:
    """The stages of a run that train, by their names."""
    if not workload.dataset.has_images:
        return ()
    trains = {
        "prune": request.prunes and pruning.PRUNERS[request.pruner].trains,
        "finetune": request.prunes and request.finetune_epochs > 0,
        "quantize": request.quantizes and request.qat_epochs > 0 and quantization.QUANTIZERS[request.quantizer].trains,
    }
    return tuple(name for name, does in trains.items() if does)


def require_trainable(request: Request, workload: Workload) -> None:
    """Refuses what would end the training of `workload.model` before its first step.

    Raises:
        TrainingError: every parameter is frozen, forward takes no gradients, or the images do not fill one batch.
    """
    looks = request.prunes and pruning.PRUNERS[request.pruner].needs_images and workload.dataset.has_images
    trained = training_stages(request, workload)
    if trained:
        training.parameter_groups(workload.model, 0.0)
        _require_gradients(workload)
    if (looks or trained) and training_images(request, workload).per_epoch == 0:
        raise TrainingError(training.TOO_FEW_IMAGES)


def _require_gradients(workload: Workload) -> None:
    with torch.enable_grad(), own_errors(workload.model, "in eval mode, with one image"):
        learns = logits_of(workload.model(workload.example)).requires_grad
    if not learns:
        raise TrainingError(
            "The model answers without gradients, so it cannot be trained: take torch.no_grad, torch.inference_mode or detach "
            "out of its forward, or set --finetune-epochs and --qat-epochs to 0."
        )


def training_config(request: Request, workload: Workload, epochs: float, learning_rate: float) -> training.TrainingConfig:
    """With the original model as teacher; images without labels are learnt from the teacher alone."""
    unlabelled = workload.dataset.has_images and not workload.dataset.has_labels
    weight = 1.0 if unlabelled else request.distillation_weight
    return training.TrainingConfig(
        epochs,
        learning_rate,
        weight,
        request.distillation_temperature,
        request.label_smoothing,
        request.optimizer,
        workload.task,
    )


def train(
    request: Request,
    workload: Workload,
    model: nn.Module,
    config: training.TrainingConfig,
    *,
    teacher: nn.Module | None,
    progress: training.Progress,
    part: slice = slice(None),
) -> list[dict[str, Any]]:
    """`training.fit` on the request's images; returns and raises what it does.

    Args:
        part: of each batch, what this process takes where several train together.
    """
    images = training_images(request, workload, part)
    scored = workload.dataset.has_labels and len(images.held_out) > 0
    return training.fit(
        model,
        images.batches,
        images.per_epoch,
        config,
        teacher=teacher,
        keep_zeros=request.prunes and not request.shrinks,
        score=scorer(images.held_out, workload) if scored else None,
        progress=progress,
    )


@dataclass(frozen=True)
class TrainingImages:
    """The training part of a data set, without the images that score the epochs."""

    held_out: dataset.Split
    batches: training.Batches
    """The last batch of an epoch may be smaller."""
    per_epoch: int
    """Full batches in an epoch."""


def training_images(request: Request, workload: Workload, part: slice = slice(None)) -> TrainingImages:
    """`part` is what this process takes of each batch."""
    train = workload.dataset.train
    held_out, trained = split_held_out(train, min(HELD_OUT, len(train) // 20), request.seed)

    def batches(epoch: int) -> Iterator[training.Batch]:
        pick = iter_batches if request.augment else iter_numbered_batches
        return pick(
            trained,
            request.train_batch_size,
            shuffle=True,
            seed=request.seed + epoch,
            augment=request.augment,
            preprocessing=workload.preprocessing,
            part=part,
        )

    return TrainingImages(held_out, batches, len(trained) // request.train_batch_size)


def scorer(images: dataset.Split, workload: Workload) -> Callable[[nn.Module], float]:
    """The share of `images` that a model, in eval mode on the training device, gets right."""

    def score(model: nn.Module) -> float:
        right = 0
        for batch, labels in iter_batches(
            images, TEST_BATCH, shuffle=False, seed=0, preprocessing=workload.preprocessing
        ):
            with torch.no_grad():
                outputs = logits_of(model(batch.to(training.device())))
                right += int(workload.task.correct(outputs.float().cpu().numpy(), labels.numpy()).sum())
        return right / len(images)

    return score


def refit(
    request: Request, workload: Workload, dense: nn.Module, model: nn.Module, kept: Mapping[str, Tensor]
) -> tuple[Refit, ...]:
    """Refits what pruning left of `model`, in place, on training images; synthetic ones do not show what matters.

    With `reconstruction_images` 0, and in a model that lost no channels, only the BatchNorm statistics are taken anew.
    """
    if not workload.dataset.has_images:
        return ()
    refits = request.shrinks and request.reconstruction_images > 0
    count = request.reconstruction_images if refits else BATCHNORM_IMAGES
    count = min(count, max(1, MOST_PIXELS // workload.preprocessing.input_size**2))
    images = calibration_images(workload.dataset, count, workload.preprocessing, request.seed)
    bits = request.activation_bits if request.quantizes else FLOAT_BITS
    return reconstruct(model, dense, kept, images, bits=bits, weights=refits)
