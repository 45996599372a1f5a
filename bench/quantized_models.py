"""Four dense models, trained here on the bundled images, on integers: docs/quantized-models.md.

    python -m bench.quantized_models [MODELS...] [--epochs 8] [--qat-epochs 1] [--threads 1] [--out FILE]

Each model is trained with labels only and kept in runs/bench-quantized. Then it is calibrated, and trained with simulated
rounding, at 8 bits; resnet18 also with 4-bit weights. Accuracy is that of the exported file by ONNX Runtime.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import compress
from bench import made_on
from bench.accuracy import dense_checkpoint
from bench.quantizers import Row, measure
from compress.files import write_text
from compress.stages import steps
from compress.tasks import share
from compress.workload import DEMO_DATA, Workload, open_workload

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
FEW_BITS = {"resnet18": 4}
"""Weight bits that a model is quantized to as well."""
CHECKPOINTS, OUT = Path("runs/bench-quantized"), Path("docs/quantized-models.md")


def request_for(name: str, checkpoint: Path, weight_bits: int, quantizer: str, qat_epochs: float) -> compress.Request:
    return compress.Request(
        model=name,
        checkpoint=str(checkpoint),
        input_size=32,
        pruner="none",
        quantizer=quantizer,
        weight_bits=weight_bits,
        qat_epochs=qat_epochs,
    )


def rows_of(name: str, epochs: float, qat_epochs: float) -> tuple[float, int, list[Row]]:
    """The dense model's accuracy, how many test images gave it, and a row for each quantizer and width."""
    bundled = open_workload(compress.Request())
    checkpoint = dense_checkpoint(
        name, bundled.dataset.train, CHECKPOINTS, epochs=epochs, preprocessing=bundled.preprocessing
    )
    rows: list[Row] = []
    workload: Workload | None = None
    for weight_bits in (8, *((FEW_BITS[name],) if name in FEW_BITS else ())):
        for quantizer in ("ptq", "qat"):
            request = request_for(name, checkpoint, weight_bits, quantizer, qat_epochs)
            workload = workload or open_workload(request)
            rows.append(measure(request, workload, train=quantizer == "qat"))
            print(name, rows[-1], flush=True)
    dense = steps.scorer(workload.dataset.test, workload)(workload.model.eval())
    return dense, len(workload.dataset.test), rows


def lines_of(name: str, dense: float, rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        reached = row.calibrated if row.trained is None else row.trained
        lines.append(
            f"| {name} | {100 * dense:.1f} % | `{row.quantizer}` | {row.weight_bits} / {row.activation_bits} | "
            f"{100 * reached:.1f} % | {100 * (reached - dense):+.1f} | {100 * row.agreement:.2f} % | "
            f"{row.integer_layers} of {row.candidate_layers} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--qat-epochs", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines, tested = [], 0
    for name in options.models:
        dense, tested, rows = rows_of(name, options.epochs, options.qat_epochs)
        lines += lines_of(name, dense, rows)
    interval = share(round(0.92 * tested), tested)
    page = [
        "# Dense models on integers",
        "",
        f"Trained here for {options.epochs:g} epochs on the bundled {DEMO_DATA} images at 32 x 32, not pruned. `ptq` is "
        f"calibrated only; `qat` had {options.qat_epochs:g} epochs, the float model as teacher. Accuracy is that of the "
        f"exported file by ONNX Runtime on {tested:,} test images (about {50 * (interval.high - interval.low):.1f} points "
        "either way, one seed). The first and the last layer keep 8 bits. *Agreement*: top-1 of the file with the "
        f"fake-quantized model. Made by `python -m bench.quantized_models` on {made_on()}.",
        "",
        "| model | float | quantizer | bits: weights / activations | through the file | points | agreement | integer layers |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]
    write_text(options.out, "\n".join(page))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
