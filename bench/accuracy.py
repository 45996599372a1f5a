"""Accuracy after 50 % sparsity and 8 bits on the whole of Fashion-MNIST at 32 pixels, at fixed training budgets.

    python -m bench.accuracy FOLDER [--models resnet18 mobilenet_v2] [--images 18000 60000]

FOLDER holds the four idx.gz files of Fashion-MNIST (Debian's package dataset-fashion-mnist has them). The dense models
are trained here first: resnet18 for 2.5 epochs and mobilenet_v2 for 1.5, and kept beside the runs. `--images` counts
training images after pruning, fine-tuning and quantization-aware training together. Accuracy is that of the deployed
file on the 10,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import compress
from compress import training
from compress.data import dataset
from compress.data.batches import iter_batches
from compress.models import architectures
from compress.preprocessing import Preprocessing

RECIPE = Preprocessing(32, (0.286, 0.286, 0.286), (0.353, 0.353, 0.353))
DENSE_EPOCHS = {"resnet18": 2.5, "mobilenet_v2": 1.5}
QAT_SHARE = 1 / 6
"""Of the budget; the rest is fine-tuning."""


def dense_checkpoint(
    name: str,
    images: dataset.Split,
    out: Path,
    *,
    epochs: float,
    preprocessing: Preprocessing = RECIPE,
) -> Path:
    """Trains the dense model once, with labels only."""
    path = out / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = architectures.build(architectures.fresh(name, 10, preprocessing.input_size))
        training.fit(
            model,
            lambda epoch: iter_batches(images, 64, shuffle=True, seed=epoch, preprocessing=preprocessing),
            len(images) // 64,
            training.TrainingConfig(epochs, 0.05, 0.0, 1.0, optimizer="sgd"),
            progress=lambda done, text: print(f"\r{name}: {text}   ", end=""),
        )
        out.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
        print()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--images", nargs="+", type=int, default=[18_000, 60_000])
    parser.add_argument("--pruner", default="l1-norm")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-accuracy"))
    options = parser.parse_args()
    images = dataset.open_data(str(options.folder), RECIPE, num_classes=10).train
    for name in options.models:
        checkpoint = dense_checkpoint(name, images, options.out, epochs=DENSE_EPOCHS.get(name, 2.0))
        for count in options.images:
            epochs = count / len(images)
            request = compress.Request(
                model=name,
                checkpoint=str(checkpoint),
                data=str(options.folder),
                input_size=32,
                mean=RECIPE.mean,
                std=RECIPE.std,
                pruner=options.pruner,
                finetune_epochs=epochs * (1 - QAT_SHARE),
                qat_epochs=epochs * QAT_SHARE,
            )
            report = compress.run(request, out=options.out / f"{name}-{options.pruner}-{count}")
            hops = ", ".join(f"{hop.name} ({hop.through}) {100 * hop.accuracy:.2f}" for hop in report.ledger)
            print(f"{name}, {count} images: {report.verdict.text}\n  {hops}", flush=True)


if __name__ == "__main__":
    main()
