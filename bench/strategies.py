"""Every search strategy on the bundled model at the same number of trials, against uniform pruning: docs/strategies.md.

    python -m bench.strategies [--strategies uniform amc ...] [--trials 20] [--min-speedup 4] [--work DIR] [--out FILE]

A trial is one candidate, made without training and timed on the runtime. Finished trials are kept in --work and are not
measured again, so that the command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import compress
from bench import made_on
from compress.errors import CompressError
from compress.search.candidate import Candidate
from compress.search.oneshot import OneShot, Outcome
from compress.search.space import Space
from compress.search.strategies import STRATEGIES, Problem
from compress.search.target import Target
from compress.sources import open_source

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


def trials(
    name: str, problem: Problem, evaluate: Callable[[Candidate], Outcome], path: Path
) -> list[tuple[Candidate, Outcome]]:
    """Runs a strategy for `problem.trials`; `path` keeps one JSON line for each trial, and those in it are not repeated."""
    history = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        history = [(Candidate.from_dict(row["candidate"]), Outcome(**row["outcome"])) for row in rows[: problem.trials]]
    strategy, known = STRATEGIES[name](problem), dict(history)
    while len(history) < problem.trials:
        candidate = strategy.propose(history)
        outcome = known[candidate] if candidate in known else evaluate(candidate)
        known[candidate] = outcome
        history.append((candidate, outcome))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"candidate": candidate.as_dict(), "outcome": outcome.as_dict()}) + "\n")
        print(f"{name} {len(history)}: {100 * outcome.accuracy:.1f} %, {outcome.latency_ms:.3f} ms", flush=True)
    return history


def row(name: str, history: list[tuple[Candidate, Outcome]], problem: Problem) -> Row:
    """Sums up a strategy's trials."""
    found = [outcome for _, outcome in history]
    kept = [o for o in found if problem.target.excess(o.latency_ms, o.file_bytes, problem.dense) <= 1]
    best = max(kept, key=lambda outcome: outcome.accuracy, default=None)
    return Row(name, best, found.index(best) + 1 if best else 0, sum(o.seconds for o in dict(history).values()))


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


def _rows(names: list[str], problem: Problem, oneshot: OneShot, work: Path) -> Iterator[Row]:
    for name in names:
        # A schedule follows from the number of trials, and every proposal from the target: others are another file.
        path = work / f"{name}-{problem.trials}-{problem.target.min_speedup:g}.jsonl"
        yield row(name, trials(name, problem, oneshot.evaluate, path), problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--min-speedup", type=float, default=4.0)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--pruning-epochs", type=float, default=0.05, help="of ADMM, the last trial of auto-compress")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        request = compress.Request(runtime=options.runtime, pruning_epochs=options.pruning_epochs)
        target = Target(min_speedup=options.min_speedup)
    except CompressError as error:
        parser.error(str(error))
    options.work.mkdir(parents=True, exist_ok=True)
    with OneShot(request, open_source(request), options.work) as oneshot:
        space = Space(oneshot.groups, request.channel_multiple, (request.pruner,), (request.quantizer,))
        problem = Problem(space, target, oneshot.dense, options.trials)
        rows = list(_rows(options.strategies, problem, oneshot, options.work))
        page = table(rows, problem, request, oneshot.runtime.title)
    print(page)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
