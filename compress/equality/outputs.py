"""Outputs of a model on many images, as numpy arrays, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from compress.models.calls import own_errors

Answer = Callable[[np.ndarray], np.ndarray]
"""Images float32 [N, 3, H, W], normalised -> outputs float32 [N, ...]; logits [N, classes] of a classifier."""
PIXELS_AT_ONCE = 4 * 224 * 224
"""Of one forward pass. More at once is no faster, and feature maps above 32 MB are mapped and zeroed anew for each layer."""


def torch_answer(model: nn.Module) -> Answer:
    """`model` in eval mode as a function of numpy arrays; large images go through it few at a time.

    Raises (when called):
        ModelError: the model's own code stops.
    """
    model.eval()

    def answer(images: np.ndarray) -> np.ndarray:
        few = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        with torch.inference_mode(), own_errors(model, f"with {min(few, len(images))} images in eval mode"):
            outputs: np.ndarray = torch.cat([model(part).float() for part in torch.from_numpy(images).split(few)]).numpy()
        return outputs

    return answer


def of_batches(answer: Answer, batches: Iterable[Tensor]) -> np.ndarray:
    """All batches through `answer`: float32 [images, ...].

    Args:
        batches: float32 [N, 3, H, W] each, normalised.
    """
    return np.concatenate([answer(np.ascontiguousarray(batch.numpy())) for batch in batches])
