"""Networks without training whose every number matters, so that a comparison notices a wrong channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give normalisations, biases, layer scales and all-zero weights random values, in place; eval mode.

    With fresh ones a wrongly removed channel goes unseen: BatchNorm shifts nothing, and vision transformers answer 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def around(size: int, centre: float, spread: float) -> Tensor:
        return centre + spread * (2 * torch.rand(size, generator=generator) - 1)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                size = module.num_features
                module.running_mean.copy_(around(size, 0.0, 0.5))
                module.running_var.copy_(around(size, 1.0, 0.5))
                if module.affine:
                    module.weight.copy_(around(size, 1.0, 0.5))
                    module.bias.copy_(around(size, 0.0, 0.5))
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.copy_(around(module.bias.numel(), 0.0, 0.2))
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.copy_(around(parameter.numel(), 0.75, 0.25).view_as(parameter))
            elif parameter.dim() > 1 and not parameter.any():
                parameter.copy_(around(parameter.numel(), 0.0, 0.1).view_as(parameter))
    return model.eval()
