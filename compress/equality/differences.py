"""Answers of a model on test images: logits, accuracy with its interval, agreement between two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.models.calls import own_errors

Answer = Callable[[np.ndarray], np.ndarray]
"""Images float32 [N, 3, H, W] -> logits float32 [N, classes]."""
PIXELS_AT_ONCE = 4 * 224 * 224
"""Of one forward pass. More at once is no faster, and feature maps above 32 MB are mapped and zeroed anew for each layer."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, 0..1, with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """How far the answers of two models are apart on the same images."""

    max_abs_diff: float
    reference_scale: float
    """Largest absolute logit of the reference."""
    top1_agreement: float
    n_images: int

    @property
    def relative(self) -> float:
        return self.max_abs_diff / self.reference_scale if self.reference_scale else math.inf


def torch_answer(model: nn.Module) -> Answer:
    """`model` in eval mode as a function of numpy arrays; large images go through it few at a time.

    Raises (when called):
        ModelError: the model's own code stops.
    """
    model.eval()

    def answer(images: np.ndarray) -> np.ndarray:
        few = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        with torch.inference_mode(), own_errors(model, f"with {min(few, len(images))} images in eval mode"):
            return torch.cat([model(part).float() for part in torch.from_numpy(images).split(few)]).numpy()

    return answer


def logits(answer: Answer, batches: Iterable[Tensor]) -> np.ndarray:
    """All batches through `answer`: [images, classes]."""
    return np.concatenate([answer(np.ascontiguousarray(batch.numpy())) for batch in batches])


def accuracy(answers: np.ndarray, labels: np.ndarray) -> Accuracy:
    """`answers` [N, classes] against `labels` [N]; the interval is Wilson's (1927), good near 0 and 1 as well."""
    return share(int((answers.argmax(1) == labels).sum()), len(labels))


def share(right: int, n: int) -> Accuracy:
    z = 1.959964
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Accuracy(p, max(0.0, centre - half), min(1.0, centre + half), n)


def compare(reference: np.ndarray, other: np.ndarray) -> Difference:
    """Both [N, classes], from the same images."""
    return Difference(
        max_abs_diff=float(np.abs(reference - other).max()),
        reference_scale=float(np.abs(reference).max()),
        top1_agreement=float((reference.argmax(1) == other.argmax(1)).mean()),
        n_images=len(reference),
    )
