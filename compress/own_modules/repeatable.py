"""Whether a user's module returns the same outputs for the same image each time, and which line of it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import RequestError
from compress.own_modules import answers
from compress.tracing.wording import Place, current_place


def require_repeatable(model: nn.Module, images: Tensor) -> None:
    """Refuse a module whose outputs for the same image differ from call to call.

    Args:
        model: in eval mode.
        images: float32 [N, 3, H, W].

    Raises:
        RequestError: its answers depend on random numbers; names the function that draws them and its line.
    """
    first, finder = _answer(model, images, seed=0)
    if finder.name is None:
        return
    second, _ = _answer(model, images, seed=1)
    if answers.are_equal(first, second):
        return
    advice = "give it training=self.training" if "dropout" in finder.name else "use it while self.training is set only"
    raise RequestError(
        "model",
        type(model).__name__,
        f"a module that answers the same image alike each time, in evaluation, and {finder.name}() is random"
        f"{f' at {finder.place}' if finder.place else ' in it'}: {advice}",
    )


def _answer(model: nn.Module, images: Tensor, seed: int) -> tuple[object, _FindRandom]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _FindRandom() as finder:
        torch.default_generator.manual_seed(seed)
        return model(images), finder


class _FindRandom(TorchFunctionMode):
    """Remembers the first function that draws from torch's generator."""

    name: str | None = None
    place: Place | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.default_generator.get_state()
        answer = func(*args, **(kwargs or {}))
        if self.name is None and not torch.equal(before, torch.default_generator.get_state()):
            self.name, self.place = func.__name__, current_place()
        return answer
