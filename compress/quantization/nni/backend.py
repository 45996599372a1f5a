"""NNI's quantizers on a prepared model: the only file of this package that imports nni."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from compress import equality
from compress.errors import QuantizationError
from compress.nni_bridge import import_nni, quiet
from compress.quantization.bits import BitPlan
from compress.quantization.calibration import Estimator, calibrate
from compress.quantization.grids import Grids
from compress.quantization.kinds import QPoint, layer_at
from compress.quantization.nni.methods import (
    ACTIVATION_METHODS,
    OUTPUT,
    WEIGHT,
    WEIGHT_METHODS,
    Method,
    Target,
    register_apply_methods,
    weight_target,
)
from compress.quantization.prepare import quantization_points

TrainFn = Callable[[nn.Module], object]
"""Trains the model it is given in place; the model simulates quantization by itself."""

Job = tuple[Method, Target, str]
"""How a tensor is quantized, where it starts, and NNI's name for it."""


def quantize_with_nni(
    prepared: fx.GraphModule,
    plan: BitPlan,
    *,
    quantizer: str,
    estimator: Estimator,
    calibration: Iterable[Tensor],
    train: TrainFn | None,
    shown: Tensor,
) -> tuple[dict[str, Tensor], Grids, np.ndarray]:
    """Calibrate, train when `train` is given, and return (trained float state_dict, grids, what NNI's simulation answers
    to the images `shown`); `prepared` is untouched.

    `calibration` yields normalised images, float32 [N, 3, H, W], as `shown` is. Raises `QuantizationError`, naming the layer, when a
    range was never observed, is not finite, or is empty.
    """
    model = copy.deepcopy(prepared)
    jobs = _weight_jobs(model, plan, quantizer, estimator)
    jobs += _activation_jobs(model, plan, quantizer, estimator, calibration)
    quantizers = _wrap(model, jobs)
    wrappers = {name: wrapper for one in quantizers.values() for name, wrapper in one._module_wrappers.items()}
    for method, target, role in jobs:
        method.start(quantizers[method.nni], wrappers[target.name], target, role)
        wrappers[target.name].quantization_target_spaces[role].apply_method = method.apply
    for method, names in _groups(jobs).values():
        method.share([wrappers[name] for name in names])
    if train is not None:
        train(model)
    for method, target, role in jobs:
        method.finish(wrappers[target.name], role)
    for method, names in _groups(jobs).values():
        method.settle([wrappers[name] for name in names])
    grids, weights = _grids(plan, jobs, wrappers)
    simulated = equality.answers(model.eval(), shown)
    with quiet():
        for one in quantizers.values():
            one.unwrap_model()
    return model.state_dict() | weights, grids, simulated


def _weight_jobs(model: fx.GraphModule, plan: BitPlan, quantizer: str, estimator: Estimator) -> list[Job]:
    jobs = []
    for name, bits in plan.layers.items():
        if bits.keep_float:
            continue
        weight = layer_at(model, name).weight.detach()
        _check_weights(name, weight)
        how = quantizer if bits.weights == plan.weight_bits or quantizer in ("lsq", "lsq-plus", "ptq") else "qat"
        jobs.append((WEIGHT_METHODS[how], weight_target(name, weight, bits.weights, how, estimator), WEIGHT))
    return jobs


def _activation_jobs(
    model: fx.GraphModule, plan: BitPlan, quantizer: str, estimator: Estimator, calibration: Iterable[Tensor]
) -> list[Job]:
    points, bits = quantization_points(model), plan.of_points(model)
    calibrated = calibrate(model, calibration, estimator, bits)
    for name, (low, high) in calibrated.items():
        _check_activation(points[name].source, low, high)
    jobs = []
    for name, point in points.items():
        members = [calibrated[other] for other in points if points[other].scale_group == point.scale_group]
        ranges = members if point.scale_group else [calibrated[name]]
        low, high = (torch.stack(values) for values in zip(*ranges, strict=True))
        # An int8 container holds 0..127 but not 0..255: below 8 bits a tensor without negative values uses all levels.
        unsigned = point.non_negative and bits[name] < 8
        target = Target(name, bits[name], low.amin(), high.amax(), unsigned, point.scale_group)
        # An offset of 8 bits has codes that TensorRT cannot read: few bits elsewhere must not lose its file for the image's.
        plain = point.non_negative or bits[name] == 8 > plan.activation_bits
        method = ACTIVATION_METHODS["lsq" if quantizer == "lsq-plus" and plain else quantizer]
        jobs.append((method, target, OUTPUT))
    return jobs


def _groups(jobs: Iterable[Job]) -> dict[str, tuple[Method, list[str]]]:
    groups: dict[str, tuple[Method, list[str]]] = {}
    for method, target, _ in jobs:
        if target.group:
            groups.setdefault(target.group, (method, []))[1].append(target.name)
    return groups


def _wrap(model: nn.Module, jobs: Iterable[Job]) -> dict[str, Any]:
    """NNI's quantizers by class name, each around its own layers and points."""
    import_nni()
    from nni.compression import quantization
    from nni.compression.base.apply_method import quant_apply_methods
    from nni.compression.base.setting import QuantizationSetting

    register_apply_methods(quant_apply_methods)
    setting = {"quant_dtype": None, "quant_scheme": None, "granularity": "default", "apply_method": "clamp_round"}
    QuantizationSetting.register(QPoint.__name__, {"_input_": setting, "_output_": setting})
    configs: dict[str, list[dict[str, Any]]] = {}
    for method, target, role in jobs:
        configs.setdefault(method.nni, []).append(method.config(target, role))
    with quiet():
        return {name: getattr(quantization, name)(model, config, None) for name, config in configs.items()}


def _grids(plan: BitPlan, jobs: Iterable[Job], wrappers: dict[str, Any]) -> tuple[Grids, dict[str, Tensor]]:
    activations, weights, final = {}, {}, {}
    for method, target, role in jobs:
        wrapper = wrappers[target.name]
        if role == WEIGHT:
            final[f"{target.name}.weight"] = method.final_weight(wrapper)
            _check_weights(target.name, wrapper.weight.detach())
            weights[target.name] = method.weight_grid(wrapper, target)
        else:
            activations[target.name] = method.activation_grid(wrapper, target)
    grids = Grids(
        weight_bits=plan.weight_bits,
        activation_bits=plan.activation_bits,
        activations=activations,
        weights=weights,
        keep_float=tuple(sorted(plan.keep_float)),
    )
    return grids, final


def _check_weights(name: str, weight: Tensor) -> None:
    _check_finite(name, weight.amin(), weight.amax())
    if not weight.any():
        raise QuantizationError(f"{name}: all its weights are zero, so it has no range; load its weights first.")


def _check_activation(name: str, low: Tensor, high: Tensor) -> None:
    _check_finite(name, low, high)
    if low == high == 0:
        raise QuantizationError(
            f"{name}: its output is zero for every calibration image, so it has no range; calibrate with more "
            "images, or check that the model is not broken there."
        )


def _check_finite(name: str, low: Tensor, high: Tensor) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise QuantizationError(
            f"{name}: values from {float(low)} to {float(high)} were observed, which cannot be quantized; check the "
            "weights and the normalisation of the images, or train with a lower learning rate."
        )
