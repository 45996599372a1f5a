"""Really smaller layers: NNI's ModelSpeedup on a scratch copy, and the proof that nothing but the masked part is gone.

NNI finds out which inputs and outputs of every module are dead by sending random numbers through the graph and back. It
does so here on a scratch copy with positive, well-scaled weights, so that what it finds depends on the structure alone:
weights that are all zero, such as a fresh head, would look dead otherwise. The new layers take the model's own weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .. import _nni
from ..attention import heads_of, is_attention, keep_heads
from ..errors import PruningError
from ..tracing import type_name
from . import Shrunk, nni_backend
from .channels import Channels
from .equality import Difference, check_equal
from .hosts import Host, find_hosts
from .plan import Plan, check_example
from .trace import probe, set_traced_mode, structure_copy, trace, traced_copy

if TYPE_CHECKING:
    from . import Pruner, Training

_SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
_INFERENCE_BATCH = 3
"""NNI takes for constant what is equal within 1e-6 in all random images; with two, that happened by chance."""
_SILENT = logging.Logger("nni speedup", logging.CRITICAL + 1)


def shrink(model: nn.Module, example: torch.Tensor, plan: Plan, pruner: Pruner, how: Training | None) -> Shrunk:
    """Choose, mask, shrink and check a copy of `model`; see `compress.pruning.prune`."""
    started = time.perf_counter()
    check_example(model, example)
    with torch.inference_mode(False), torch.enable_grad(), _nni.random_state_kept():
        choice = nni_backend.choose(model, example, plan, pruner, how)
        with _one_thread():
            result, difference = _shrunk(choice.model, example, plan, choice.kept)
    seconds = time.perf_counter() - started
    return Shrunk(result, plan, difference.max_abs_diff, difference.reference_scale, choice.kept, seconds)


def _shrunk(
    model: nn.Module, example: torch.Tensor, plan: Plan, kept: dict[str, torch.Tensor]
) -> tuple[nn.Module, Difference]:
    graph_module = traced_copy(model, example)
    images = probe(graph_module, example)
    channels = Channels(graph_module)
    result = structure_copy(model)
    for host in find_hosts(model, graph_module, channels, _without_attention(plan, model), images):
        _shrink_host(result, host, kept, graph_module.meta.get("training", ()))
    _remove_heads(result, kept)
    _own_tensors(result, model)
    return result, check_equal(graph_module, channels, kept, result, _check_images(example))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_images(example: torch.Tensor) -> torch.Tensor:
    """The first image given and a random one, so that the check bites on a blank example too."""
    first = example[:1]
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
    return torch.cat([first, noise])


def _without_attention(plan: Plan, model: nn.Module) -> Plan:
    return replace(plan, groups=tuple(g for g in plan.groups if not is_attention(model.get_submodule(g.layers[0]))))


def _remove_heads(result: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Replace attention modules of `result` by ones with fewer heads; NNI's speedup has no replacer for them."""
    for layer, rows in kept.items():
        module = result.get_submodule(layer)
        if is_attention(module):
            whole = rows.view(-1, heads_of(module).width).all(1)
            result.set_submodule(layer, keep_heads(module, whole.nonzero().flatten().tolist()))


def _shrink_host(result: nn.Module, host: Host, kept: dict[str, torch.Tensor], training: Sequence[str]) -> None:
    """Run NNI's speedup on one part of `result`, in place; `training` are the modules traced in that mode."""
    prefix = f"{host.name}." if host.name else ""
    target = result.get_submodule(host.name)
    own = {layer.removeprefix(prefix): _masks(result.get_submodule(layer), kept[layer]) for layer in host.layers}
    scratch = set_traced_mode(copy.deepcopy(target), training)
    _well_scaled(scratch)
    try:
        with _nni.quiet(), _without_statistics():
            _speedup_class()(target, trace(scratch, host.inputs), host.inputs, own).run()
    except PruningError:
        raise
    except Exception as error:
        where = host.name or "the network"
        raise PruningError(
            f"NNI could not shrink {where}: {type(error).__name__}: {error}. Exclude the layers in it "
            "to go on without them."
        ) from error


