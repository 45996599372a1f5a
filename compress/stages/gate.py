"""Does the model work on its own data, and as well as it can? Asked before anything is spent.

A wrong input size, normalisation or class order looks like a bad model. Each common alternative is tried on a few
training images; one that looks better is confirmed on more, by McNemar's exact test of the images on which the two
disagree. Test images are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import nn

from compress import memory
from compress.data.batches import normalise
from compress.data.dataset import Dataset, Split
from compress.data.images import to_pixels
from compress.errors import BaselineError
from compress.models.counting import count_macs
from compress.preprocessing import Preprocessing
from compress.tasks import CLASSIFICATION

SAMPLE, MIN_SAMPLE, SAMPLE_MACS = 512, 96, 8e10
"""Images that the baseline is scored on: as many as this many multiply-accumulates pay for, between the two bounds."""
SCREEN, MIN_SCREEN, SCREEN_MACS = 96, 24, 8e9
"""The same for the first look at an alternative."""
MARGIN = 0.05
"""An alternative counts from this many more right answers (fraction of the images) ..."""
SIGNIFICANCE = 1e-3
"""... that would be this unlikely if both were equally good; also the limit for better than guessing."""
CONVINCING = 0.7
"""Accuracy from which another class order alone explains the answers, so that no other input is tried."""
MIN_PER_CLASS = 8
"""Images per class from which an unknown order of the classes is looked for."""
SIZES = (28, 32, 64, 96, 128, 160, 192, 224, 256)
FEW_SIZES = (32, 64, 128, 224)
NORMALISATIONS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "-1 to 1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0 to 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "0 to 255": ((0.0, 0.0, 0.0), (0.00392157, 0.00392157, 0.00392157)),
}


@dataclass(frozen=True)
class Alternative:
    """Another way to feed the model that was tried."""

    flags: str
    """What to write on the command line for it."""
    accuracy: float | None
    """0..1 on `n_images`; None when the model does not take such input."""
    baseline_accuracy: float
    """Of the request, on the same images."""
    n_images: int


@dataclass(frozen=True)
class BaselineCheck:
    """The model as requested on a sample of its training images."""

    accuracy: float
    """0..1"""
    chance: float
    """What always answering the commonest class would score."""
    n_images: int
    alternatives: tuple[Alternative, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gate(model: nn.Module, dataset: Dataset, preprocessing: Preprocessing, *, seed: int) -> BaselineCheck:
    """Score a labelled dataset's training images as requested, and look for something clearly better.

    Raises:
        BaselineError: near chance, or another input size, normalisation or class order is clearly better; the sentence
            has both figures and the flags to use.
    """
    if not dataset.has_labels:
        raise BaselineError("The baseline can only be scored on labelled images: give class folders.")
    was_training = [module for module in model.modules() if module.training]
    try:
        return _Gate(model.eval(), dataset.train, dataset.class_names, preprocessing, seed).check()
    finally:
        for module in was_training:
            module.training = True


@dataclass(frozen=True)
class _Order:
    """Another order of the classes that fits the answers clearly better."""

    outputs: np.ndarray
    """int64 [classes]: the output that each class seems to be."""
    accuracy: float
    baseline_accuracy: float
    n_images: int


class _Gate:
    def __init__(
        self, model: nn.Module, split: Split, class_names: tuple[str, ...], requested: Preprocessing, seed: int
    ) -> None:
        self.model, self.split, self.class_names, self.requested = model, split, class_names, requested
        self.order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        try:
            self.macs = max(1, count_macs(model, requested.input_size))
        except Exception as error:  # what a model raises on an input size that it does not take is its author's choice
            raise BaselineError(
                f"The model does not take images of {requested.input_size} pixels: give the --input-size it was made for."
            ) from error
        self.tried: list[Alternative] = []
        self.known: dict[Preprocessing, np.ndarray] = {}
        self.own: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def check(self) -> BaselineCheck:
        n = self.affordable([self.requested], SAMPLE, MIN_SAMPLE, SAMPLE_MACS)
        labels, answers = self.labels(n), self.answers(self.requested, n)
        assert answers is not None
        accuracy, chance = float((answers == labels).mean()), np.bincount(labels).max() / n
        near_chance = binom.sf((answers == labels).sum() - 1, n, chance) > SIGNIFICANCE
        order = self.best_order(labels, answers)
        if order is not None and order.accuracy > CONVINCING:
            self.refuse(self.requested, order)
        better = self.best_input()
        if better == self.requested and near_chance:
            better = self.best_pair()
        if better not in (self.requested, self.requested.with_input_size(better.input_size)):
            better = self.best_size(better, clearly=False)
        self.refuse(better, order)
        if near_chance:
            raise BaselineError(
                f"The model answers {accuracy:.1%} of {n} training images correctly, about what guessing gives "
                f"({chance:.1%}), and no common input size, normalisation or class order helps: check that its weights "
                "were trained on these classes, or give --input-size, --mean, --std and --class-map as in its training."
            )
        return BaselineCheck(accuracy, float(chance), n, tuple(self.tried))

    # ---- scoring ----

    def affordable(self, inputs: list[Preprocessing], most: int, least: int, macs: float) -> int:
        """How many images `macs` pay for at the largest of the sizes."""
        largest = max(one.input_size for one in inputs)
        cost = self.macs * (largest / self.requested.input_size) ** 2
        return min(len(self.split), most, max(least, int(macs / cost)))

    def labels(self, n: int) -> np.ndarray:
        return self.split.labels[self.order[:n]].numpy()

    def answers(self, preprocessing: Preprocessing, n: int) -> np.ndarray | None:
        """The model's answers [n] for the first n images of the sample; None when it does not take such input."""
        done = self.known.get(preprocessing, np.zeros(0, np.int64))
        for chosen in self.order[len(done) : n].split(64) if n > len(done) else ():
            images = normalise(self.split.take(chosen, preprocessing), preprocessing)
            try:
                with torch.inference_mode():
                    done = np.concatenate([done, CLASSIFICATION.predictions(self.model(images).numpy())])
            except Exception as error:  # what a model raises on an input that it does not take is its author's choice
                if preprocessing != self.requested:
                    return None
                if memory.ran_out(error):
                    raise
                raise BaselineError(
                    f"The model takes two images, but not a batch of {len(images)} ({type(error).__name__}): write its "
                    "forward for any number of images."
                ) from error
        self.known[preprocessing] = done
        return done[:n]

    def compare(self, candidate: Preprocessing, current: Preprocessing, n: int) -> tuple[int, int] | None:
        """How many of the first n images only the candidate, and only the current way, gets right."""
        labels, now, then = self.labels(n), self.answers(candidate, n), self.answers(current, n)
        assert then is not None
        scores = None if now is None else float((now == labels).mean())
        self.tried.append(Alternative(self.flags(candidate), scores, float((then == labels).mean()), n))
        return None if now is None else _only_right(now == labels, then == labels)

    # ---- input size and normalisation ----

    def best_input(self) -> Preprocessing:
        """Size and normalisation improved in turn."""
        sized = self.best_size(self.requested)
        return self.best_of(list(self.normalised(sized)), sized)

    def best_size(self, current: Preprocessing, clearly: bool = True) -> Preprocessing:
        sizes = [current.with_input_size(size) for size in SIZES if size != current.input_size]
        return self.best_of(sizes, current, clearly)

    def best_pair(self) -> Preprocessing:
        sized = [self.requested.with_input_size(size) for size in FEW_SIZES]
        return self.best_of(
            [pair for one in sized for pair in self.normalised(one) if pair not in self.known], self.requested
        )

    def normalised(self, current: Preprocessing) -> Iterator[Preprocessing]:
        known = [*NORMALISATIONS.values(), self.own_normalisation()]
        for mean, std in known:
            if not np.allclose((*mean, *std), (*current.mean, *current.std), atol=0.02):
                yield replace(current, mean=mean, std=std)

    def own_normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the images' own pixels, before they are padded or resized."""
        if self.own is None:
            positions = self.split.positions[self.order[: SAMPLE // 2].numpy()]
            images = [to_pixels(self.split.origin.image(int(position))) / 255 for position in positions]
            mean = np.mean([image.mean((1, 2)) for image in images], 0)
            square = np.mean([(image**2).mean((1, 2)) for image in images], 0)
            self.own = _triple(mean), _triple(np.sqrt(np.maximum(square - mean**2, 1e-6)))
        return self.own

    def best_of(self, candidates: list[Preprocessing], current: Preprocessing, clearly: bool = True) -> Preprocessing:
        """The best candidate, looked at twice, if it is better than `current` (`clearly` so, when asked), else `current`."""
        gains: dict[Preprocessing, float] = {}
        least = MARGIN if clearly else 0.0
        for candidate in candidates:
            n = self.affordable([candidate, current], SCREEN, MIN_SCREEN, SCREEN_MACS)
            only = self.compare(candidate, current, n)
            if only is not None and (only[0] - only[1]) / n >= least:
                gains[candidate] = (only[0] - only[1]) / n
        best, best_gain = current, 0.0
        for candidate in sorted(gains, key=lambda candidate: -gains[candidate])[:3]:
            n = self.affordable([candidate, current], SAMPLE, MIN_SAMPLE, SAMPLE_MACS)
            only = self.compare(candidate, current, n)
            if only is not None and (only[0] - only[1]) / n > best_gain and (not clearly or _is_clear(*only, n)):
                best, best_gain = candidate, (only[0] - only[1]) / n
        return best

    def refuse(self, better: Preprocessing, order: _Order | None) -> None:
        """Raise for the input or the class order that explains the model best, if any is clearly better."""
        n = self.affordable([better, self.requested], SAMPLE, MIN_SAMPLE, SAMPLE_MACS)
        labels, now, then = self.labels(n), self.answers(better, n), self.answers(self.requested, n)
        accuracy, flags = float(np.mean(now == labels)), self.flags(better)
        if order is not None and (better == self.requested or order.accuracy > accuracy):
            raise BaselineError(
                f"The model answers {order.baseline_accuracy:.1%} of {order.n_images} training images correctly, but "
                f"{order.accuracy:.1%} if its classes are in another order: write {self.example_map(order.outputs)} to a "
                "JSON file, in full, and give it with --class-map."
            )
        if better != self.requested:
            raise BaselineError(
                f"The model answers {np.mean(then == labels):.1%} of {n} training images correctly as requested, but "
                f"{accuracy:.1%} with {flags}: add {flags} to the request."
            )

    def flags(self, candidate: Preprocessing) -> str:
        size = f"--input-size {candidate.input_size}" if candidate.input_size != self.requested.input_size else ""
        changed = (candidate.mean, candidate.std) != (self.requested.mean, self.requested.std)
        mean, std = (",".join(f"{value:.6g}" for value in values) for values in (candidate.mean, candidate.std))
        return " ".join(part for part in (size, f"--mean {mean} --std {std}" if changed else "") if part)

    # ---- class order ----

    def best_order(self, labels: np.ndarray, answers: np.ndarray) -> _Order | None:
        """Folders sorted as text put 10 before 2; training scripts may have used any other order, too."""
        half = len(labels) // 2
        candidates = [
            (self.numeric_order(), slice(None)),
            (_fitted_order(labels[:half], answers[:half]), slice(half, None)),
        ]
        for outputs, rest in candidates:
            if outputs is None:
                continue
            now, then = outputs[labels[rest]] == answers[rest], labels[rest] == answers[rest]
            if _is_clear(*_only_right(now, then), len(now)):
                return _Order(outputs, float(now.mean()), float(then.mean()), len(now))
        return None

    def numeric_order(self) -> np.ndarray | None:
        """Output of each present class if the names are numbers and were meant in the order of their values."""
        if not all(name.isascii() and name.isdigit() for name in self.class_names):
            return None
        outputs = np.argsort(np.argsort([int(name) for name in self.class_names], kind="stable"))
        return None if (outputs == np.arange(len(outputs))).all() else outputs

    def example_map(self, outputs: np.ndarray) -> str:
        moved = [index for index in range(len(self.class_names)) if outputs[index] != index][:3]
        pairs = json.dumps({self.class_names[index]: int(outputs[index]) for index in moved}, ensure_ascii=False)
        return f"{pairs[:-1]}, ...}}"


def _fitted_order(labels: np.ndarray, answers: np.ndarray) -> np.ndarray | None:
    """The output of each class that explains the answers best, by optimal assignment on the confusion matrix."""
    count = int(max(labels.max(), answers.max())) + 1
    if len(labels) < MIN_PER_CLASS * len(np.unique(labels)):
        return None
    confusion = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion, (labels, answers), 1)
    outputs = linear_sum_assignment(confusion + 0.5 * np.eye(count), maximize=True)[1]
    return None if (outputs == np.arange(count)).all() else outputs


def _only_right(now: np.ndarray, then: np.ndarray) -> tuple[int, int]:
    return int((now & ~then).sum()), int((then & ~now).sum())


def _is_clear(gained: int, lost: int, n: int) -> bool:
    """McNemar's exact test, one-sided, and a margin that matters."""
    return (gained - lost) / n >= MARGIN and binom.sf(gained - 1, gained + lost, 0.5) < SIGNIFICANCE


def _triple(values: np.ndarray) -> tuple[float, ...]:
    """Three rounded numbers; a grey image's one is repeated."""
    return tuple(round(float(value), 4) for value in np.broadcast_to(values, 3))
