"""The stages of a run. Each takes files of earlier stages, leaves files of its own and returns JSON-safe facts.

baseline  stages/baseline/       the model as it came, proved to work on its data
prune     stages/shrunk/         smaller, and equal to the masked model
finetune  artifacts/model.*      what `compress.load` rebuilds
quantize  stages/quantized/      trained weights and ranges
export    artifacts/*.onnx       each compared with its torch model
build     artifacts/*.engine     each compared with its ONNX file where it can run
measure   (facts only)           latency and accuracy through the runtimes
report    report.json, report.html, README.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress import attention, counting, data, evaluation, models, pruning, quantization, training
from compress import baseline as baseline_gate
from compress.files import write_tensors
from compress.pruning.equality import TOLERANCE
from compress.runs import Run
from compress.sources import Source

Facts = dict[str, Any]

KEPT = "stages/kept.safetensors"
TEST_BATCH = 128
SYNTHETIC_TEST_IMAGES = 256
BATCHNORM_IMAGES = 1024
HELD_OUT = 500
"""At most this many training images score the epochs; they are not trained on."""


def measure_baseline(work: Run, source: Source) -> Facts:
    """The model as it came: does it work on its own data?"""
    checked = None
    if source.dataset.kind == "labelled":
        checked = baseline_gate.gate(source.model, source.dataset, source.preprocessing, seed=work.request.seed)
    files = _save_model(work, source, source.model, "stages/baseline")
    hop = _torch_hop(work, source, "baseline", source.model)
    return {
        **_size_facts(source, source.model),
        "ledger": [hop],
        "gate": checked and checked.as_dict(),
        "files": files + [hop["answers"]],
    }


def prune_and_shrink(work: Run, source: Source) -> Facts:
    """Channels chosen by NNI, removed by NNI, proved equal to the masked model; BatchNorm re-estimated."""
    request = work.request
    model = load_model(work, source, "stages/baseline")
    if not request.prunes:
        files = _save_model(work, source, model, "stages/shrunk")
        return {
            "skipped": "not pruned, as asked",
            "files": files,
            "ledger": [],
            "handoffs": [],
            "groups": [],
            "left_out": [],
        }
    plan = pruning.plan(
        model, source.example, sparsity=request.sparsity, multiple=request.channel_multiple, exclude=request.exclude
    )
    work.progress("prune", 0.2, f"{len(plan.groups)} groups of layers to prune")
    shrunk = pruning.prune(model, source.example, plan, request.pruner)
    work.progress("prune", 0.8, "shrunk, equal to the masked model")
    if source.dataset.kind != "none":
        images = data.calibration_images(source.dataset, BATCHNORM_IMAGES, source.preprocessing, request.seed)
        training.reestimate_batchnorm(shrunk.model, images.split(TEST_BATCH))
    files = _save_model(work, source, shrunk.model, "stages/shrunk") + [_save_kept(work, shrunk)]
    hop = _torch_hop(work, source, "pruned, before fine-tuning", shrunk.model)
    equal = handoff(
        "masked",
        "shrunk",
        "largest difference of logits",
        evaluation.Difference(shrunk.max_abs_diff, shrunk.reference_scale, 1.0, 2),
        f"{TOLERANCE:g} of the largest logit",
        True,
    )
    return {**plan.as_dict(), "handoffs": [equal], "ledger": [hop], "files": files + [hop["answers"]], "skipped": None}


def fine_tune(work: Run, source: Source) -> Facts:
    """Training after pruning, with the original model as teacher."""
    request = work.request
    model = load_model(work, source, "stages/shrunk")
    curve, reason = [], None
    if source.dataset.kind == "none":
        reason = "no images were given, so nothing was trained"
    elif not request.prunes:
        reason = "nothing was pruned, so there is nothing to recover"
    elif request.finetune_epochs == 0:
        reason = "0 epochs, as asked"
    else:
        recipe = _recipe(work, source, request.finetune_epochs, request.learning_rate)
        recipe = replace(recipe, feature_weight=request.feature_weight)
        curve = _train(work, source, "finetune", model, recipe, features=load_file(work.folder / KEPT))
    files = _save_model(work, source, model, "artifacts")
    hop = _torch_hop(work, source, "fine-tuned", model)
    return {
        **_size_facts(source, model),
        "curve": curve,
        "skipped": reason,
        "ledger": [hop],
        "files": files + [hop["answers"]],
    }


def quantize(work: Run, source: Source) -> Facts:
    """NNI quantization-aware training, or calibration only."""
    request = work.request
    if not request.quantizes:
        return {
            "skipped": "not quantized, as asked",
            "curve": [],
            "ledger": [],
            "files": [],
            "left_float": [],
            "sqnr_db": {},
        }
    model = load_model(work, source, "artifacts")
    prepared = quantization.prepare(model)
    images = data.calibration_images(source.dataset, request.calibration_images, source.preprocessing, request.seed)
    curve: list[Facts] = []

    def train(wrapped: nn.Module) -> None:
        recipe = _recipe(work, source, request.qat_epochs, request.qat_learning_rate)
        curve.extend(_train(work, source, "quantize", wrapped, recipe))

    trains = source.dataset.kind != "none" and request.qat_epochs > 0
    quantized = quantization.quantize(
        prepared,
        weight_bits=request.weight_bits,
        activation_bits=request.activation_bits,
        calibration=images.split(TEST_BATCH),
        train=train if trains else None,
    )
    folder = work.folder / "stages" / "quantized"
    folder.mkdir(parents=True, exist_ok=True)
    quantization.save(quantized, folder)
    hop = _torch_hop(work, source, "fake-quantized", quantization.fake_quantized(quantized))
    files = [str(path.relative_to(work.folder)) for path in sorted(folder.iterdir())]
    return {
        "skipped": None,
        "curve": curve,
        "ledger": [hop],
        "files": files + [hop["answers"]],
        "label": quantized.ranges.label,
        "left_float": quantization.left_float(prepared),
        "sqnr_db": quantization.weight_sqnr_db(quantized),
    }


# ---- what the stages share ----------------------------------------------------------------------------------------


def test_batches(source: Source, size: int = TEST_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of the test part in order; synthetic images with label -1 when there are none."""
    if source.dataset.kind == "none":
        images = data.calibration_images(source.dataset, SYNTHETIC_TEST_IMAGES, source.preprocessing, seed=1)
        yield from ((chunk, torch.full((len(chunk),), -1)) for chunk in images.split(size))
    else:
        yield from data.batches(source.dataset.test, size, shuffle=False, seed=0, preprocessing=source.preprocessing)


