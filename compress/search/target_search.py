"""The target search: candidates are proposed and measured without training, the best are trained until one reaches the target.

A winner is a run: fine-tuned, quantized, exported, compared, measured and reported by `compress.run` like any other. What a
search says of the target comes from that run's report alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compress import pipeline
from compress.errors import CompressError, RequestError, RunError, StorageError
from compress.files import write_text
from compress.report import Report
from compress.report.tables import fastest, smallest_file
from compress.request import Request
from compress.runs import MANIFEST
from compress.search.candidate import by_quantizer
from compress.search.evaluate import OneShot, require_searchable
from compress.search.latency import MEASURED
from compress.search.problem import Problem
from compress.search.space import Space
from compress.search.strategies import LEARN_BEYOND_LIMITS, RATIOS_ALONE, STRATEGIES, proposal
from compress.search.target import Target
from compress.search.trials import Trial, Trials
from compress.workload import open_workload

SEARCH, RESULT, PAGE, RUNS = "search.json", "result.json", "search.html", "runs"
HOPELESS = 1.15
"""A candidate that misses a limit by more than this factor is not scored, unless the strategy learns from it."""
STALE = 10
"""So many proposals in a row that were measured already end the trials: the strategy has nothing new."""
WIDENED = 3
"""At most so many of the layers that bear few bits worst get more."""

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to search."""

    target: Target
    strategy: str = "tpe"
    trials: int = 40
    tries: int = 3
    """Candidates that are trained at most."""
    max_minutes: float | None = None
    """After so many minutes of trials no further one starts; None: no limit."""
    pruners: tuple[str, ...] = ()
    """Besides the base request's."""
    quantizers: tuple[str, ...] = ()
    """Besides the base request's."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RequestError("strategy", self.strategy, f"one of {', '.join(STRATEGIES)}")
        for field in ("trials", "tries"):
            if getattr(self, field) < 1:
                raise RequestError(field, getattr(self, field), "a whole number from 1 up")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise RequestError("max_minutes", self.max_minutes, "a number above 0")
        for field in ("pruners", "quantizers"):
            if getattr(self, field) and self.strategy in RATIOS_ALONE:
                others = ", ".join(name for name in STRATEGIES if name not in RATIOS_ALONE)
                allowed = f"none with {self.strategy}, which chooses ratios alone; these strategies choose: {others}"
                raise RequestError(field, getattr(self, field), allowed)

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self) | {"pruners": list(self.pruners), "quantizers": list(self.quantizers)}


def search(
    request: Request,
    settings: Settings,
    folder: Path,
    *,
    model: nn.Module | None = None,
    notify: Notify = lambda text: None,
) -> dict[str, Any]:
    """Searches in `folder`, or goes on there after an interruption; returns what result.json then holds.

    Args:
        request: what candidates differ from; its epochs are those of the winner's run.
        folder: new, empty, or of an interrupted search with the same request and settings.
        model: as of `compress.run`.

    Raises:
        CompressError: the search cannot start; a candidate that cannot be made is a trial that says why.
        RunError: the folder holds something else.
    """
    for pruner in (request.pruner, *settings.pruners):
        require_searchable(Request(**(request.model_dump() | {"pruner": pruner})))
    for quantizer in settings.quantizers:
        Request(**(request.model_dump() | by_quantizer(quantizer)))
    asked = {"request": request.model_dump(mode="json"), "settings": settings.as_dict()}
    _require_own(folder, asked)
    workload = open_workload(request, model)
    with OneShot(request, workload, folder, notify=notify) as oneshot:
        # Claimed when nothing can be refused any more: a corrected command is another search, and may take the folder.
        write_text(folder / SEARCH, json.dumps(asked, indent=1) + "\n")
        trials = Trials(folder)
        problem = _problem(request, settings, oneshot)
        _measure(oneshot, problem, settings, trials, notify)
        dense, runtime = oneshot.dense, oneshot.runtime.name
    runs = _train(request, settings, folder, trials, problem, model, notify)
    winner = next((row["trial"] for row in runs if not row["missed"]), None)
    found = {
        "request": request.model_dump(mode="json"),
        "settings": settings.as_dict(),
        "dense": dense.as_dict(),
        "runtime": runtime,
        "trials": [trial.as_dict() for trial in trials.all],
        "runs": runs,
        "winner": winner,
        "text": _words(winner, runs, trials, settings.tries),
    }
    write_text(folder / RESULT, json.dumps(found, indent=1) + "\n")
    from compress.search.pages import search_page

    write_text(folder / PAGE, search_page(found))
    return found


def _require_own(folder: Path, asked: dict[str, Any]) -> None:
    """Raises `RunError` unless the folder is this search's: new, or with the same request and settings."""
    saved = folder / SEARCH
    if saved.exists():
        if json.loads(saved.read_text(encoding="utf-8")) != asked:
            raise RunError(f"{folder} holds another search. Choose another folder, or go on with the same options.")
        return
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if strangers := [name for name in entries if not name.startswith(".partial-") and name != MEASURED]:
        raise RunError(
            f"The output folder {folder} is not empty (it holds {strangers[0]}). Choose a new or empty folder."
        )


