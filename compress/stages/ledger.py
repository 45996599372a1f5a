"""The loss ledger: the same test images at every step from the dense model to the deployed file, and what each step cost.

A hop is one step. Its answers are kept beside the run, so that two hops can be compared image by image: two models with
the same accuracy may still be wrong on different images, and one number hides that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import equality
from compress.data.batches import calibration_images, iter_batches
from compress.equality import differences
from compress.quantization import LayerSqnr, noisiest, sqnr_by_layer
from compress.report import CrossCheck, Hop, Loss
from compress.runs import Run
from compress.stages.steps import TEST_BATCH
from compress.workload import Workload

Facts = dict[str, Any]

FIRST = "baseline"
TORCH_STAGES = ("baseline", "prune", "finetune", "quantize")
"""Stages whose hops stand one behind the other; one that left the model as it was has none."""
TRUTH = "stages/answers/truth.npy"
"""The right answer of each test image: its label, or what the baseline answers where there are no labels."""
TRACED_IMAGES, TRACED_PIXELS = 32, 2 * 224 * 224
"""Images whose inner values are compared, and pixels of one batch of them."""
REBUILT_IMAGES = 16
CHANCE = 0.05


# ---- taking a hop -------------------------------------------------------------------------------------------------


def test_batches(workload: Workload, size: int = TEST_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of the test part in order; synthetic images with label -1 when there are none."""
    if workload.dataset.kind == "none":
        images = calibration_images(workload.dataset, workload.dataset.synthetic, workload.preprocessing, seed=1)
        yield from ((chunk, torch.full((len(chunk),), -1)) for chunk in images.split(size))
    else:
        yield from iter_batches(
            workload.dataset.test, size, shuffle=False, seed=0, preprocessing=workload.preprocessing
        )


def hop(
    work: Run,
    workload: Workload,
    name: str,
    through: str,
    answer: differences.Answer,
    batch_size: int = TEST_BATCH,
    limit: int | None = None,
) -> Facts:
    """The test images, or about the first `limit` of them, through `answer`, with the share of right answers."""
    logits: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for images, truth in test_batches(workload, batch_size):
        logits.append(answer(images.numpy()))
        labels.append(truth.numpy())
        if limit is not None and sum(map(len, labels)) >= limit:
            break
    answers = np.concatenate(logits)
    path = work.folder / "stages" / "answers" / f"{name.replace(' ', '-')}-{through}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, answers.astype(np.float32))
    if name == FIRST:
        right = np.concatenate(labels) if workload.dataset.kind == "labelled" else answers.argmax(1)
        np.save(work.folder / TRUTH, right)
    score = differences.accuracy(answers, np.load(work.folder / TRUTH)[: len(answers)])
    return {
        "name": name,
        "through": through,
        "accuracy": score.value,
        "accuracy_ci95": [score.low, score.high],
        "n": score.n,
        "answers": str(path.relative_to(work.folder)),
    }


def torch_hop(work: Run, workload: Workload, name: str, model: nn.Module) -> Facts:
    return hop(work, workload, name, "torch", differences.torch_answer(model))


