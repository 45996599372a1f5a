"""Names for what is added to a user's model."""

from __future__ import annotations

from torch import nn


def free_name(module: nn.Module, wish: str) -> str:
    """`wish`, or `wish_2`, `wish_3` ...: the first that no part, tensor or attribute of `module` has."""
    name, number = wish, 1
    while hasattr(module, name):
        number += 1
        name = f"{wish}_{number}"
    return name
