"""The loss ledger: the same test images at every step from the dense model to the deployed file, and what each step cost.

The outputs of each step are kept beside the run (`results.Answers`), so that two steps can be compared image by image: two
models with the same accuracy may still be wrong on different images, and one number hides that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compress import equality
from compress.data.batches import calibration_images, iter_batches
from compress.equality.outputs import Answer, torch_answer
from compress.quantization import LayerSqnr, noisiest, sqnr_by_layer
from compress.report import CrossCheck, Hop, Loss
from compress.runs import Run
from compress.stages.results import (
    BASELINE,
    Answers,
    ExportResult,
    Noise,
    PruneResult,
    QuantizeResult,
    Skipped,
)
from compress.stages.steps import TEST_BATCH
from compress.tasks import Task
from compress.workload import Workload

FIRST = BASELINE
TARGETS = "stages/answers/truth.npy"
"""What is right for each test image: its label, or what the dense model predicts where there are no labels."""
TRACED_IMAGES, TRACED_PIXELS = 32, 2 * 224 * 224
"""Images whose inner values are compared, and pixels of one batch of them."""
CHANCE = 0.05


# ---- taking the answers -------------------------------------------------------------------------------------------


def test_batches(workload: Workload, size: int = TEST_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of the test part in order; synthetic images with label -1 when there are none."""
    data = workload.dataset
    if data.has_images:
        yield from iter_batches(data.test, size, shuffle=False, seed=0, preprocessing=workload.preprocessing)
    else:
        images = calibration_images(data, data.synthetic, workload.preprocessing, seed=1)
        yield from ((chunk, torch.full((len(chunk),), -1)) for chunk in images.split(size))


def answers(
    run: Run,
    workload: Workload,
    name: str,
    through: str,
    answer: Answer,
    batch_size: int = TEST_BATCH,
    limit: int | None = None,
) -> Answers:
    """The test images, or about the first `limit` of them, through `answer`, with their score."""
    parts: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for images, targets in test_batches(workload, batch_size):
        parts.append(answer(images.numpy()))
        labels.append(targets.numpy())
        if limit is not None and sum(map(len, labels)) >= limit:
            break
    outputs = np.concatenate(parts)
    path = run.folder / "stages" / "answers" / f"{name.replace(' ', '-')}-{through}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, outputs.astype(np.float32))
    if name == FIRST:
        has_labels = workload.dataset.has_labels
        np.save(run.folder / TARGETS, np.concatenate(labels) if has_labels else workload.task.predictions(outputs))
    score = workload.task.score(outputs, np.load(run.folder / TARGETS)[: len(outputs)])
    return Answers(
        name=name,
        through=through,
        accuracy=score.value,
        accuracy_ci95=(score.low, score.high),
        n=score.n,
        answers=str(path.relative_to(run.folder)),
    )


def torch_answers(run: Run, workload: Workload, name: str, model: nn.Module) -> Answers:
    return answers(run, workload, name, "torch", torch_answer(model))