def traced(images: Tensor) -> tuple[Tensor, ...]:
    """Few of `images`, in small batches: every tensor inside the model is looked at, and held for one batch."""
    size = images.shape[-1]
    count = TRACED_IMAGES if size <= 96 else TRACED_IMAGES // 4
    return images[:count].split(max(1, TRACED_PIXELS // size**2))


def noise_facts(noise: Sequence[LayerSqnr]) -> Facts:
    """Local noise as a stage keeps it: `layers` in decibels, and the stretch that makes most of it."""
    worst = noisiest(noise)
    return {"layers": sqnr_by_layer(noise), "noisiest": worst.name, "noisiest_db": worst.sqnr_db}


# ---- reading it ---------------------------------------------------------------------------------------------------


def collect(folder: Path, facts: Mapping[str, Facts]) -> tuple[Hop, ...]:
    """Every hop beside the one that it came from.

    In torch that is the hop before. A file comes from the last torch model when it is first seen, through ONNX Runtime;
    later hops of the same name are the same file on other runtimes, and are compared with the first.
    """
    rows = [(row, stage != "measure") for stage in (*TORCH_STAGES, "measure") for row in facts[stage]["ledger"]]
    truth = np.load(folder / TRUTH)
    last: Facts | None = None
    files: dict[str, Facts] = {}
    hops = []
    for row, in_torch in rows:
        hops.append(_beside(folder, row, last if in_torch else files.get(row["name"], last), truth))
        if in_torch:
            last = row
        else:
            files.setdefault(row["name"], row)
    return tuple(hops)


def hop_after(facts: Mapping[str, Facts], stage: str) -> Facts:
    """The hop of the model as it is after `stage`, one of `TORCH_STAGES`: of the last stage up to there that changed it."""
    stages = TORCH_STAGES[: TORCH_STAGES.index(stage) + 1]
    return [row for name in stages for row in facts[name]["ledger"]][-1]


def rebuilt(work: Run, workload: Workload, stage: str, model: nn.Module) -> Facts:
    """The hand-off from the model as it was after `stage`, one of `TORCH_STAGES`, to `model`, rebuilt from its files: the
    first test images, which the ledger has the answers to.

    Raises `HandoffError` when they answer differently.
    """
    before = TORCH_STAGES[: TORCH_STAGES.index(stage) + 1]
    found = hop_after({name: work.facts(name) for name in before}, stage)
    images = next(test_batches(workload, REBUILT_IMAGES))[0]
    expected = np.load(work.folder / found["answers"])[: len(images)]
    got = differences.torch_answer(model)(images.numpy())
    names = f"{found['name']}, torch", f"{found['name']}, saved and rebuilt"
    if stage == "quantize":
        return equality.checked(equality.judge_grids(*names, expected, got))
    return equality.same_function(*names, expected, got)


def cross_checks(folder: Path, rows: Sequence[Facts]) -> tuple[CrossCheck, ...]:
    """The hops of one file on every runtime that has answered with it, each pair compared."""
    truth = np.load(folder / TRUTH)
    return tuple(
        _cross_check(first, second, *(np.load(folder / row["answers"]) for row in (first, second)), truth)
        for first, second in combinations(rows, 2)
        if first["name"] == second["name"]
    )


def loss(hops: Sequence[Hop], blame: Mapping[tuple[str, str], tuple[str, str]]) -> Loss:
    """The hop that turned most answers from right to wrong, and the layer behind it, in one sentence.

    Args:
        hops: the first is the baseline.
        blame: (hop's name, through) -> the layer that did most harm there, and what was measured of it.

    A loss is told from chance by the exact one-sided sign test on the answers that changed (McNemar 1947).
    """
    worst = max(hops[1:], key=lambda row: (_lost(row) - _gained(row)) / row.n, default=None)
    if worst is None or _lost(worst) <= _gained(worst):
        text = "No step lost answers: none turned more of them wrong than right."
        return Loss(text=text, hop=None, through=None, layer=None)
    layer, measured = blame.get((worst.name, worst.through), (None, ""))
    lost, gained = _lost(worst), _gained(worst)
    net = 100 * (lost - gained) / worst.n
    where = f"{worst.name} ({worst.through})"
    flips = f"{lost:,} of {worst.n:,} answers turned wrong there and {gained:,} right ({net:.1f} points)"
    chance = _sign_test(lost, gained) >= CHANCE
    text = f"Most was lost at {where}: {flips}" + (", no more than chance explains" if chance else "")
    text += f"; its worst layer is {layer}, whose output {measured}." if layer else "."
    return Loss(text=text, hop=worst.name, through=worst.through, layer=layer)


def blame(facts: Mapping[str, Facts]) -> dict[tuple[str, str], tuple[str, str]]:
    """(hop's name, through) -> (layer, what was measured of it), where a stage could tell."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    refits = facts["prune"]["refits"]
    for row in facts["prune"]["ledger"] if refits else ():
        worst = max(refits, key=lambda refit: refit["error_after"])
        found[row["name"], row["through"]] = (
            worst["layer"],
            f"is {100 * worst['error_after']:.2g} % off the original's",
        )
    for row in facts["quantize"]["ledger"]:
        found[row["name"], row["through"]] = _noisy(facts["quantize"]["noise"])
    for file, noise in facts["export"]["noise"].items():
        found[file, "onnxruntime"] = _noisy(noise)
    return found


def _noisy(noise: Facts) -> tuple[str, str]:
    return noise["noisiest"], f"has a local SQNR of {noise['noisiest_db']:.1f} dB"


def _beside(folder: Path, row: Facts, previous: Facts | None, truth: np.ndarray) -> Hop:
    kept = {key: row[key] for key in ("name", "through", "accuracy", "accuracy_ci95", "n")}
    if previous is None:
        return Hop(**kept, previous=None, agreement_with_previous=None, lost=None, gained=None)
    before, after = (np.load(folder / hop["answers"])[: row["n"]].argmax(1) for hop in (previous, row))
    right = truth[: row["n"]]
    return Hop(
        **kept,
        previous=f"{previous['name']}, {previous['through']}",
        agreement_with_previous=float((before == after).mean()),
        lost=int(((before == right) & (after != right)).sum()),
        gained=int(((before != right) & (after == right)).sum()),
    )


def _cross_check(first: Facts, second: Facts, answers: np.ndarray, others: np.ndarray, truth: np.ndarray) -> CrossCheck:
    n = min(len(answers), len(others))
    answers, others, right = answers[:n], others[:n], truth[:n]
    different = int((answers.argmax(1) != others.argmax(1)).sum())
    shares = [100 * float((logits.argmax(1) == right).mean()) for logits in (answers, others)]
    agrees = equality.same(answers, others)
    text = (
        f"{first['name']} on {first['through']} and {second['through']}: {different:,} of {n:,} images get different "
        f"classes, {shares[0]:.2f} and {shares[1]:.2f} % of the answers are right."
    )
    if not agrees:
        text += f" Allowed is {equality.QUANTIZED_RULE}.{equality.saturation()}"
    return CrossCheck(
        file=first["name"],
        first=first["through"],
        second=second["through"],
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
