"""Opening a user's module in a test: the opened module, its output for three images, or the sentence that refuses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from user_classifiers import SIZE

from compress import own_modules
from compress.errors import RequestError

IMAGES = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def opened(model: object, size: int = SIZE) -> own_modules.OwnModule:
    return own_modules.open_module(model, size)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


def refusal(model: object, size: int = SIZE) -> str:
    with pytest.raises(RequestError) as caught:
        opened(model, size)
    return str(caught.value)