def traced(images: Tensor) -> tuple[Tensor, ...]:
    """Few of `images` [N, 3, H, W], in small batches: every tensor inside the model is looked at, and held for one batch."""
    size = images.shape[-1]
    count = TRACED_IMAGES if size <= 96 else TRACED_IMAGES // 4
    batches: tuple[Tensor, ...] = images[:count].split(max(1, TRACED_PIXELS // size**2))
    return batches


def noise(rows: Sequence[LayerSqnr]) -> Noise:
    """The noise of each layer, and the stretch of the model that makes most of it."""
    worst = noisiest(rows)
    return Noise(layers=sqnr_by_layer(rows), noisiest=worst.name, noisiest_db=worst.sqnr_db)


# ---- reading it ---------------------------------------------------------------------------------------------------


def collect(folder: Path, task: Task, in_torch: Sequence[Answers], of_files: Sequence[Answers]) -> tuple[Hop, ...]:
    """Every step beside the one that it came from.

    In torch that is the step before. A file comes from the last torch model when it is first seen, through ONNX Runtime;
    later steps of the same name are the same file on other runtimes, and are compared with the first.
    """
    targets = np.load(folder / TARGETS)
    previous: Answers | None = None
    hops = []
    for row in in_torch:
        hops.append(_beside(folder, task, row, previous, targets))
        previous = row
    files: dict[str, Answers] = {}
    for row in of_files:
        hops.append(_beside(folder, task, row, files.get(row.name, previous), targets))
        files.setdefault(row.name, row)
    return tuple(hops)


def cross_checks(folder: Path, task: Task, rows: Sequence[Answers]) -> tuple[CrossCheck, ...]:
    """One file on every runtime that has answered with it, each pair compared."""
    targets = np.load(folder / TARGETS)
    return tuple(
        _cross_check(task, first, second, np.load(folder / first.answers), np.load(folder / second.answers), targets)
        for first, second in combinations(rows, 2)
        if first.name == second.name
    )


def loss(hops: Sequence[Hop], layers: Mapping[tuple[str, str], tuple[str, str]]) -> Loss:
    """The step that turned most answers from right to wrong, and the layer behind it, in one sentence.

    Args:
        hops: the first is the baseline.
        layers: of `attribute_loss`.

    A loss is told from chance by the exact one-sided sign test on the answers that changed (McNemar 1947).
    """
    worst = max(hops[1:], key=lambda row: (_lost(row) - _gained(row)) / row.n, default=None)
    if worst is None or _lost(worst) <= _gained(worst):
        text = "No step lost answers: none turned more of them wrong than right."
        return Loss(text=text, hop=None, through=None, layer=None)
    layer, measured = layers.get((worst.name, worst.through), (None, ""))
    lost, gained = _lost(worst), _gained(worst)
    net = 100 * (lost - gained) / worst.n
    where = f"{worst.name} ({worst.through})"
    flips = f"{lost:,} of {worst.n:,} answers turned wrong there and {gained:,} right ({net:.1f} points)"
    chance = _sign_test(lost, gained) >= CHANCE
    text = f"Most was lost at {where}: {flips}" + (", no more than chance explains" if chance else "")
    text += f"; its worst layer is {layer}, whose output {measured}." if layer else "."
    return Loss(text=text, hop=worst.name, through=worst.through, layer=layer)


def attribute_loss(
    pruned: PruneResult | Skipped, quantized: QuantizeResult | Skipped, exported: ExportResult
) -> dict[tuple[str, str], tuple[str, str]]:
    """(step's name, through) -> (the layer that did most harm there, what was measured of it), where a stage could tell."""
    layers: dict[tuple[str, str], tuple[str, str]] = {}
    if isinstance(pruned, PruneResult) and pruned.refits:
        worst = max(pruned.refits, key=lambda refit: refit.error_after)
        for row in pruned.ledger:
            layers[row.name, row.through] = worst.layer, f"is {100 * worst.error_after:.2g} % off the original's"
    if isinstance(quantized, QuantizeResult):
        for row in quantized.ledger:
            layers[row.name, row.through] = _noisy(quantized.noise)
    for file, file_noise in exported.noise.items():
        layers[file, "onnxruntime"] = _noisy(file_noise)
    return layers


def _noisy(found: Noise) -> tuple[str, str]:
    return found.noisiest, f"has a local SQNR of {found.noisiest_db:.1f} dB"


def _beside(folder: Path, task: Task, row: Answers, previous: Answers | None, targets: np.ndarray) -> Hop:
    kept = row.model_dump(include={"name", "through", "accuracy", "accuracy_ci95", "n"})
    if previous is None:
        return Hop(**kept, previous=None, agreement_with_previous=None, lost=None, gained=None)
    before, after = (np.load(folder / one.answers)[: row.n] for one in (previous, row))
    right_before, right_after = (task.correct(outputs, targets[: row.n]) for outputs in (before, after))
    return Hop(
        **kept,
        previous=f"{previous.name}, {previous.through}",
        agreement_with_previous=task.agreement(before, after),
        lost=int((right_before & ~right_after).sum()),
        gained=int((~right_before & right_after).sum()),
    )


def _cross_check(
    task: Task, first: Answers, second: Answers, outputs: np.ndarray, others: np.ndarray, targets: np.ndarray
) -> CrossCheck:
    n = min(len(outputs), len(others))
    outputs, others = outputs[:n], others[:n]
    different = round(n * (1 - task.agreement(outputs, others)))
    shares = [100 * task.score(one, targets[:n]).value for one in (outputs, others)]
    agrees = equality.same(outputs, others, task)
    text = (
        f"{first.name} on {first.through} and {second.through}: {different:,} of {n:,} images get different "
        f"classes, {shares[0]:.2f} and {shares[1]:.2f} % of the answers are right."
    )
    if not agrees:
        text += f" Allowed is {equality.QUANTIZED_RULE}.{equality.saturation()}"
    return CrossCheck(
        file=first.name,
        first=first.through,
        second=second.through,
        n=n,
        different=different,
        accuracy_difference_points=shares[1] - shares[0],
        agrees=agrees,
        text=text,
    )


def _lost(row: Hop) -> int:
    return row.lost or 0


def _gained(row: Hop) -> int:
    return row.gained or 0


def _sign_test(lost: int, gained: int) -> float:
    """Chance of at least `lost` among the changed answers if each were as likely to be lost as gained."""
    n = lost + gained
    total = math.lgamma(n + 1) - n * math.log(2)
    return sum(math.exp(total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(lost, n + 1))