def ledger_hop(
    work: Run, source: Source, name: str, through: str, answer: evaluation.Answer, batch_size: int = TEST_BATCH
) -> Facts:
    """All test images through `answer`; right answers are counted against labels, or against the baseline's."""
    logits, labels = [], []
    for images, truth in test_batches(source, batch_size):
        logits.append(answer(images.numpy()))
        labels.append(truth.numpy())
    answers, truth = np.concatenate(logits), np.concatenate(labels)
    path = work.folder / "stages" / "answers" / f"{name.replace(' ', '-').replace(',', '')}-{through}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, answers.astype(np.float32))
    if source.dataset.kind != "labelled":
        truth = truth if name == "baseline" else baseline_answers(work).argmax(1)
    score = (
        evaluation.share(len(answers), len(answers))
        if name == "baseline" and truth[0] < 0
        else evaluation.accuracy(answers, truth)
    )
    return {
        "name": name,
        "through": through,
        "accuracy": score.value,
        "accuracy_ci95": [score.low, score.high],
        "n": score.n,
        "answers": str(path.relative_to(work.folder)),
    }


def baseline_answers(work: Run) -> np.ndarray:
    return np.load(work.folder / "stages" / "answers" / "baseline-torch.npy")


def _torch_hop(work: Run, source: Source, name: str, model: nn.Module) -> Facts:
    return ledger_hop(work, source, name, "torch", evaluation.torch_answer(model))