def _masks(layer: nn.Module, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """NNI's form of a mask: 0/1 of each parameter's shape, here as views of one column."""
    rows = kept.float().to(layer.weight.device)
    column = rows.view(-1, *[1] * (layer.weight.dim() - 1)).expand_as(layer.weight)
    return {"weight": column} if layer.bias is None else {"weight": column, "bias": rows}


def _well_scaled(scratch: nn.Module) -> None:
    """Fill every parameter with positive numbers that keep activations near one, whatever the depth."""
    generator = torch.Generator().manual_seed(0)
    for parameter in scratch.parameters():
        parameter.requires_grad_(False)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        values = torch.rand(parameter.shape, generator=generator).add_(0.5).div_(fan_in)
        parameter.data = values.to(parameter.device)
    for buffer in scratch.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.detach().clone()


@functools.cache
def _speedup_class() -> type:
    """NNI's ModelSpeedup for masks without conflicts: the plan has put together what has to agree.

    NNI's own resolution of conflicts is left out: it is not idempotent, and takes layers of different sizes that meet
    in a concatenation or a broadcast gate for dependent. So are its temporary file (the model's weights are never
    touched here) and its replacement of layers that do not change.
    """
    base = _nni.load("nni.compression.speedup").ModelSpeedup
    updaters = _nni.load("nni.compression.speedup.mask_updater")
    replacer = _replacer_class()

    class ParameterFree(updaters.LeafModuleMaskUpdater):  # type: ignore[misc, name-defined]
        """Follows inputs and outputs only: nothing is read from the masks of single weights, which cost a gradient."""

        def detect(self, model_speedup: Any, node: fx.Node) -> bool:
            if node.op != "call_module":
                return False
            info, module = model_speedup.node_infos[node], model_speedup.fetch_attr(node.target)
            whole = {
                name: torch.ones((), device=value.device).expand_as(value) for name, value in module.named_parameters()
            }
            info.module, info.param_masks = module, whole | model_speedup.masks.get(node.target, {})
            return True

        indirect_update_preprocess = updaters.DefaultMaskUpdater.indirect_update_preprocess
        indirect_update_process = updaters.DefaultMaskUpdater.indirect_update_process

    class Speedup(base):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            target: nn.Module,
            graph_module: fx.GraphModule,
            inputs: torch.Tensor,
            masks: dict[str, dict[str, torch.Tensor]],
        ) -> None:
            functions = (torch.relu, torch.relu_, torch.sigmoid, torch.tanh, nn.functional.dropout)
            super().__init__(
                target,
                inputs,
                masks,
                batch_size=_INFERENCE_BATCH,
                graph_module=graph_module,
                logger=_SILENT,
                customized_mask_updaters=[
                    updaters.NoChangeMaskUpdater(customized_no_change_act_func=functions),
                    updaters.NoMaskUpdater(),
                    ParameterFree(),
                ],
            )
            self.replacers = [replacer()]

        def run(self) -> nn.Module:
            torch.manual_seed(0)
            self.initialize_propagate(self.dummy_input)
            self.propagate_originally()
            self.initialize_update_sparsity()
            self.update_direct_sparsity()
            self.update_indirect_sparsity()
            self.replace_compressed_modules()
            return self.bound_model

    return Speedup


@functools.cache
def _replacer_class() -> type:
    """A replacer that uses NNI's functions on the modules which change, and puts their result into the old module."""
    base = _nni.load("nni.compression.speedup.replacer").Replacer
    functions: dict[str, Any] = _nni.load("nni.compression.speedup.replacement").replace_module

    class Replacer(base):  # type: ignore[misc, valid-type]
        def replace_modules(self, speedup: Any) -> None:
            done: set[str] = set()
            for node, info in speedup.node_infos.items():
                if node.op != "call_module":
                    continue
                name, info.replaced = str(node.target), True
                inputs = [speedup.node_infos[item].output_masks for item in node.all_input_nodes]
                module = speedup.bound_model.get_submodule(name)
                has_tensors = any(True for _ in chain(module.parameters(), module.buffers()))
                if has_tensors and name not in done and _loses_channels(module, [*inputs, info.output_masks]):
                    done.add(name)
                    _replace(name, module, functions, (inputs, info.output_masks, info.param_masks))

    return Replacer


def _replace(name: str, module: nn.Module, functions: dict[str, Any], masks: tuple[Any, Any, Any]) -> None:
    function = functions.get(type_name(module))
    if function is None:
        raise PruningError(f"NNI cannot shrink {name}, a {type(module).__name__}; exclude the layers before it.")
    smaller = function(module, masks)
    for key, parameter in smaller.named_parameters(recurse=False):
        old = module.get_parameter(key)
        new = nn.Parameter(parameter.detach().to(old.dtype), requires_grad=old.requires_grad)
        module.register_parameter(key, new)
    for key, buffer in smaller.named_buffers(recurse=False):
        if buffer.dim() > 0:  # the count of batches seen stays the old one's
            module.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)
    for attribute in _SIZES:
        if hasattr(smaller, attribute):
            setattr(module, attribute, getattr(smaller, attribute))


def _loses_channels(module: nn.Module, masks: list[Any]) -> bool:
    """Whether an input or output has a channel in which nothing is alive, at any position."""
    dim = -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.MultiheadAttention) else 1
    tensors = [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() > 1]
    return any(not bool((mask != 0).movedim(dim, 0).flatten(1).any(1).all()) for mask in tensors)


@contextlib.contextmanager
def _without_statistics() -> Iterator[None]:
    """NNI computes the sparsity of every mask for its log, a third of its time, even when nothing is logged."""
    module = _nni.load("nni.compression.speedup.model_speedup")
    statistics = module.sparsity_stats
    module.sparsity_stats = lambda mask: ""
    try:
        yield
    finally:
        module.sparsity_stats = statistics


def _own_tensors(result: nn.Module, model: nn.Module) -> None:
    """Give `result` its own copy of each tensor that it still shares with the input model, keeping ties."""
    shared = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    copies: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in shared:
            return tensor
        if id(tensor) not in copies:
            clone = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                clone = nn.Parameter(clone, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = clone
        return copies[id(tensor)]

    for module in result.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = own(tensor)
