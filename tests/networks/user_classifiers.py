"""Small classifiers as people have them, and what is around them, to be opened by `compress.own_modules`."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

SIZE, CLASSES, WIDTH = 32, 4, 32


class Net(nn.Module):
    """Two convolutions and a linear layer; images of any size."""

    def __init__(self, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.conv2, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.norm2(self.conv2(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Sized(nn.Module):
    """Flattens maps of a fixed size."""

    def __init__(self, height: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, 4, 1)
        self.head = nn.Linear(8 * -(-height // 4) * -(-width // 4), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().flatten(1))


# ---- answers ----

Pair = namedtuple("Pair", "logits features")


@dataclass
class Output:
    scores: Tensor
    loss: Tensor | None = None


class Answering(Net):
    """`pack` makes the answer of logits and features."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor):
        features = self.features(x)
        return self.pack(self.head(features), features)


ANSWERS = {
    "a dictionary": lambda logits, features: {"logits": logits},
    "a dictionary with features": lambda logits, features: {"features": features, "logits": logits},
    "another key": lambda logits, features: {"out": logits, "loss": logits.mean()},
    "a list of one": lambda logits, features: [logits],
    "a tuple with a map": lambda logits, features: (features[:, :, None].expand(-1, -1, 4), logits),
    "a named tuple": Pair,
    "a dataclass": lambda logits, features: Output(logits),
    "a namespace": lambda logits, features: SimpleNamespace(prediction=logits, attentions=()),
    "one in another": lambda logits, features: {"result": (logits,), "loss": None},
    "maps of one pixel": lambda logits, features: logits[:, :, None, None],
    "a dictionary of maps": lambda logits, features: {"out": logits[:, :, None, None]},
}


# ---- inputs ----


class Flagged(Net):
    def forward(self, x: Tensor, return_features: bool = False, mask: Tensor | None = None) -> Tensor:
        features = self.features(x)
        if mask is not None:
            features = features * mask
        return features if return_features else self.head(features)


class KeywordOnly(Net):
    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return self.head(self.features(pixel_values))


class SecondInput(Net):
    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **others: object) -> Tensor:
        if input_ids is not None or pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return self.head(self.features(pixel_values))


class ByPlace(Net):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs[0]))


class TensorDefault(Net):
    def forward(self, x: Tensor, scale: Tensor = torch.full((1, WIDTH), 2.0)) -> Tensor:  # noqa: B008
        return self.head(self.features(x) * scale)


class TwoInputs(Net):
    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.head(self.features(image) + meta)


class ThreeInputs(Net):
    def forward(self, image: Tensor, age: Tensor, *, sex: Tensor) -> Tensor:
        return self.head(self.features(image) + age + sex)


def trained_values(model: nn.Module) -> nn.Module:
    """Weights and statistics as after training: no BatchNorm is an identity, no two channels are equal."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, 0),
                (module.running_var, 0.5),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()
