"""Every quantizer on the bundled model and images, at 8 and at 4 bits with one budget: docs/quantizers.md.

    python -m bench.quantizers [--quantizers qat lsq ...] [--bits 8 4] [--epochs 0.5] [--learning-rate 0.0001] [--out FILE]

The dense model is quantized, exported and run by ONNX Runtime as deployed, on the 2,000 bundled test images; the first
and the last layer keep 8 bits. Post-training quantization appears once for each calibration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import compress
from bench import made_on
from compress import onnx_export, quantization, training
from compress.data.batches import calibration_images, iter_batches
from compress.engines import RUNTIMES, BuildSpec
from compress.equality import outputs
from compress.files import write_text
from compress.methods.quantizers import QUANTIZERS
from compress.stages import steps
from compress.tasks import CLASSIFICATION, share
from compress.workload import Workload, open_workload

OUT = Path("docs/quantizers.md")
RUNTIME = "onnxruntime"
NEAREST_BITS = {"dorefa": {8: 7}, "bnn": {8: 1, 4: 1}}
"""Weight bits where a quantizer does not take those of the column."""


@dataclass(frozen=True)
class Row:
    quantizer: str
    calibration: str
    weight_bits: int
    activation_bits: int
    calibrated: float
    """Accuracy before any training, through the deployed file."""
    trained: float | None
    """The same after training; None where nothing trains."""
    agreement: float
    """Top-1 of the deployed file with the fake-quantized model."""
    integer_layers: int
    candidate_layers: int
    seconds: float


def measure(request: compress.Request, workload: Workload, train: bool) -> Row:
    """One quantizer on a copy of the model of `workload`."""
    start = time.perf_counter()
    calibrated = _deployed(_quantized(request, workload, train=False), workload)
    result, trained = calibrated, None
    if train and QUANTIZERS[request.quantizer].trains:
        result = _deployed(_quantized(request, workload, train=True), workload)
        trained = result.accuracy
    return Row(
        request.quantizer,
        request.calibration,
        request.weight_bits,
        request.activation_bits,
        calibrated.accuracy,
        trained,
        result.agreement,
        result.integer_layers,
        result.candidate_layers,
        time.perf_counter() - start,
    )


def _quantized(request: compress.Request, workload: Workload, train: bool) -> quantization.Quantized:
    images = calibration_images(workload.dataset, request.calibration_images, workload.preprocessing, request.seed)
    prepared, plan = steps.prepared_with_bits(request, workload.model, images)

    def fit(model: nn.Module) -> None:
        trained_on = steps.training_images(request, workload)
        recipe = steps.training_config(request, workload, request.qat_epochs, request.qat_learning_rate)
        training.fit(model, trained_on.batches, trained_on.per_epoch, recipe, teacher=workload.model)

    return quantization.quantize(
        prepared,
        plan,
        quantizer=request.quantizer,
        estimator=request.calibration,
        calibration=images.split(steps.TEST_BATCH),
        train=fit if train else None,
    )


@dataclass(frozen=True)
class Deployed:
    accuracy: float
    agreement: float
    integer_layers: int
    candidate_layers: int


def _deployed(quantized: quantization.Quantized, workload: Workload) -> Deployed:
    size, runtime = workload.preprocessing.input_size, RUNTIMES[RUNTIME]
    reference = outputs.torch_answer(quantization.fake_quantized(quantized, runtime.flavour))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_export.export_flavours(quantized, {runtime.flavour: path}, input_size=size)
        spec = BuildSpec(size, static=False, threads=torch.get_num_threads())
        with runtime.load(path, spec) as session:
            kernels = session.kernels()
            answers, expected, labels = [], [], []
            for images, truth in iter_batches(
                workload.dataset.test, steps.TEST_BATCH, shuffle=False, seed=0, preprocessing=workload.preprocessing
            ):
                answers.append(session.run(images.numpy()))
                expected.append(reference(images.numpy()))
                labels.append(truth.numpy())
    found, wanted = np.concatenate(answers), np.concatenate(expected)
    return Deployed(
        CLASSIFICATION.score(found, np.concatenate(labels)).value,
        CLASSIFICATION.compare(wanted, found).top1_agreement,
        sum(kernel.precision == "int8" for kernel in kernels),
        len(kernels),
    )


def requests(quantizers: list[str], bits: list[int], **options: float) -> Iterator[compress.Request]:
    """One request for each row of the page."""
    for activation_bits in bits:
        for name in quantizers:
            weight_bits = NEAREST_BITS.get(name, {}).get(activation_bits, activation_bits)
            for estimator in quantization.ESTIMATORS if name == "ptq" else ("average",):
                yield compress.Request(
                    pruner="none",
                    quantizer=name,
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    calibration=estimator,
                    **options,
                )


def table(rows: list[Row], dense: float, request: compress.Request, tested: int, images: int) -> str:
    """The page, in Markdown."""
    interval = share(round(dense * tested), tested)
    half = 50 * (interval.high - interval.low)
    lines = [
        "# Quantizers",
        "",
        f"{request.model} on {request.data}, not pruned. Those that train had {request.qat_epochs:g} x {images:,} images at a "
        f"peak learning rate of {request.qat_learning_rate:g}, the original as teacher. Accuracy is that of the exported file "
        f"by ONNX Runtime on {tested:,} test images (about {half:.1f} points either way, one seed); the float model "
        f"reaches {100 * dense:.1f} %. The first and the last layer keep 8 bits. *Agreement*: of the file with the "
        f"fake-quantized model. Made by `python -m bench.quantizers` on {made_on()}.",
        "",
        "| quantizer | calibration | bits: weights / activations | calibrated | trained | agreement | integer layers | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trained = f"{100 * row.trained:.1f} %" if row.trained is not None else "does not train"
        lines.append(
            f"| `{row.quantizer}` | {row.calibration} | {row.weight_bits} / {row.activation_bits} | "
            f"{100 * row.calibrated:.1f} % | {trained} | {100 * row.agreement:.2f} % | "
            f"{row.integer_layers} of {row.candidate_layers} | {row.seconds:.0f} |"
        )
    names = dict.fromkeys(row.quantizer for row in rows)
    lines += ["", "What they do, and where they are from:", ""]
    for name in names:
        quantizer = QUANTIZERS[name]
        lines.append(f"- `{name}`: {quantizer.summary} {quantizer.note} <{quantizer.paper}>".replace("  ", " "))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], choices=range(2, 9))
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = list(
        requests(options.quantizers, options.bits, qat_epochs=options.epochs, qat_learning_rate=options.learning_rate)
    )
    workload = open_workload(wanted[0])
    dense = steps.scorer(workload.dataset.test, workload)(workload.model.eval())
    rows = []
    for request in wanted:
        rows.append(row := measure(request, workload, train=options.epochs > 0))
        print(row, flush=True)
    trained_on = len(steps.training_images(wanted[0], workload).held_out)
    images = len(workload.dataset.train) - trained_on
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, table(rows, dense, wanted[0], len(workload.dataset.test), images))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
