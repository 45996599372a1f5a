"""Every search strategy on the bundled model at the same number of trials, against uniform pruning: docs/strategies.md.

    python -m bench.strategies [--strategies uniform amc ...] [--trials 20] [--min-speedup 4] [--work DIR] [--out FILE]

A trial is one candidate, made without training and timed on the runtime. Finished trials are kept in --work and are not
measured again, so that the command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import compress
from bench import made_on
from compress.errors import CompressError
from compress.files import write_text
from compress.search.candidate import Candidate
from compress.search.evaluate import OneShot
from compress.search.outcome import Outcome
from compress.search.problem import Problem
from compress.search.space import Space
from compress.search.strategies import STRATEGIES, proposal
from compress.search.target import Target
from compress.search.trials import Trial, Trials
from compress.workload import open_workload

OUT, WORK = Path("docs/strategies.md"), Path("build/strategies")


@dataclass(frozen=True)
class Row:
    strategy: str
    best: Outcome | None
    """The most accurate one that keeps to the limits; None where no trial did."""
    trial: int
    """Which one it was, from 1."""
    seconds: float
    """Of making and measuring all candidates."""


def run(name: str, problem: Problem, evaluate: Callable[[Candidate], Outcome], folder: Path) -> list[Trial]:
    """Runs a strategy for `problem.trials`; those that `folder` has are not repeated, and a refused one is a trial, too."""
    strategy, trials = STRATEGIES[name](problem), Trials(folder)
    while len(trials.all) < problem.trials:
        trial = trials.measure(proposal(strategy, problem, trials), evaluate)
        found = trial.outcome
        words = f"{100 * found.accuracy:.1f} %, {found.latency_ms:.3f} ms" if found else trial.refused
        print(f"{name} {trial.number}: {words}", flush=True)
    return trials.all


def row(name: str, trials: Sequence[Trial], problem: Problem) -> Row:
    """Sums up a strategy's trials."""
    made = {trial.number: trial.outcome for trial in trials if trial.outcome is not None}
    kept = {number: found for number, found in made.items() if problem.excess(found) <= 1}
    best = max(kept, key=lambda number: kept[number].accuracy, default=0)
    return Row(name, kept.get(best), best, sum(trial.seconds for trial in trials))


def table(rows: list[Row], problem: Problem, request: compress.Request, runtime: str) -> str:
    """The page, in Markdown."""
    dense, limit = problem.dense, problem.target.min_speedup
    lines = [
        "# Search strategies",
        "",
        f"{request.model} on {request.data}: the most accurate candidate that is at least {limit:g} x as fast on {runtime} "
        f"as the dense model's fastest fp32 ({dense.latency_ms:.2f} ms), of {problem.trials} trials each, one seed. "
        f"Accuracy is without training, but for the last trial of `auto-compress`, which trains with ADMM; on "
        f"{dense.n_images:,} images held out from the training images, of which the dense model gets "
        f"{100 * dense.accuracy:.1f} % right. Made by `python -m bench.strategies` on {made_on()}.",
        "",
        "| strategy | accuracy | speedup | parameters | found in trial | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        if one.best is None:
            lines.append(f"| `{one.strategy}` | no trial was fast enough | | | | {one.seconds:.0f} |")
            continue
        lines.append(
            f"| `{one.strategy}` | {100 * one.best.accuracy:.1f} % | {dense.latency_ms / one.best.latency_ms:.2f} x | "
            f"{one.best.parameters / 1e6:.2f} M | {one.trial} | {one.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--min-speedup", type=float, default=4.0)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--pruning-epochs", type=float, default=0.05, help="of ADMM, the last trial of auto-compress")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    try:
        page = measured_page(options)
    except CompressError as error:
        parser.exit(1, f"{error}\n")
    print(page)
    write_text(options.out, page)
    print(f"written to {options.out}")


def measured_page(options: argparse.Namespace) -> str:
    """Runs every strategy that `options` name, and makes the page.

    Raises:
        CompressError: a request, target or folder that the search cannot start with.
    """
    request = compress.Request(runtime=options.runtime, pruning_epochs=options.pruning_epochs, threads=options.threads)
    target = Target(min_speedup=options.min_speedup)
    with OneShot(request, open_workload(request), options.work) as oneshot:
        space = Space(
            oneshot.groups, request.channel_multiple, pruners=(request.pruner,), quantizers=(request.quantizer,)
        )
        problem = Problem(space, target, oneshot.dense, options.trials)
        rows = []
        for name in options.strategies:
            # A schedule follows from the number of trials, and every proposal from the target: others are another folder.
            folder = options.work / f"{name}-{options.trials}-{options.min_speedup:g}"
            rows.append(row(name, run(name, problem, oneshot.evaluate, folder), problem))
        return table(rows, problem, request, oneshot.runtime.title)


if __name__ == "__main__":
    main()