def handoff(
    source: str, target: str, check: str, difference: evaluation.Difference, tolerance: str, passed: bool
) -> Facts:
    return {
        "source": source,
        "target": target,
        "check": check,
        "max_abs_diff": difference.max_abs_diff,
        "reference_scale": difference.reference_scale,
        "top1_agreement": difference.top1_agreement,
        "n_images": difference.n_images,
        "tolerance": tolerance,
        "passed": passed,
    }


def _recipe(work: Run, source: Source, epochs: int, learning_rate: float) -> training.Recipe:
    request = work.request
    weight = 1.0 if source.dataset.kind == "unlabelled" else request.distillation_weight
    return training.Recipe(epochs, learning_rate, weight, request.distillation_temperature, request.label_smoothing)


def _save_kept(work: Run, shrunk: pruning.Shrunk) -> str:
    """Which channels the last layer of each group kept; fine-tuning compares them with the original's.

    Attention gives the whole embedding, whichever heads it has: its outputs are not those of the original's heads.
    """
    order = {name: position for position, (name, _) in enumerate(shrunk.model.named_modules())}
    last = [max(group.layers, key=order.__getitem__) for group in shrunk.plan.groups]
    last = [layer for layer in last if not attention.is_attention(shrunk.model.get_submodule(layer))]
    write_tensors(work.folder / KEPT, {layer: shrunk.kept[layer] for layer in last})
    return KEPT


def _train(
    work: Run,
    source: Source,
    stage: str,
    model: nn.Module,
    recipe: training.Recipe,
    features: dict[str, Tensor] | None = None,
) -> list[Facts]:
    request, dataset = work.request, source.dataset
    held_out, trained = data.split_held_out(dataset.train, min(HELD_OUT, len(dataset.train) // 20), request.seed)
    follows = recipe.distillation_weight > 0 or recipe.feature_weight > 0
    teacher = load_model(work, source, "stages/baseline") if follows else None

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return data.batches(
            trained,
            request.train_batch_size,
            shuffle=True,
            seed=request.seed + epoch,
            augment=request.augment,
            preprocessing=source.preprocessing,
        )

    def score(candidate: nn.Module) -> float:
        right = total = 0
        for images, labels in data.batches(
            held_out, TEST_BATCH, shuffle=False, seed=0, preprocessing=source.preprocessing
        ):
            with torch.no_grad():
                right += int((candidate(images.to(training.device())).argmax(1).cpu() == labels).sum())
            total += len(labels)
        return right / total

    return training.fit(
        model,
        batches,
        len(trained) // request.train_batch_size,
        recipe,
        teacher=teacher,
        features=features,
        score=score if dataset.kind == "labelled" and len(held_out) else None,
        progress=partial(work.progress, stage),
    )


def load_quantized(work: Run, source: Source) -> quantization.Quantized:
    """What the quantize stage left, on the graph that the pruned model is prepared to again."""
    return quantization.restore(
        quantization.prepare(load_model(work, source, "artifacts")), work.folder / "stages" / "quantized"
    )


def _save_model(work: Run, source: Source, model: nn.Module, folder: str) -> list[str]:
    target = work.folder / folder
    models.save(
        model,
        target,
        architecture=source.architecture,
        preprocessing=source.preprocessing,
        class_names=source.class_names,
    )
    return [f"{folder}/model.safetensors", f"{folder}/model.json"]


def load_model(work: Run, source: Source, folder: str) -> nn.Module:
    template = None if source.architecture else source.model
    return models.rebuild(work.folder / folder, model=template)


def _size_facts(source: Source, model: nn.Module) -> Facts:
    layers = counting.layer_shapes(model, source.preprocessing.input_size)
    return {
        "parameters": counting.count_parameters(model),
        "macs": counting.count_macs(model, source.preprocessing.input_size),
        "layers": [
            {"name": layer.name, "type": layer.type, "channels": layer.channels, "macs": layer.macs} for layer in layers
        ],
    }
