"""NNI's config lists, in the keys of NNI 3.0 or 2.x, translated into what a plan can promise.

How an entry selects layers is NNI's rule: names and patterns (matched from the start of a name), of these the given
types, less what it excludes; a later entry overrides an earlier one. What a plan does not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.errors import RequestError
from compress.nni_bridge.entries import Selector
from compress.pruning.constraints import Constraints
from compress.tracing import type_name

_NEW = {"sparse_ratio", "max_sparse_ratio", "global_group_id", "target_names", "target_settings"}
_OLD = {"sparsity", "sparsity_per_layer", "total_sparsity", "max_sparsity_per_layer"}
_REFUSED = {
    "sparse_threshold": "sparse_ratio: a threshold does not say how many channels stay",
    "min_sparse_ratio": "max_sparse_ratio or nothing: only an upper limit can be kept",
    "dependency_group_id": "nothing: which layers go together follows from the network",
    "internal_metric_block": "nothing: how grouped convolutions lose channels follows from the network",
    "align": "nothing: the kept channels of a group are equal anyway",
    "apply_method": "nothing: channels are removed, not scaled",
    "granularity": "nothing: whole output channels are removed",
}


@dataclass(frozen=True)
class _Entry:
    """One entry with its keys in NNI 3.0's meaning."""

    layers: tuple[str, ...]
    ratio: float | None
    """None: an exclusion."""
    pool: Any
    """The global group in which the layers compete; None where they do not."""
    max_ratio: float | None
    op_names: tuple[str, ...]
    """As the entry has them."""
    excluded: tuple[str, ...]
    """Layers that the entry excludes from its own selection."""


def translate(model: nn.Module, layers: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> Constraints:
    """The constraints that a config list sets for `model`, whose Conv2d, Linear and attention layers are `layers`.

    Layers that no entry selects are not pruned, unless they share channels with one that is selected.

    Raises:
        RequestError: an unknown key, both styles of keys, a name that does not exist, or what a plan cannot honour.
    """
    types = {layer: type_name(model.get_submodule(layer)) for layer in layers}
    selector = Selector(
        "config_list", types, "a Conv2d or Linear layer", ("Conv2d", "Linear"), "only their channels are removed"
    )
    selector.refuse_keys(entries, _NEW, _OLD, _REFUSED)
    parsed = [_parse(number, entry, selector) for number, entry in enumerate(entries, 1)]
    selected: dict[str, _Entry] = {}
    for entry in parsed:
        if entry.ratio is not None:
            selected |= dict.fromkeys(entry.layers, entry)
    forbidden = {layer for entry in parsed if entry.ratio is None for layer in entry.layers}
    excluded = ({layer for entry in parsed for layer in entry.excluded} - set(selected)) | forbidden
    selected = {layer: entry for layer, entry in selected.items() if layer not in forbidden}
    if not selected:
        raise RequestError("config_list", list(entries), "at least one entry with a ratio that selects a layer")
    pool = _only_pool(selected.values())
    return Constraints(
        sparsity=pool.ratio if pool and pool.ratio else 0.5,  # without a pool nothing reads it: `selected` is empty
        ratios={
            layer: entry.ratio for layer, entry in selected.items() if entry.pool is None and entry.ratio is not None
        },
        selected=frozenset(layer for layer, entry in selected.items() if entry.pool is not None),
        excluded=tuple(layer for layer in layers if layer in excluded),
        ranking="global" if pool else "per-group",
        max_layer_sparsity=pool.max_ratio if pool else None,
        names={name: (name,) for name, entry in selected.items() if name in entry.op_names and entry.ratio},
        request_field="config_list",
    )


def _only_pool(entries: Iterable[_Entry]) -> _Entry | None:
    """An entry of the global group; None where there is no such group."""
    pools = {(entry.pool, entry.ratio, entry.max_ratio): entry for entry in entries if entry.pool is not None}
    if len(pools) > 1:
        names = sorted(str(pool) for pool, _, _ in pools)
        raise RequestError("config_list", names, "one global group with one ratio and one limit")
    return next(iter(pools.values()), None)


def _parse(number: int, entry: Mapping[str, Any], selector: Selector) -> _Entry:
    layers, excluded = selector.select(number, entry)
    op_names = tuple(selector.strings(number, entry, "op_names"))
    if "exclude" in entry:
        if entry["exclude"] is not True or _ratio_keys(entry):
            raise RequestError("config_list", f"exclude in entry {number}", "exclude: true without a ratio beside it")
        return _Entry(layers, None, None, None, op_names, ())
    keys = _ratio_keys(entry)
    if len(keys) != 1:
        raise RequestError(
            "config_list", f"{' and '.join(keys) or 'no ratio'} in entry {number}", "one ratio, such as sparse_ratio"
        )
    ratio = _fraction(number, entry, keys[0])
    _refuse_targets(number, entry)
    pool = entry.get("global_group_id", f"entry {number}" if keys[0] == "total_sparsity" else None)
    limit = next((key for key in ("max_sparse_ratio", "max_sparsity_per_layer") if key in entry), None)
    max_ratio = None if limit is None or entry[limit] == 1 else _fraction(number, entry, limit)
    if max_ratio is not None and max_ratio < ratio:
        raise RequestError("config_list", f"{limit}={max_ratio:g} in entry {number}", f"at least {keys[0]}, {ratio:g}")
    if pool is not None and not ratio:
        raise RequestError("config_list", f"{keys[0]}=0 in entry {number}", "more than 0 for a global group")
    return _Entry(layers, ratio, pool, max_ratio, op_names, excluded)


def _ratio_keys(entry: Mapping[str, Any]) -> list[str]:
    return [key for key in ("sparse_ratio", "sparsity", "sparsity_per_layer", "total_sparsity") if key in entry]


def _fraction(number: int, entry: Mapping[str, Any], key: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise RequestError("config_list", f"{key}={value!r} in entry {number}", "a fraction from 0 to below 1")
    return float(value)


def _refuse_targets(number: int, entry: Mapping[str, Any]) -> None:
    settings = entry.get("target_settings", {})
    if not isinstance(settings, dict) or not all(isinstance(setting, dict) for setting in settings.values()):
        raise RequestError(
            "config_list", f"target_settings in entry {number}", "an object of objects, as in NNI's manual"
        )
    unknown = sorted({*entry.get("target_names", ()), *settings} - {"weight", "bias"})
    if unknown:
        raise RequestError("config_list", f"the target {unknown[0]} in entry {number}", "weight or bias")
    for target, setting in settings.items():
        for key, value in setting.items():
            if key != "granularity" or value not in ("default", "out_channel"):
                raise RequestError(
                    "config_list",
                    f"{key}={value!r} of {target} in entry {number}",
                    "granularity out_channel or default: whole output channels are removed",
                )
