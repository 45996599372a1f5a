"""The whole story, top to bottom: what happens to a model between a request and a report.

Each stage takes the results of earlier stages and returns its own (`stages.results`); models and files lie in the run's
folder, with a signed record of each result, so an interrupted run goes on at the first stage that is not complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from compress.checkpoints import reader
from compress.engines.processes import remote
from compress.files import storage_error
from compress.report import Report
from compress.report import forecast as forecasts
from compress.report.forecast import Front
from compress.request import Request
from compress.runs import Run, open_run
from compress.stages import preflight
from compress.stages.baseline import baseline
from compress.stages.build import build
from compress.stages.export import export
from compress.stages.finetune import finetune
from compress.stages.measure import measure
from compress.stages.prune import prune
from compress.stages.quantize import quantize
from compress.stages.report import report
from compress.workload import open_workload

log = logging.getLogger("compress")


def run(
    request: Request,
    *,
    model: nn.Module | None = None,
    out: Path,
    resume: bool = False,
    forecast: Path | None = None,
    notify: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Report:
    """Compresses a model and returns the measured facts; everything is left in the folder `out`.

    Args:
        model: any fx-traceable classifier of the user's own, with `request.model == "custom"`; it is never changed.
        out: a new or empty folder, or with `resume` the folder of an interrupted run of the same request.
        forecast: forecast.json of `compress forecast`; the report says what of it came true.
        notify: called with each event that is also written to events.jsonl.

    Raises:
        CompressError: one sentence for the user; the folder then holds no manifest and can be resumed.
    """
    preflight.require_machine(request)
    expected = Front.from_file(forecast).at(request) if forecast else None
    with _opened(out, request, notify, resume) as run:
        if expected:
            forecasts.keep(expected, run.folder)
        workload = open_workload(request, model, kept=run.uploads)
        preflight.require_plan(request, workload)

        dense = run.stage(baseline, workload)
        pruned = run.stage(prune, workload, dense)
        tuned = run.stage(finetune, workload, dense, pruned)
        quantized = run.stage(quantize, workload, dense, pruned, tuned)
        exported = run.stage(export, workload, dense, pruned, tuned, quantized)
        built = run.stage(build, workload, exported)
        measured = run.stage(measure, workload, quantized, exported, built)
        papers = run.stage(report, workload, dense, pruned, tuned, quantized, exported, built, measured)
        run.finish(papers.parents)
        return Report.from_file(run.folder / "report.json")


def check(request: Request, *, model: nn.Module | None = None) -> dict[str, Any]:
    """What a run of `request` would do, without training: the pruning plan, quantization points, runtimes, problems."""
    return preflight.check(request, model)


def verify(folder: Path) -> list[str]:
    """Every file hash and every recorded hand-off of a finished run that does not hold; empty when it verifies."""
    return preflight.verify(folder)


@contextmanager
def _opened(out: Path, request: Request, notify: Callable[[dict[str, Any]], None], resume: bool) -> Iterator[Run]:
    """The run's folder with its log; the last event says how the run ended."""
    run = open_run(out, request, notify, resume=resume)
    if not resume:
        reader.forget(run.uploads)
    handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    level, log.level = log.level, logging.INFO
    try:
        yield run
    except OSError as error:
        refusal = storage_error(Path(error.filename or out), error)
        run.end(refusal)
        raise refusal from error
    except BaseException as error:
        log.exception("the run ended: %s", error)
        run.end(error)
        raise
    finally:
        remote.release()
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
