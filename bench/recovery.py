"""What brings accuracy back after pruning 50 % of resnet18's channels, judged on training images that nothing was trained on.

    python -m bench.recovery FOLDER [--images 18000]

FOLDER holds the four idx.gz files of Fashion-MNIST. Of its 60,000 training images 10,000 are held out; the dense model is
trained on the other 50,000 for 3 epochs. `--images` is what each fine-tuning sees. The defaults of a request were chosen
by this table; test images are never opened.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bench.accuracy import RECIPE, dense_checkpoint
from compress import pruning, training
from compress.checkpoints.reader import read
from compress.data import dataset
from compress.data.batches import iter_batches, normalise, split_held_out
from compress.models import architectures
from compress.pruning.reconstruction import reconstruct

HELD_OUT = 10_000


@dataclass(frozen=True)
class Trial:
    name: str
    refit: bool = True
    train: bool = True
    augment: bool = False
    recipe: training.TrainingConfig = training.TrainingConfig(0, 0.001, 0.5, 4.0)


TRIALS = (
    Trial("BatchNorm re-estimated, nothing else", refit=False, train=False),
    Trial("refitted by least squares, nothing else", train=False),
    Trial("fine-tuned without the refit", refit=False),
    Trial("refitted, then fine-tuned: the default"),
    Trial("the same with shifts and flips", augment=True),
    Trial("the same with 0.9 of the loss from the teacher", recipe=training.TrainingConfig(0, 0.001, 0.9, 4.0)),
    Trial("the same at twice the learning rate", recipe=training.TrainingConfig(0, 0.002, 0.5, 4.0)),
    Trial("the same with SGD at 0.01", recipe=training.TrainingConfig(0, 0.01, 0.5, 4.0, optimizer="sgd")),
)


def accuracy(model: nn.Module, split: dataset.Split) -> float:
    right = 0
    with torch.no_grad():
        for images, labels in iter_batches(split, 500, shuffle=False, seed=0, preprocessing=RECIPE):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(split)


def recovered(trial: Trial, dense: nn.Module, shrunk: pruning.PrunedModel, images: dataset.Split, count: int) -> nn.Module:
    model = copy.deepcopy(shrunk.model)
    shown = normalise(images.take(torch.arange(1024), RECIPE), RECIPE)
    reconstruct(model, dense, shrunk.kept_channels, shown, weights=trial.refit)
    if trial.train:
        training.fit(
            model,
            lambda epoch: iter_batches(
                images, 64, shuffle=True, seed=epoch, augment=trial.augment, preprocessing=RECIPE
            ),
            len(images) // 64,
            replace(trial.recipe, epochs=count / len(images)),
            teacher=dense,
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=18_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-recovery"))
    options = parser.parse_args()
    held_out, images = split_held_out(
        dataset.open_data(str(options.folder), RECIPE, num_classes=10).train, HELD_OUT, seed=0
    )
    path = dense_checkpoint("resnet18", images, options.out, epochs=3.0)
    dense = architectures.load(architectures.fresh("resnet18", 10, RECIPE.input_size), read(path)).eval()
    example = torch.zeros(1, 3, RECIPE.input_size, RECIPE.input_size)
    shrunk = pruning.prune(dense, example, pruning.plan(dense, example, sparsity=0.5), "l1-norm")
    print(f"dense {100 * accuracy(dense, held_out):.2f} % of {HELD_OUT:,} held-out training images; pruned 50 %:")
    for trial in TRIALS:
        started = time.perf_counter()
        model = recovered(trial, dense, shrunk, images, options.images)
        seconds = time.perf_counter() - started
        print(f"{trial.name:<50} {100 * accuracy(model, held_out):>6.2f} % {seconds:>6.0f} s", flush=True)


if __name__ == "__main__":
    main()
