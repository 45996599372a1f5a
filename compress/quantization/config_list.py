"""NNI's config lists for quantization, in the keys of NNI 3.0 or 2.x, translated into bits for each layer.

    [{"op_types": ["Conv2d"], "quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}},
     {"op_types": ["ReLU"], "quant_types": ["output"], "quant_bits": {"output": 8}}]                          (2.x)
    [{"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"},
     {"op_types": ["ReLU"], "target_names": ["_output_"], "quant_dtype": "int8"}]                             (3.0)

Layers that no entry selects stay in floating point. A later entry overrides an earlier one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from compress.nni_bridge.entries import Entry, Selector
from compress.quantization.bits import FLOAT, BitPlan, LayerBits
from compress.quantization.prepare import quantization_points, quantized_layers, readers_of
from compress.tracing import type_name

FIELD = "quantization_config_list"
_NEW = {"target_names", "quant_dtype", "quant_scheme", "granularity", "target_settings"}
_OLD = {"quant_types", "quant_bits", "quant_dtype", "quant_scheme"}
_REFUSED = {
    "quant_start_step": "nothing: rounding is simulated from the first step, on ranges that calibration found",
    "fuse_names": "nothing: BatchNorm is folded, and what runtimes fuse has no rounding in between",
    "apply_method": "nothing: the quantizer decides how it rounds",
}
_TARGETS = {"weight": "weight", "input": "input", "_input_": "input", "output": "output", "_output_": "output"}
_DTYPE = re.compile(r"u?int([1-8])")
_OLD_SCHEMES = {"per_tensor_symmetric", "per_channel_symmetric", "symmetric"}
_LAYERS, _OTHERS = ("Conv2d", "Linear"), ("ReLU", "ReLU6", "Hardtanh", "MaxPool2d", "BatchNorm2d")

Bits = dict[str, int]
"""Target (weight, input, output) -> bits."""


def translate(model: nn.Module, prepared: fx.GraphModule, entries: Sequence[Entry], offsets: bool) -> BitPlan:
    """The bits that a config list means.

    Args:
        model: the float model, whose modules the entries name.
        prepared: what `prepare` makes of it.
        offsets: the quantizer learns offsets, so an affine scheme can be honoured.

    Raises:
        RequestError: an unknown key, both styles of keys, a name that does not exist, or what cannot be honoured.
    """
    types = {name: type_name(module) for name, module in model.named_modules()}
    known = {name: kind for name, kind in types.items() if kind in (*_LAYERS, *_OTHERS)}
    selector = Selector(FIELD, known, "a layer", (*_LAYERS, *_OTHERS), "NNI quantizes these")
    selector.refuse_keys(entries, _NEW, _OLD, _REFUSED)
    targets: dict[str, Bits] = {}
    for number, entry in enumerate(entries, 1):
        selected, _ = selector.select(number, entry)
        if entry.get("exclude"):
            for name in selected:
                targets.pop(name, None)
            continue
        bits = _bits_of(number, entry, selector, offsets)
        for name in selected:
            targets[name] = targets.get(name, {}) | bits
    return _plan(prepared, targets, known, selector)


def _bits_of(number: int, entry: Entry, selector: Selector, offsets: bool) -> Bits:
    old = "quant_types" in entry
    key = "quant_types" if old else "target_names"
    targets = selector.strings(number, entry, key)
    if not targets:
        raise selector.refuse(f"entry {number} without targets", "target_names, or quant_types as in NNI 2.x")
    unknown = next((target for target in targets if target not in _TARGETS), None)
    if unknown:
        raise selector.refuse(f"the target {unknown} in entry {number}", "weight, _input_ or _output_")
    settings = entry.get("target_settings", {})
    if not isinstance(settings, dict) or not all(isinstance(setting, dict) for setting in settings.values()):
        raise selector.refuse(f"target_settings in entry {number}", "an object of objects, as in NNI's manual")
    bits = {}
    for target in targets:
        setting = {**entry, **settings.get(target, {})}
        _refuse_scheme(number, setting, _TARGETS[target], selector, offsets)
        bits[_TARGETS[target]] = (
            _old_bits(number, entry, target, selector) if old else _new_bits(number, setting, selector)
        )
    return bits


def _new_bits(number: int, setting: Mapping[str, Any], selector: Selector) -> int:
    dtype = setting.get("quant_dtype", "int8")
    match = _DTYPE.fullmatch(str(dtype))
    if not match:
        raise selector.refuse(f"quant_dtype={dtype!r} in entry {number}", "int2 to int8, or uint2 to uint8")
    return int(match[1])


def _old_bits(number: int, entry: Entry, target: str, selector: Selector) -> int:
    bits = entry.get("quant_bits", 8)
    value = bits.get(target) if isinstance(bits, dict) else bits
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
        raise selector.refuse(f"quant_bits={bits!r} in entry {number}", f"a whole number from 1 to 8 for {target}")
    if entry.get("quant_dtype", "int") not in ("int", "uint"):
        raise selector.refuse(f"quant_dtype={entry['quant_dtype']!r} in entry {number}", "int or uint")
    return value


def _refuse_scheme(number: int, setting: Mapping[str, Any], target: str, selector: Selector, offsets: bool) -> None:
    scheme = setting.get("quant_scheme")
    if scheme not in (None, *_OLD_SCHEMES) and (target == "weight" or not offsets):
        raise selector.refuse(
            f"quant_scheme={scheme!r} of {target} in entry {number}",
            "symmetric: weights have no offset, and only lsq-plus learns offsets of what is not behind a ReLU",
        )
    granularity = setting.get("granularity")
    allowed = (None, "default", "out_channel") if target == "weight" else (None, "default")
    if granularity not in allowed:
        raise selector.refuse(
            f"granularity={granularity!r} of {target} in entry {number}",
            "default or out_channel: a weight has one scale for each output channel, an activation has one",
        )


def _plan(prepared: fx.GraphModule, targets: dict[str, Bits], types: Mapping[str, str], selector: Selector) -> BitPlan:
    made_by = {name: point.source for name, point in quantization_points(prepared).items()}
    read_by: dict[str, list[str]] = {}
    for point, layers in readers_of(prepared).items():
        for layer in layers:
            read_by.setdefault(layer, []).append(made_by[point])
    plan = {}
    for layer in quantized_layers(prepared):
        bits = targets.get(layer, {})
        if "weight" not in bits:
            plan[layer] = LayerBits(FLOAT, FLOAT)
            continue
        inputs = bits.get("input") or max(
            (targets.get(s, {}).get("output", 0) for s in read_by.get(layer, [])), default=0
        )
        if not inputs:
            raise selector.refuse(
                f"the weight of {layer} without what it reads",
                "_input_ of it, or _output_ of the layer before, as well: integer kernels read integers on both sides",
            )
        plan[layer] = LayerBits(bits["weight"], inputs)
    quantized = [bits for bits in plan.values() if not bits.keep_float]
    if not quantized:
        raise selector.refuse("no weight of a layer", "at least one Conv2d or Linear with the target weight")
    outputs = [bits["output"] for bits in targets.values() if "output" in bits]
    general = BitPlan(
        Counter(bits.weights for bits in quantized).most_common(1)[0][0],
        Counter(outputs or [bits.activations for bits in quantized]).most_common(1)[0][0],
        plan,
    )
    _refuse_other_outputs(prepared, general, targets, selector)
    return general


def _refuse_other_outputs(
    prepared: fx.GraphModule, plan: BitPlan, targets: dict[str, Bits], selector: Selector
) -> None:
    """A tensor has one grid: what its maker's output and its readers' inputs ask must be the same."""
    points = quantization_points(prepared)
    for name, bits in plan.of_points(prepared).items():
        listed = targets.get(points[name].source, {}).get("output", bits)
        if listed != bits:
            raise selector.refuse(
                f"{listed} bits for the output of {points[name].source}",
                f"{bits}, which the layers that read it ask for",
            )
