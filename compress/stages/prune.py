"""Stage 2: channels chosen by NNI, removed by NNI, proved equal to the masked model; then what stays is refitted."""

from __future__ import annotations

from dataclasses import asdict

from torch import nn

from compress import equality, pruning
from compress.pruning.equivalence import TOLERANCE
from compress.report import Handoff
from compress.runs import Run
from compress.stages import ledger, steps
from compress.stages.results import BaselineResult, LayerRefit, PruneResult, Skipped
from compress.stages.workspace import load_model, prove_rebuilt, save_model
from compress.tasks import Difference
from compress.workload import Workload


def prune(run: Run, workload: Workload, dense: BaselineResult) -> PruneResult | Skipped:
    """The smaller model, or with a fine-grained pruner the one with zeros among its weights."""
    if not run.request.prunes:
        return Skipped(skipped="not pruned, as asked")
    model = load_model(run, workload, dense.FOLDER)
    rebuilt = prove_rebuilt(run, workload, dense.ledger[-1], model)
    if not run.request.shrinks:
        return _zero_weights(run, workload, model, rebuilt)
    plan = steps.pruning_plan(run.request, model, workload.example)
    run.progress("prune", 0.2, f"{len(plan.groups)} groups of layers to prune")
    shrunk = steps.shrink(
        run.request, workload, model, plan, lambda done, text: run.progress("prune", 0.2 + 0.6 * done, text)
    )
    run.progress("prune", 0.8, "shrunk, equal to the masked model; refitting what stays")
    refits = steps.refit(run.request, workload, model, shrunk.model, shrunk.kept_channels)
    answers = ledger.torch_answers(run, workload, "pruned and refitted" if refits else "pruned", shrunk.model)
    equal = equality.row(
        "masked",
        "shrunk",
        "largest difference of logits",
        Difference(shrunk.max_abs_diff, shrunk.reference_scale, 1.0, 2),
        f"{TOLERANCE:g} of the largest logit",
        True,
    )
    return PruneResult(
        **plan.as_dict(),
        shortfall=steps.shortfall(run.request, workload, plan, shrunk.model),
        refits=tuple(LayerRefit(**asdict(refit)) for refit in refits),
        handoffs=(rebuilt, equal),
        ledger=(answers,),
        files=(*save_model(run, workload, shrunk.model, PruneResult.FOLDER), answers.answers),
    )


def _zero_weights(run: Run, workload: Workload, model: nn.Module, rebuilt: Handoff) -> PruneResult:
    """The fine-grained pruner: every layer keeps its shape, so no shrinking has to be proved."""
    plan = steps.pruning_plan(run.request, model, workload.example)
    sparse = pruning.zero_weights(model, plan, run.request.sparsity)
    steps.refit(run.request, workload, model, sparse.model, {})
    answers = ledger.torch_answers(run, workload, "pruned", sparse.model)
    note = (
        f"{100 * run.request.sparsity:g} % of the weights in each of {len(sparse.zeros)} layers were set to zero and stay "
        "zero. Every layer keeps its shape, so no runtime here computes faster; it is good for files that compress better "
        "(zip, gzip) and for runtimes with sparse kernels."
    )
    return PruneResult(
        **plan.as_dict(),
        zeros=dict(sparse.zeros),
        note=note,
        handoffs=(rebuilt,),
        ledger=(answers,),
        files=(*save_model(run, workload, sparse.model, PruneResult.FOLDER), answers.answers),
    )
