"""The interface of a task, and the numbers that it answers with.

Numpy alone: images are classified with a finished run where torch is not installed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Score:
    """Share of right predictions, 0 to 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Images."""


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are apart on the same images."""

    max_abs_diff: float
    reference_scale: float
    """Largest absolute output of the reference."""
    top1_agreement: float
    """Share of equal predictions, 0 to 1."""
    n_images: int

    @property
    def relative(self) -> float:
        return self.max_abs_diff / self.reference_scale if self.reference_scale else math.inf


@dataclass(frozen=True)
class Shown:
    """One line of what a prediction looks like to a user."""

    label: str
    share: float
    """0 to 1."""


class Task(ABC):
    """What the outputs of a model mean.

    Outputs are float32 arrays [N, ...] whose first dimension counts images; targets are what `predictions` returns of them, or
    the labels of the data set, [N, ...].
    """

    name: str
    score_name: str
    """Of `score` against the labels of a data set, such as "accuracy"."""

    @abstractmethod
    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """What the outputs say, comparable with labels; also the targets where images have no labels."""

    @abstractmethod
    def correct(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether each image is predicted right, bool [N]."""

    @abstractmethod
    def agreement(self, reference: np.ndarray, other: np.ndarray) -> float:
        """Share of equal predictions of two models, 0 to 1."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Training loss against labels: a scalar, the mean over images.

        Args:
            outputs: float32 [N, ...] on the training device.
            targets: labels [N, ...] on the same device.
        """

    @abstractmethod
    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Training loss against the outputs of a teacher of the same shape: a scalar, the mean over images."""

    @abstractmethod
    def with_own_predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`targets` with the model's own predictions in the place of unknown (negative) labels."""

    @abstractmethod
    def show(self, output: np.ndarray, names: Sequence[str], most: int) -> list[Shown]:
        """The prediction for one image, [...] without the first dimension, in at most `most` lines."""

    # ---- what follows from these ----

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> Score:
        """Share of images predicted right, with Wilson's interval."""
        return share(int(self.correct(outputs, targets).sum()), len(outputs))

    def compare(self, reference: np.ndarray, other: np.ndarray) -> Difference:
        """Outputs of two models on the same images, both float [N, ...]."""
        return Difference(
            max_abs_diff=float(np.abs(reference - other).max()),
            reference_scale=float(np.abs(reference).max()),
            top1_agreement=self.agreement(reference, other),
            n_images=len(reference),
        )


def share(right: int, n: int) -> Score:
    """`right` of `n` with Wilson's 95 % interval (1927), which is good near 0 and 1 as well."""
    p = right / n
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    return Score(p, max(0.0, centre - half), min(1.0, centre + half), n)