def _problem(request: Request, settings: Settings, oneshot: OneShot) -> Problem:
    wide_bits = "32" if request.weight_bits == 8 else "8/8"
    widens = request.quantizes and settings.strategy not in RATIOS_ALONE
    sensitive = oneshot.sensitive_layers(wide_bits)[:WIDENED] if widens else ()
    space = Space(
        oneshot.groups,
        request.channel_multiple,
        pruners=tuple(dict.fromkeys((request.pruner, *settings.pruners))),
        quantizers=tuple(dict.fromkeys((request.quantizer, *settings.quantizers))),
        sensitive=sensitive,
        wide_bits=wide_bits,
    )
    return Problem(space, settings.target, oneshot.dense, settings.trials, request.seed)


# ---- trials ----------------------------------------------------------------------------------------------------------


def _measure(oneshot: OneShot, problem: Problem, settings: Settings, trials: Trials, notify: Notify) -> None:
    strategy = STRATEGIES[settings.strategy](problem)
    refuse = _never if settings.strategy in LEARN_BEYOND_LIMITS else partial(_hopeless, problem)
    while len(trials.all) < settings.trials and not _spent(settings, trials) and not _stale(trials):
        trial = trials.measure(proposal(strategy, problem, trials), partial(oneshot.evaluate, hopeless=refuse))
        if trial.repeats is None:
            notify(f"{trial.number} of {settings.trials}: {_trial_words(trial, problem)}")


def _hopeless(problem: Problem, latency_ms: float, file_bytes: int) -> str | None:
    excess = problem.target.excess(latency_ms, file_bytes, problem.dense)
    return f"misses a limit by {100 * (excess - 1):.0f} %" if excess > HOPELESS else None


def _never(latency_ms: float, file_bytes: int) -> None:
    """Every candidate is scored."""


def _spent(settings: Settings, trials: Trials) -> bool:
    seconds = sum(trial.seconds for trial in trials.all)
    return settings.max_minutes is not None and seconds > 60 * settings.max_minutes


def _stale(trials: Trials) -> bool:
    return len(trials.all) >= STALE and all(trial.repeats is not None for trial in trials.all[-STALE:])


# ---- runs ------------------------------------------------------------------------------------------------------------


def _train(
    request: Request,
    settings: Settings,
    folder: Path,
    trials: Trials,
    problem: Problem,
    model: nn.Module | None,
    notify: Notify,
) -> list[dict[str, Any]]:
    """Trains the most promising candidates, one after the other, until one reaches the target.

    A run that fails is a row that says why, and the next candidate is tried; what concerns the folder ends the search.

    A run that comes out slower or larger than its trial takes the candidates along that would miss a limit by the same.
    """
    runs: list[dict[str, Any]] = []
    worse = 1.0
    while len(runs) < settings.tries and (not runs or runs[-1]["missed"]):
        trial = _best(trials, problem, {row["trial"] for row in runs}, worse)
        if trial is None:
            break
        notify(f"training the candidate of trial {trial.number}")
        out = folder / RUNS / f"trial-{trial.number:05d}"
        try:
            report = _run(trial.candidate.request(request), out, model)
            row = _judged(trial, report, settings.target, out.relative_to(folder))
        except StorageError:
            raise
        except CompressError as error:
            row = _failed(trial, error, out.relative_to(folder))
        runs.append(row)
        assert trial.outcome is not None, "a complete trial has one"
        worse = max(worse, row["excess"] / problem.excess(trial.outcome))
        notify("; ".join(row["missed"]) or "it reaches the target")
    return runs


def _best(trials: Trials, problem: Problem, tried: set[int], worse: float) -> Trial | None:
    """The best score among complete trials that keep to the limits, also when they come out `worse` times slower."""
    scored = [
        (problem.score(trial.outcome), trial)
        for trial in trials.all
        if trial.complete
        and trial.outcome is not None
        and trial.repeats is None
        and trial.number not in tried
        and problem.excess(trial.outcome) * worse <= 1
    ]
    return max(scored, key=lambda row: row[0], default=(0.0, None))[1]


