"""Physically smaller layers: NNI's speedup replaces each of them, and the result is checked against the masked model.

NNI's ModelSpeedup infers which inputs and outputs of a module are masked by sending random numbers through the graph, and
fails or guesses where it does not know an operation. The plan has followed every channel already, so NNI's replacement
functions get the masks that follow from it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compress import nni_bridge
from compress.errors import PruningError
from compress.methods.pruners import Pruner
from compress.models.attention import heads_of, is_attention, keep_heads
from compress.pruning.channels import Call, Channels, analyse
from compress.pruning.equivalence import Difference, check_equal
from compress.pruning.graph.axes import Axis, kept_features
from compress.pruning.graph.tensors import owners, stored
from compress.pruning.interface import Plan, PrunedModel, PruningTraining
from compress.pruning.nni import backend
from compress.pruning.plan import check_example
from compress.tracing import type_name
from compress.tracing.graph import structure_copy

_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters",
          "num_groups", "num_channels")  # fmt: skip


def shrink(
    model: nn.Module, example: Tensor, plan: Plan, pruner: Pruner, training: PruningTraining | None
) -> PrunedModel:
    """Choose, mask, shrink and check a copy of `model`, with `example` float32 [N, C, H, W]; see `compress.pruning.prune`."""
    started = time.perf_counter()
    check_example(model, example)
    with torch.inference_mode(False), torch.enable_grad(), nni_bridge.random_state_kept():
        choice = backend.choose(model, example, plan, pruner, training)
        with _one_thread():
            result, difference = _shrunk(choice.model, example, choice.kept)
    seconds = time.perf_counter() - started
    return PrunedModel(result, plan, difference.max_abs_diff, difference.reference_scale, choice.kept, seconds)


def _shrunk(model: nn.Module, example: Tensor, kept: dict[str, Tensor]) -> tuple[nn.Module, Difference]:
    channels = analyse(model, example)
    result = structure_copy(model)
    rows = {channels.sets.root(channels.own_set[layer]): kept[layer] for layer in kept}
    shared = _shared(result)
    with nni_bridge.quiet(), torch.no_grad():
        for name, call in channels.calls.items():
            _shrink_module(result, name, call, channels, rows)
        _cut_attributes(result, channels, rows)
    _tie(shared)
    _remove_heads(result, kept)
    _own_tensors(result, model)
    return result, check_equal(channels, kept, result, _check_images(example))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_images(example: Tensor) -> Tensor:
    """The first example image and noise, float32 [2, C, H, W], so that the check also works with a blank example."""
    first = example[:1]
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
    return torch.cat([first, noise])


# ---- layers -------------------------------------------------------------------------------------------------------


def _shrink_module(result: nn.Module, name: str, call: Call, channels: Channels, rows: Mapping[int, Tensor]) -> None:
    reads, gives = (kept_features(axis, channels.sets, rows) for axis in (call.input, call.output))
    if reads is None and gives is None:
        return
    module = result.get_submodule(name)
    whole = {key: torch.ones((), device=value.device).expand_as(value) for key, value in module.named_parameters()}
    masks = ([_mask(call.input_shape, call.input, reads)], _mask(call.output_shape, call.output, gives), whole)
    functions: dict[str, Any] = nni_bridge.load("nni.compression.speedup.replacement").replace_module
    try:
        _replace(name, module, functions, masks)
    except PruningError:
        raise
    except Exception as error:
        raise PruningError(
            f"{name}, a {type(module).__name__}, cannot be made smaller as planned: its tensors do not fit the channels "
            f"that it reads and gives. Keep it whole with exclude={name} and prune the others."
        ) from error


def _mask(shape: tuple[int, ...], axis: Axis | None, rows: Tensor | None) -> Tensor:
    """NNI's mask of a tensor: float32 0/1 of its shape, as a view of one row."""
    if axis is None or rows is None:
        return torch.ones(()).expand(shape)
    row = [1] * len(shape)
    row[axis.dim] = shape[axis.dim]
    return rows.float().view(row).expand(shape)


