"""Reparametrized and masked weights become plain weights; SyncBatchNorm becomes BatchNorm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from compress.own_modules import calling

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def make_permanent(model: nn.Module) -> list[str]:
    """Replace, in `model` in eval mode, what torch.nn.utils computes before each pass by the result; returns notes."""
    kinds: Counter[str] = Counter()
    zeros, masked = 0, 0
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            kinds.update(_freeze_parametrizations(module))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                kinds[type(hook).__name__] += 1
                _remove_hook(module, hook)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
                values = getattr(module, hook._tensor_name)
                zeros, masked = zeros + int((values == 0).sum()), masked + values.numel()
                kinds["masks"] += 1
    masks = kinds.pop("masks", 0)
    notes = []
    if kinds:
        listed = ", ".join(f"{kind} of {_tensors(count)}" for kind, count in kinds.items())
        notes.append(f"Reparametrizations were made permanent ({listed}): the results are plain weights now.")
    if masks:
        notes.append(
            f"The masks of torch.nn.utils.prune on {_tensors(masks)} were made permanent: {100 * zeros / masked:.0f} % of these "
            "weights are zero, and training may change them."
        )
    return notes


def plain_batch_norms(model: nn.Module, images: Tensor) -> list[str]:
    """Replace each SyncBatchNorm of `model`, in eval mode, by the BatchNorm for the dimensions of its input; returns notes.

    Args:
        images: float32 [N, 3, H, W], on which the dimensions are found.
    """
    synced = [module for module in model.modules() if type(module) is nn.SyncBatchNorm]
    if not synced:
        return []
    dimensions: dict[nn.Module, int] = {}
    handles = [
        one.register_forward_pre_hook(lambda module, args: dimensions.update({module: args[0].dim()})) for one in synced
    ]
    calling.run(model, images)
    for handle in handles:
        handle.remove()
    plain = {one: _plain_batch_norm(one, dimensions.get(one, 4)) for one in synced}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in plain:
                parent._modules[key] = plain[child]
    kinds = " and ".join(sorted({type(one).__name__ for one in plain.values()}))
    return [f"{len(synced)} SyncBatchNorm {'layer was' if len(synced) == 1 else 'layers were'} turned into {kinds}."]


def _plain_batch_norm(synced: nn.SyncBatchNorm, dimensions: int) -> nn.Module:
    plain = _BATCH_NORMS[dimensions](
        synced.num_features, synced.eps, synced.momentum, synced.affine, synced.track_running_stats
    )
    plain._parameters.update(synced._parameters)
    plain._buffers.update(synced._buffers)
    return plain.train(synced.training)


def _freeze_parametrizations(module: nn.Module) -> Iterable[str]:
    """As torch's remove_parametrizations, which also changes the class, and a deep copy shares it with the original."""
    kinds = []
    values = {}
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    for name, chain in parametrizations.items():
        kinds += [type(one).__name__.lstrip("_") for one in chain.children()]
        originals = [value for key, value in chain.named_parameters(recurse=False)]
        values[name] = (
            getattr(module, name).detach().clone(),
            bool(originals),
            any(one.requires_grad for one in originals),
        )
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, (value, is_parameter, learns) in values.items():
        if is_parameter:
            module.register_parameter(name, nn.Parameter(value, requires_grad=learns))
        else:
            module.register_buffer(name, value)
    return kinds


def _remove_hook(module: nn.Module, hook: WeightNorm | SpectralNorm) -> None:
    source = f"{hook.name}_v" if isinstance(hook, WeightNorm) else f"{hook.name}_orig"
    learns = getattr(module, source).requires_grad
    (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, hook.name)
    getattr(module, hook.name).requires_grad_(learns)


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count > 1 else ''}"
