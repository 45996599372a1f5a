"""Stage 1: the model as it came, proved to work on its own data, and its answers, which all later ones are compared with."""

from __future__ import annotations

from compress.runs import Run
from compress.stages import gate, ledger
from compress.stages.results import BaselineResult
from compress.stages.workspace import layer_sizes, save_model
from compress.workload import Workload


def baseline(run: Run, workload: Workload, *, scored: bool = True) -> BaselineResult:
    """
    Args:
        scored: ask whether the model works on its own training images, where these have labels.

    Raises:
        BaselineError: it does not, or clearly better with another input size, normalization or class order.
    """
    dataset, passed = workload.dataset, None
    if scored and dataset.has_labels:
        passed = gate.gate(workload.model, dataset, workload.preprocessing, seed=run.request.seed)
    files = save_model(run, workload, workload.model, BaselineResult.FOLDER)
    answers = ledger.torch_answers(run, workload, ledger.FIRST, workload.model)
    parameters, macs, layers = layer_sizes(workload, workload.model)
    return BaselineResult(
        parameters=parameters,
        macs=macs,
        layers=layers,
        ledger=(answers,),
        files=(*files, answers.answers, ledger.TARGETS),
        gate=passed,
    )
