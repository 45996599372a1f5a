"""One class for each image: outputs are logits [N, classes], labels are class indices [N]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.tasks.base import Shown, Task

if TYPE_CHECKING:
    from torch import Tensor


class Classification(Task):
    """Top-1 accuracy; cross-entropy, and the distillation of Hinton et al. (2015, arXiv:1503.02531)."""

    name = "classification"
    score_name = "accuracy"

    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """The class of each image, int64 [N]."""
        classes: np.ndarray = outputs.argmax(1)
        return classes

    def correct(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        right: np.ndarray = self.predictions(outputs) == targets
        return right

    def agreement(self, reference: np.ndarray, other: np.ndarray) -> float:
        return float((self.predictions(reference) == self.predictions(other)).mean())

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Kullback-Leibler divergence of the softened outputs, times temperature squared, which keeps gradients' size."""
        from torch.nn import functional

        divergence = functional.kl_div(
            functional.log_softmax(outputs / temperature, 1),
            functional.log_softmax(teacher / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return temperature**2 * divergence

    def with_own_predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1).where(targets < 0, targets)

    def show(self, output: np.ndarray, names: Sequence[str], most: int) -> list[Shown]:
        """The classes of the largest softmax shares."""
        shares = np.exp(output.astype(np.float64) - output.max())
        shares /= shares.sum()
        return [
            Shown(names[index] if index < len(names) else f"class {index}", float(shares[index]))
            for index in np.argsort(-shares)[:most]
        ]


CLASSIFICATION = Classification()
