"""Before and after a run: what it would do, whether the runtime is there, whether a finished run still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from compress import runs
from compress.engines import RUNTIMES
from compress.errors import RuntimeUnavailableError
from compress.models import counting
from compress.report import Report
from compress.request import Request
from compress.stages import data_parallel, dry_run, steps
from compress.workload import Workload, open_workload


def require_machine(request: Request) -> None:
    """
    Raises:
        RuntimeUnavailableError: the runtime asked for cannot even be built for here.
        RequestError: the installed TensorRT for RTX does not compile for a GPU architecture, or there are fewer GPUs than
            processes that shall train.
    """
    if request.runtime != "auto" and (reason := RUNTIMES[request.runtime].missing()):
        raise RuntimeUnavailableError(f"runtime: got {request.runtime!r}, which is not available here. {reason}")
    data_parallel.require_devices(request.training_processes)
    for runtime in RUNTIMES.values():
        if request.engine_targets and runtime.builds_for_targets:
            runtime.check_targets(request.engine_targets)


def require_plan(request: Request, workload: Workload) -> None:
    """Raises `CompressError` when the model cannot be pruned or trained as asked, or the images for it are missing.

    Before hours of evaluation, not after them.
    """
    steps.require_trainable(request, workload)
    if request.prunes:
        steps.usable_plan(request, workload)


def check(request: Request, model: nn.Module | None = None) -> dict[str, Any]:
    """A dry run on a few images: plan, shrinking with proof, one step of each training, export, a build for each runtime.

    Returns:
        possible, text, problems, notes, groups, left_out, float_layers, modules, runtimes, parameters, macs: JSON-safe.
        `notes` say what was done to a module of the user's own; `modules` has a line (module, level green, amber or
        red, text) for each layer.

    Raises:
        CompressError: the model, its weights or its images cannot be opened at all.
    """
    workload = open_workload(request, model)
    found = dry_run.dry_run(request, workload)
    found.attempt(lambda: require_machine(request))
    size = workload.preprocessing.input_size
    facts = {"parameters": counting.count_parameters(workload.model), "macs": counting.count_macs(workload.model, size)}
    return {
        "possible": not found.problems,
        "problems": found.problems,
        "text": _text(workload, facts, found),
        **facts,
        **found.plan.model_dump(mode="json", include={"groups", "left_out", "thinned"}),
        "float_layers": [row.model_dump() for row in found.float_layers],
        "modules": dry_run.modules(request, workload, found),
        "notes": list(workload.notes),
        "runtimes": [
            {
                "runtime": name,
                "text": found.runtimes.get(name) or runtime.missing() or "not tried, for the problem above",
            }
            for name, runtime in RUNTIMES.items()
        ],
    }


def verify(folder: Path) -> list[str]:
    """What no longer holds of a finished run: file hashes, and hand-offs out of tolerance; empty when all is well."""
    problems = runs.verify(folder)
    if not (folder / "report.json").is_file():
        return problems
    report = Report.from_file(folder / "report.json")
    optional = {row.file for row in report.engines}
    for row in report.handoffs:
        if not row.passed and not any(row.target.startswith(f"{file} on ") for file in optional if file):
            problems.append(
                f"{row.source} to {row.target} is out of tolerance: {row.max_abs_diff:.3g} of {row.reference_scale:.3g}"
            )
    return problems


def _text(workload: Workload, facts: dict[str, int], found: dry_run.DryRun) -> str:
    if found.problems:
        return "This cannot work as asked: " + " ".join(found.problems)
    plan = found.plan
    groups, whole = len(plan.groups), len(plan.left_out)
    layers = sum(len(group.layers) for group in plan.groups)
    pruned = f"{_count(layers, 'layer')} can be pruned in {_count(groups, 'group')}"
    pruned += f", {whole} not pruned"
    if plan.thinned:
        pruned = f"{_count(len(plan.thinned), 'layer')} with zeros among the weights, and every layer keeps its shape"
    short = f" {plan.shortfall}" if plan.shortfall else ""
    return (
        f"{workload.name}: {facts['parameters'] / 1e6:.2f} M parameters, {facts['macs'] / 1e6:.0f} M MACs; {pruned}. "
        f"Weights: {workload.weights}. Images: {workload.dataset.source}.{short}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
