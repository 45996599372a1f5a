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

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn

from compress import equality, memory, models, pruning, quantization, training
from compress.data.batches import calibration_images
from compress.equality import differences
from compress.files import write_text
from compress.models import counting
from compress.pruning.equivalence import TOLERANCE
from compress.runs import Run
from compress.stages import baseline as baseline_gate
from compress.stages import data_parallel, ledger, steps
from compress.stages.steps import TEST_BATCH
from compress.workload import Workload

Facts = dict[str, Any]


def measure_baseline(work: Run, workload: Workload) -> Facts:
    """The model as it came: does it work on its own data?"""
    checked = None
    if workload.dataset.kind == "labelled":
        checked = baseline_gate.gate(workload.model, workload.dataset, workload.preprocessing, seed=work.request.seed)
    return keep_baseline(work, workload) | {"gate": checked and checked.as_dict()}


def keep_baseline(work: Run, workload: Workload) -> Facts:
    """The dense model and its answers, which later ones are compared with."""
    files = _save_model(work, workload, workload.model, "stages/baseline")
    hop = ledger.torch_hop(work, workload, ledger.FIRST, workload.model)
    return {
        **_size_facts(workload, workload.model),
        "ledger": [hop],
        "files": [*files, hop["answers"], ledger.TRUTH],
    }


def prune_and_shrink(work: Run, workload: Workload) -> Facts:
    """Channels chosen by NNI, removed by NNI, proved equal to the masked model; then what stays is refitted."""
    request = work.request
    model = load_model(work, workload, "stages/baseline")
    rebuilt = ledger.rebuilt(work, workload, "baseline", model)
    if not request.prunes:
        files = _save_model(work, workload, model, "stages/shrunk")
        return {
            "skipped": "not pruned, as asked",
            "files": files,
            "ledger": [],
            "handoffs": [rebuilt],
            "groups": [],
            "left_out": [],
            "refits": [],
        }
    plan = steps.pruning_plan(request, model, workload.example)
    if not request.shrinks:
        return _zero_weights(work, workload, model, plan) | {"handoffs": [rebuilt]}
    work.progress("prune", 0.2, f"{len(plan.groups)} groups of layers to prune")
    how = steps.pruning_training(
        request, workload, model, lambda done, text: work.progress("prune", 0.2 + 0.6 * done, text)
    )
    shrunk = pruning.prune(model, workload.example, plan, request.pruner, how)
    work.progress("prune", 0.8, "shrunk, equal to the masked model; refitting what stays")
    refits = steps.recover(request, workload, model, shrunk.model, shrunk.kept_channels)
    short = steps.shortfall(request, workload, plan, shrunk.model)
    files = _save_model(work, workload, shrunk.model, "stages/shrunk")
    hop = ledger.torch_hop(work, workload, "pruned and refitted" if refits else "pruned", shrunk.model)
    equal = equality.row(
        "masked",
        "shrunk",
        "largest difference of logits",
        differences.Difference(shrunk.max_abs_diff, shrunk.reference_scale, 1.0, 2),
        f"{TOLERANCE:g} of the largest logit",
        True,
    )
    return {
        **plan.as_dict(),
        "shortfall": short,
        "handoffs": [rebuilt, equal],
        "ledger": [hop],
        "files": files + [hop["answers"]],
        "refits": [asdict(refit) for refit in refits],
        "skipped": None,
    }


def _zero_weights(work: Run, workload: Workload, model: nn.Module, plan: pruning.Plan) -> Facts:
    """The fine-grained pruner: every layer keeps its shape, so no shrinking has to be proved."""
    sparse = pruning.zero_weights(model, plan, work.request.sparsity)
    steps.recover(work.request, workload, model, sparse.model, {})
    files = _save_model(work, workload, sparse.model, "stages/shrunk")
    hop = ledger.torch_hop(work, workload, "pruned", sparse.model)
    note = (
        f"{100 * work.request.sparsity:g} % of the weights in each of {len(sparse.zeros)} layers were set to zero and stay "
        "zero. Every layer keeps its shape, so no runtime here computes faster; it is good for files that compress better "
        "(zip, gzip) and for runtimes with sparse kernels."
    )
    return {
        **plan.as_dict(),
        "zeros": dict(sparse.zeros),
        "note": note,
        "refits": [],
        "ledger": [hop],
        "files": files + [hop["answers"]],
        "skipped": None,
    }


def fine_tune(work: Run, workload: Workload) -> Facts:
    """Training after pruning, with the original model as teacher; without training there is no hop, as none was made."""
    request = work.request
    model = load_model(work, workload, "stages/shrunk")
    rebuilt = ledger.rebuilt(work, workload, "prune", model)
    curve, reason, memory_note = [], None, None
    if workload.dataset.kind == "none":
        reason = "no images were given, so nothing was trained"
    elif not request.prunes:
        reason = "nothing was pruned, so there is nothing to recover"
    elif request.finetune_epochs == 0:
        reason = "0 epochs, as asked"
    else:
        recipe = steps.recipe_of(request, workload, request.finetune_epochs, request.learning_rate)
        curve, memory_note = _train(work, workload, "finetune", model, recipe)
    files = _save_model(work, workload, model, "artifacts")
    hops = [] if reason else [ledger.torch_hop(work, workload, "fine-tuned", model)]
    return {
        **_size_facts(workload, model),
        "curve": curve,
        "skipped": reason,
        "memory_note": memory_note,
        "handoffs": [rebuilt],
        "ledger": hops,
        "files": files + [hop["answers"] for hop in hops],
    }


