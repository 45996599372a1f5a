"""Stage 3: training after pruning, with the original model as teacher."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from compress import memory, training
from compress.request import Request
from compress.runs import Run
from compress.stages import data_parallel, ledger, steps
from compress.stages.results import BaselineResult, EpochRow, FinetuneResult, PruneResult, Skipped, last_answers
from compress.stages.workspace import layer_sizes, load_model, prove_rebuilt, save_model
from compress.workload import Workload


def finetune(run: Run, workload: Workload, dense: BaselineResult, pruned: PruneResult | Skipped) -> FinetuneResult:
    """The float model that is deployed; `compress.load` rebuilds it."""
    request = run.request
    model = load_model(run, workload, dense.FOLDER if isinstance(pruned, Skipped) else pruned.FOLDER)
    rebuilt = prove_rebuilt(run, workload, last_answers(dense, pruned), model)
    curve: tuple[EpochRow, ...] = ()
    skipped, memory_note = _why_untrained(request, workload), None
    if skipped is None:
        config = steps.training_config(request, workload, request.finetune_epochs, request.learning_rate)
        curve, memory_note = train(run, workload, "finetune", model, config)
    trained = () if skipped else (ledger.torch_answers(run, workload, "fine-tuned", model),)
    parameters, macs, layers = layer_sizes(workload, model)
    return FinetuneResult(
        parameters=parameters,
        macs=macs,
        layers=layers,
        curve=curve,
        skipped=skipped,
        memory_note=memory_note,
        handoffs=(rebuilt,),
        ledger=trained,
        files=(*save_model(run, workload, model, FinetuneResult.FOLDER), *(row.answers for row in trained)),
    )


def _why_untrained(request: Request, workload: Workload) -> str | None:
    if not workload.dataset.has_images:
        return "no images were given, so nothing was trained"
    if not request.prunes:
        return "nothing was pruned, so there is nothing to recover"
    return "0 epochs, as asked" if request.finetune_epochs == 0 else None


def train(
    run: Run, workload: Workload, stage: str, model: nn.Module, config: training.TrainingConfig
) -> tuple[tuple[EpochRow, ...], str | None]:
    """Trains `model` in place for a stage, with half the batch where memory runs out once.

    Returns:
        The training curve, and a note for the report when memory ran out.
    """
    request, progress = run.request, partial(run.progress, stage)

    def fit(batch_size: int) -> list[dict[str, Any]]:
        smaller = request.model_copy(update={"train_batch_size": batch_size})
        if stage == "finetune" and request.training_processes > 1:
            return data_parallel.fine_tune(smaller, run.folder, model, progress)
        distills = config.distillation_weight > 0
        teacher = load_model(run, workload, BaselineResult.FOLDER) if distills else None
        return steps.train(smaller, workload, model, config, teacher=teacher, progress=progress)

    curve, used = memory.halving_once(model, fit, request.train_batch_size, partial(progress, 0.0))
    return tuple(EpochRow(**row) for row in curve), memory.note(request.train_batch_size, used)