def _replace(name: str, module: nn.Module, functions: dict[str, Any], masks: tuple[Any, Any, Any]) -> None:
    """Put the tensors and sizes that NNI's replacement has into `module`."""
    function = functions.get(type_name(module))
    if isinstance(module, nn.modules.batchnorm._NormBase) and (function is None or module.running_mean is None):
        function = _smaller_norm
    if function is None:
        raise PruningError(
            f"{name}, a {type(module).__name__}, cannot be made smaller. Keep the layers before it whole with exclude."
        )
    smaller = function(module, masks)
    for key, parameter in smaller.named_parameters(recurse=False):
        old = module.get_parameter(key)
        new = nn.Parameter(parameter.detach().to(old), requires_grad=old.requires_grad)
        module.register_parameter(key, new)
    for key, buffer in smaller.named_buffers(recurse=False):
        if buffer.dim() > 0:  # the count of batches seen stays the old one's
            module.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)
    for attribute in _SIZES:
        if hasattr(smaller, attribute):
            setattr(module, attribute, getattr(smaller, attribute))


def _smaller_norm(norm: nn.Module, masks: tuple[Any, Any, Any]) -> nn.Module:
    """A normalisation that NNI cannot replace: it knows no SyncBatchNorm, and looks for running statistics."""
    kept = masks[1].movedim(1, 0).flatten(1)[:, 0].nonzero().flatten()
    tracks = norm.running_mean is not None
    smaller = type(norm)(len(kept), norm.eps, norm.momentum, norm.affine, track_running_stats=tracks)
    for key, old in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        if old.dim() > 0:
            getattr(smaller, key).data = old.data[kept.to(old.device)]
    return smaller


# ---- tensors that no layer of NNI's has ----------------------------------------------------------------------------


def _cut_attributes(result: nn.Module, channels: Channels, rows: Mapping[int, Tensor]) -> None:
    """Take the channels out of parameters and buffers that the forward pass reads by itself."""
    for name in channels.roles.names.values():
        tensor = stored(channels.graph_module, name)
        lost = {
            dim: features
            for dim, axis in channels.roles.dims(tensor).items()
            if isinstance(dim, int) and (features := kept_features(axis, channels.sets, rows)) is not None
        }
        owner, _, key = name.rpartition(".")
        module = result.get_submodule(owner)
        present = getattr(module, key)
        if not lost or present.shape != tensor.shape:  # a layer's own weight is smaller by now
            continue
        for dim, features in lost.items():
            present = present.index_select(dim, features.nonzero().flatten().to(present.device))
        _store(module, key, present)


def _store(module: nn.Module, key: str, tensor: Tensor) -> None:
    old = getattr(module, key)
    setattr(module, key, nn.Parameter(tensor, requires_grad=old.requires_grad) if key in module._parameters else tensor)
    if getattr(module, "num_features", None) == old.shape[0]:
        setattr(module, "num_features", tensor.shape[0])  # noqa: B010 - nn.Module declares no such attribute


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where each tensor is that `model` has in more than one place."""
    return [
        [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        for names in owners(model).values()
        if len(names) > 1
    ]


def _tie(shared: list[list[tuple[nn.Module, str]]]) -> None:
    """Tie again what was one tensor: the plan gives every place of it the same channels."""
    for places in shared:
        tensors = [getattr(module, key) for module, key in places]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            raise PruningError("A weight that several layers share got several sizes; exclude these layers.")
        for module, key in places:
            setattr(module, key, tensors[0])


def _remove_heads(result: nn.Module, kept: dict[str, Tensor]) -> None:
    """Replace attention modules of `result` by ones with fewer heads; NNI's speedup has no replacement for them."""
    for layer, rows in kept.items():
        module = result.get_submodule(layer)
        if is_attention(module):
            whole = rows.view(-1, heads_of(module).width).all(1)
            result.set_submodule(layer, keep_heads(module, whole.nonzero().flatten().tolist()))


def _own_tensors(result: nn.Module, model: nn.Module) -> None:
    """Give `result` its own copy of each tensor that it still shares with the input model, keeping ties."""
    shared = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    copies: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in shared:
            return tensor
        if id(tensor) not in copies:
            clone = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                clone = nn.Parameter(clone, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = clone
        return copies[id(tensor)]

    for module in result.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = own(tensor)