def quantize(work: Run, workload: Workload) -> Facts:
    """One of NNI's quantizers: training on the grid, or calibration only."""
    request = work.request
    if not request.quantizes:
        return {
            "skipped": "not quantized, as asked",
            "curve": [],
            "handoffs": [],
            "ledger": [],
            "files": [],
            "mixed": None,
            "left_float": [],
            "bits": {},
            "sqnr_db": {},
            "noise": {"layers": {}},
        }
    model = load_model(work, workload, "artifacts")
    rebuilt = ledger.rebuilt(work, workload, "finetune", model)
    images = calibration_images(workload.dataset, request.calibration_images, workload.preprocessing, request.seed)
    prepared, plan = steps.prepared_with_bits(request, model, images)
    mixed = None
    if request.max_quantization_loss is not None:
        work.progress("quantize", 0.0, "looking for the layers that bear few bits worst")
        mixed = steps.mixed_precision(request, workload, model, plan, images)
        plan = mixed.plan
        prepared = quantization.prepare(model, images, keep_float=plan.keep_float)
    curve: list[Facts] = []
    memory_notes: list[str | None] = []

    def train(wrapped: nn.Module) -> None:
        recipe = steps.recipe_of(request, workload, request.qat_epochs, request.qat_learning_rate)
        records, told = _train(work, workload, "quantize", wrapped, recipe)
        curve.extend(records)
        memory_notes.append(told)

    trains = workload.dataset.kind != "none" and request.qat_epochs > 0
    quantized = quantization.quantize(
        prepared,
        plan,
        quantizer=request.quantizer,
        estimator=request.calibration,
        calibration=images.split(TEST_BATCH),
        train=train if trains else None,
    )
    folder = work.folder / "stages" / "quantized"
    folder.mkdir(parents=True, exist_ok=True)
    quantization.save(quantized, folder)
    hop = ledger.torch_hop(work, workload, "fake-quantized", quantization.fake_quantized(quantized))
    write_text(work.artifacts / "quantization.json", quantized.grids.to_json())
    files = [str(path.relative_to(work.folder)) for path in sorted(folder.iterdir())]
    noise = quantization.quantization_noise(quantized, ledger.traced(images))
    return {
        "skipped": None,
        "curve": curve,
        "handoffs": [rebuilt, *quantized.model.meta[quantization.PROOFS]],
        "ledger": [hop],
        "files": [*files, "artifacts/quantization.json", hop["answers"]],
        "label": quantized.grids.label,
        "mixed": mixed and {"sensitivity": mixed.sensitivity, "steps": [asdict(step) for step in mixed.steps]},
        "note": mixed and _mixed_note(mixed, request.max_quantization_loss),
        "memory_note": memory_notes[-1] if memory_notes else None,
        "left_float": quantization.left_float(prepared),
        "bits": {name: grid.bits for name, grid in quantized.grids.weights.items()},
        "sqnr_db": quantization.weight_sqnr_db(quantized),
        "noise": ledger.noise_facts(noise),
    }


def _mixed_note(mixed: quantization.BitSearch, budget: float) -> str:
    first, last = mixed.steps[0], mixed.steps[-1]
    names = ", ".join(last.widened) or "no layer"
    found = (
        f"Mixed precision: {names} got more bits; on held-out images {100 * first.score:.1f} % were right before and "
    )
    found += f"{100 * last.score:.1f} % after, by calibration alone."
    if mixed.within_budget:
        return found
    return (
        f"{found} That does not keep to the {budget:g} points asked for; training may, or ask for more bits everywhere."
    )


# ---- what the stages share ----------------------------------------------------------------------------------------


def _train(
    work: Run,
    workload: Workload,
    stage: str,
    model: nn.Module,
    recipe: training.TrainingConfig,
) -> tuple[list[Facts], str | None]:
    """The curve, and what is to be told when memory ran out."""
    request, progress = work.request, partial(work.progress, stage)

    def fit(batch_size: int) -> list[Facts]:
        asked = request.model_copy(update={"train_batch_size": batch_size})
        if stage == "finetune" and request.training_processes > 1:
            return data_parallel.fine_tune(asked, work.folder, model, progress)
        teacher = load_model(work, workload, "stages/baseline") if recipe.distillation_weight > 0 else None
        return steps.train(asked, workload, model, recipe, teacher=teacher, progress=progress)

    curve, used = memory.halving_once(model, fit, request.train_batch_size, partial(progress, 0.0))
    return curve, memory.note(request.train_batch_size, used)


def load_quantized(work: Run, workload: Workload) -> quantization.Quantized:
    """What the quantize stage left, on the graph that the pruned model is prepared to again."""
    images = calibration_images(workload.dataset, 2, workload.preprocessing, work.request.seed)
    return quantization.restore(load_model(work, workload, "artifacts"), work.folder / "stages" / "quantized", images)


def _save_model(work: Run, workload: Workload, model: nn.Module, folder: str) -> list[str]:
    target = work.folder / folder
    models.save(
        model,
        target,
        architecture=workload.architecture,
        preprocessing=workload.preprocessing,
        class_names=workload.class_names,
    )
    return [f"{folder}/model.safetensors", f"{folder}/model.json"]


def load_model(work: Run, workload: Workload, folder: str) -> nn.Module:
    template = None if workload.architecture else workload.model
    return models.rebuild(work.folder / folder, model=template)


def _size_facts(workload: Workload, model: nn.Module) -> Facts:
    layers = counting.layer_shapes(model, workload.preprocessing.input_size)
    return {
        "parameters": counting.count_parameters(model),
        "macs": counting.count_macs(model, workload.preprocessing.input_size),
        "layers": [
            {"name": layer.name, "type": layer.type, "channels": layer.channels, "macs": layer.macs} for layer in layers
        ],
    }
