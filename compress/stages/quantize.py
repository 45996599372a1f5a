"""Stage 4: one of NNI's quantizers, with training on the grid or by calibration only."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, fx, nn

from compress import quantization
from compress.data.batches import calibration_images
from compress.files import write_text
from compress.runs import Run
from compress.stages import ledger, steps
from compress.stages.finetune import train
from compress.stages.results import (
    BaselineResult,
    EpochRow,
    FinetuneResult,
    FloatLayer,
    MixedPrecision,
    MixedStepRow,
    PruneResult,
    QuantizeResult,
    Skipped,
    last_answers,
)
from compress.stages.workspace import load_model, prove_rebuilt
from compress.workload import Workload

PARAMETERS = "artifacts/quantization.json"
"""Scales and bits of every layer and activation, for other tools."""


def quantize(
    run: Run, workload: Workload, dense: BaselineResult, pruned: PruneResult | Skipped, tuned: FinetuneResult
) -> QuantizeResult | Skipped:
    """Weights trained or rounded onto integer grids, with the ranges of activations."""
    request = run.request
    if not request.quantizes:
        return Skipped(skipped="not quantized, as asked")
    model = load_model(run, workload, tuned.FOLDER)
    rebuilt = prove_rebuilt(run, workload, last_answers(dense, pruned, tuned), model)
    images = calibration_images(
        workload.dataset, request.calibration_images, workload.preprocessing, request.seed
    )
    prepared, plan, mixed = _prepared(run, workload, model, images)
    curve: tuple[EpochRow, ...] = ()
    memory_note = None

    def fit(wrapped: nn.Module) -> None:
        nonlocal curve, memory_note
        config = steps.training_config(request, workload, request.qat_epochs, request.qat_learning_rate)
        curve, memory_note = train(run, workload, "quantize", wrapped, config)

    trains = workload.dataset.has_images and request.qat_epochs > 0
    quantized = steps.quantize(request, prepared, plan, images, train=fit if trains else None)
    folder = run.folder / QuantizeResult.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    quantization.save(quantized, folder)
    write_text(run.folder / PARAMETERS, quantized.grids.to_json())
    answers = ledger.torch_answers(run, workload, "fake-quantized", quantization.fake_quantized(quantized))
    return QuantizeResult(
        curve=curve,
        memory_note=memory_note,
        handoffs=(rebuilt, *quantized.model.meta[quantization.PROOFS]),
        ledger=(answers,),
        files=(
            *(str(path.relative_to(run.folder)) for path in sorted(folder.iterdir())),
            PARAMETERS,
            answers.answers,
        ),
        label=quantized.grids.label,
        mixed=_mixed(mixed) if mixed else None,
        note=_mixed_note(mixed, request.max_quantization_loss or 0) if mixed else None,
        left_float=tuple(FloatLayer(**row) for row in quantization.left_float(prepared)),
        bits={name: grid.bits for name, grid in quantized.grids.weights.items()},
        sqnr_db=quantization.weight_sqnr_db(quantized),
        noise=ledger.noise(quantization.quantization_noise(quantized, ledger.traced(images))),
    )


def _prepared(
    run: Run, workload: Workload, model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, quantization.BitPlan, quantization.BitSearch | None]:
    """`model` with quantization points and the bits of each layer; with a budget, as mixed precision chooses them."""
    request = run.request
    prepared, plan = steps.prepared_with_bits(request, model, images)
    if request.max_quantization_loss is None:
        return prepared, plan, None
    run.progress("quantize", 0.0, "looking for the layers that are most sensitive to quantization")
    mixed = steps.mixed_precision(request, workload, model, plan, images)
    return quantization.prepare(model, images, keep_float=mixed.plan.keep_float), mixed.plan, mixed


def _mixed(choice: quantization.BitSearch) -> MixedPrecision:
    rows = tuple(MixedStepRow(**asdict(step)) for step in choice.steps)
    return MixedPrecision(sensitivity=choice.sensitivity, steps=rows)


def _mixed_note(choice: quantization.BitSearch, budget: float) -> str:
    first, last = choice.steps[0], choice.steps[-1]
    names = ", ".join(last.widened) or "no layer"
    text = (
        f"Mixed precision: {names} got more bits; on held-out images {100 * first.score:.1f} % were right before and "
        f"{100 * last.score:.1f} % after, by calibration alone."
    )
    if choice.within_budget:
        return text
    return f"{text} That does not keep to the {budget:g} points asked for; training may, or ask for more bits everywhere."
