"""What is done when memory runs out: training is tried once more with half the images per step, everything else ends.

Nothing here imports torch: what it raises is told by name.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from compress.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

SMALLEST_BATCH = 2
_WORDS = ("can't allocate memory", "std::bad_alloc", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
T = TypeVar("T")


def ran_out(error: BaseException) -> bool:
    """Whether it says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def halving_once(
    model: nn.Module, train: Callable[[int], T], batch_size: int, tell: Callable[[str], None]
) -> tuple[T, int]:
    """Trains `model`, and once more from where it began with half the batch when memory ran out.

    Args:
        train: trains the model with so many images per step.
        tell: told before the second attempt.

    Returns:
        What `train` returned, and the images per step of it.

    Raises:
        TrainingError: memory ran out again, or the batch cannot be halved.
    """
    before = copy.deepcopy({name: value.to("cpu") for name, value in model.state_dict().items()})
    try:
        return train(batch_size), batch_size
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    half = batch_size // 2
    if half < SMALLEST_BATCH:
        raise TrainingError(_sentence(f"{batch_size} images per step, the fewest there can be"))
    tell(f"memory ran out with {batch_size} images per step: again with {half}")
    _free(model)
    model.load_state_dict(before)
    try:
        return train(half), half
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    raise TrainingError(_sentence(f"{batch_size} images per step, and again with {half}"))


def note(asked: int, used: int) -> str | None:
    """For the report; None when training went as asked."""
    if asked == used:
        return None
    return f"Memory ran out with {asked} training images per step, so training began again with {used}."


def _sentence(how: str) -> str:
    return (
        f"Memory ran out in training with {how}. Start a run with a lower --train-batch-size or --input-size, or end other "
        "programs on this machine and resume this one."
    )


def _free(model: nn.Module) -> None:
    import torch

    model.zero_grad(set_to_none=True)
    model.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