def _run(request: Request, out: Path, model: nn.Module | None) -> Report:
    if (out / MANIFEST).exists():
        return Report.from_file(out / "report.json")
    return pipeline.run(request, model=model, out=out, resume=(out / "request.json").exists())


def _failed(trial: Trial, error: CompressError, folder: Path) -> dict[str, Any]:
    """As `_judged`, of a run that came to no report."""
    unknown = dict.fromkeys(("accuracy_drop_points", "speedup", "latency_ms", "size_mb", "accuracy", "verdict"))
    return {"trial": trial.number, "folder": str(folder), **unknown, "excess": 0.0, "missed": [str(error)]}


def _judged(trial: Trial, report: Report, target: Target, folder: Path) -> dict[str, Any]:
    """What a run reached, and in words each limit that it missed; what was not measured is missed."""
    verdict, last = report.verdict, report.variants[-1]
    measured = verdict.runtime and fastest(report, last.name, runtime=verdict.runtime)
    size = smallest_file(last)
    reached = {
        "accuracy_drop_points": verdict.accuracy_drop_points,
        "speedup": verdict.speedup_vs_fastest_fp32,
        "latency_ms": measured.p50_ms if measured else None,
        "size_mb": size / 1e6 if size is not None else None,
    }
    limits = (
        ("accuracy_drop_points", target.max_accuracy_drop, "points of accuracy lost", "at most", 1),
        ("speedup", target.min_speedup, "times faster", "at least", -1),
        ("latency_ms", target.max_latency_ms, "ms", "at most", 1),
        ("size_mb", target.max_size_mb, "MB", "at most", 1),
    )
    missed, excess = [], 0.0
    for name, limit, unit, bound, sign in limits:
        if limit is None:
            continue
        value = reached[name]
        if value is None:
            missed.append(f"{unit} not measured, {bound} {limit:g} asked for")
            continue
        if sign * value > sign * limit:
            missed.append(f"{_told(value, limit)} {unit}, {bound} {limit:g} asked for")
        if name != "accuracy_drop_points":
            excess = max(excess, value / limit if sign > 0 else limit / value)
    return {
        "trial": trial.number,
        "folder": str(folder),
        **reached,
        "accuracy": last.accuracy,
        "excess": excess,
        "missed": missed,
        "verdict": verdict.text,
    }


def _told(value: float, limit: float) -> str:
    """With four digits, or as many as tell the value from the limit that it misses."""
    texts = (f"{value:.{digits}g}" for digits in range(4, 18))
    return next(text for text in texts if float(text) != limit)


def _words(winner: int | None, runs: list[dict[str, Any]], trials: Trials, tries: int) -> str:
    if winner is not None:
        judged = sum(row["accuracy"] is not None for row in runs)
        again = f", number {judged} of the runs judged on the same test images" if judged > 1 else ""
        return f"The target is reached by the run of trial {winner}{again}: {runs[-1]['verdict']}"
    if not runs:
        return f"The target is not reached: {_why_none_was_trained(trials)}"
    told = " ".join(f"Trial {row['trial']}: {'; '.join(row['missed']).removesuffix('.')}." for row in runs)
    more = (
        "Allow more tries, or ask for less."
        if len(runs) >= tries
        else "No other candidate is expected to keep to the limits. Allow more trials, or ask for less."
    )
    number = f"any of {len(runs)} trained candidates" if len(runs) > 1 else "the one trained candidate"
    return f"The target is not reached by {number}. {told} {more}"


def _why_none_was_trained(trials: Trials) -> str:
    first = [trial for trial in trials.all if trial.repeats is None]
    measured = sum(trial.outcome is not None for trial in first)
    if measured == 0:
        return f"none of {len(first)} candidates could be made. The first one: {first[0].refused}"
    return (
        f"none of {measured} candidates that were measured keeps to its limits on speed and size. Allow more trials, or ask "
        "for less."
    )


def _trial_words(trial: Trial, problem: Problem) -> str:
    outcome = trial.outcome
    if outcome is None:
        return f"refused: {trial.refused}"
    times = problem.dense.latency_ms / outcome.latency_ms
    found = f"{outcome.latency_ms:.3f} ms ({times:.2f}x), {outcome.file_bytes / 1e6:.2f} MB"
    return f"{found}, {outcome.stopped}" if outcome.stopped else f"{found}, {100 * outcome.accuracy:.1f} % untrained"
