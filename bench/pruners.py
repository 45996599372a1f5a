"""Every pruner on the bundled model and images, at one sparsity and one training budget: docs/pruners.md.

    python -m bench.pruners [--pruners l1-norm agp ...] [--pruning-epochs 0.5] [--finetune-epochs 1] [--out FILE]

Such a table is read to choose a pruner, so accuracy is that on 2,000 training images held out here, which no pruner and
no training sees. "Pruned" is right after pruning and the refit by least squares; "fine-tuned" after the same
fine-tuning for each. The pruners that train have had --pruning-epochs more, which the seconds show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import compress
from bench import made_on
from compress import pruning, training
from compress.data import dataset
from compress.data.batches import split_held_out
from compress.errors import CompressError
from compress.stages import steps
from compress.tasks import share
from compress.workload import Workload, open_workload

HELD_OUT = 2000
OUT = Path("docs/pruners.md")


@dataclass(frozen=True)
class Row:
    pruner: str
    pruned: float
    fine_tuned: float
    parameters: int
    """Numbers that are not zero."""
    pruning_seconds: float
    fine_tuning_seconds: float


def measure(name: str, request: compress.Request, workload: Workload, held_out: dataset.Split) -> Row:
    """Prunes, refits and fine-tunes a copy of the model of `workload`."""
    request = request.model_copy(update={"pruner": name})
    score = steps.scorer(held_out, workload)
    start = time.perf_counter()
    plan = steps.pruning_plan(request, workload.model, workload.example)
    if request.shrinks:
        how = steps.pruning_training(request, workload, workload.model, lambda done, text: None)
        shrunk = pruning.prune(workload.model, workload.example, plan, name, how)
        model, kept = shrunk.model, shrunk.kept_channels
    else:
        model, kept = pruning.zero_weights(workload.model, plan, request.sparsity).model, {}
    steps.refit(request, workload, workload.model, model, kept)
    pruned_after = time.perf_counter() - start
    pruned = score(model.to(training.device()).eval())
    start = time.perf_counter()
    _fine_tune(model.cpu(), request, workload)
    seconds = time.perf_counter() - start
    count = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    return Row(name, pruned, score(model.to(training.device()).eval()), count, pruned_after, seconds)


def _fine_tune(model: nn.Module, request: compress.Request, workload: Workload) -> None:
    images = steps.training_images(request, workload)
    recipe = steps.training_config(request, workload, request.finetune_epochs, request.learning_rate)
    training.fit(
        model,
        images.batches,
        images.per_epoch,
        recipe,
        teacher=workload.model,
        keep_zeros=not request.shrinks,
    )


def table(rows: list[Row], dense: float, request: compress.Request, images: int) -> str:
    """The page, in Markdown."""
    half = 100 * (share(round(dense * HELD_OUT), HELD_OUT).high - dense)
    lines = [
        "# Pruners",
        "",
        f"{request.model} on {request.data}, {100 * request.sparsity:g} % removed, then fine-tuning for {request.finetune_epochs:g} x "
        f"{images:,} training images; pruners that look at images or train had {request.pruning_epochs:g} x as many for it. "
        f"Accuracy is on {HELD_OUT:,} held-out training images (about {half:.1f} points either way, one seed); the dense "
        f"model reaches {100 * dense:.1f} %, and was itself trained on these images. Made by `python -m bench.pruners` "
        f"on {made_on()}.",
        "",
        "| pruner | what it does | needs | pruned | fine-tuned | parameters not zero | seconds to prune | to fine-tune |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pruner = pruning.PRUNERS[row.pruner]
        lines.append(
            f"| `{row.pruner}` | {pruner.summary} | {pruner.needs_data} | {100 * row.pruned:.1f} % | "
            f"{100 * row.fine_tuned:.1f} % | {row.parameters / 1e6:.2f} M | {row.pruning_seconds:.0f} | "
            f"{row.fine_tuning_seconds:.0f} |"
        )
    lines += ["", "Papers:", ""]
    lines += [f"- `{row.pruner}`: {pruning.PRUNERS[row.pruner].paper}" for row in rows]
    return "\n".join(lines) + "\n"


def _rows(names: list[str], request: compress.Request, workload: Workload, held_out: dataset.Split) -> Iterator[Row]:
    for name in names:
        row = measure(name, request, workload, held_out)
        print(
            f"{name}: pruned {row.pruned:.4f}, fine-tuned {row.fine_tuned:.4f}, {row.pruning_seconds:.0f} s", flush=True
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruners", nargs="+", default=list(pruning.PRUNERS), choices=list(pruning.PRUNERS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pruning-epochs", type=float, default=0.5)
    parser.add_argument("--finetune-epochs", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=None, help="training images; default all that are not held out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        request = compress.Request(
            sparsity=options.sparsity,
            pruning_epochs=options.pruning_epochs,
            finetune_epochs=options.finetune_epochs,
        )
    except CompressError as error:
        parser.error(str(error))
    workload = open_workload(request)
    held_out, rest = split_held_out(workload.dataset.train, HELD_OUT, request.seed)
    trained = rest.subset(torch.arange(len(rest))[: options.images])
    workload = replace(workload, dataset=replace(workload.dataset, train=trained))
    dense = steps.scorer(held_out, workload)(workload.model.to(training.device()).eval())
    workload.model.cpu()
    rows = list(_rows(options.pruners, request, workload, held_out))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(table(rows, dense, request, len(trained)), encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
