"""NNI's QATQuantizer on a prepared model: the only file of this package that imports nni."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress._nni import import_nni, quiet
from compress.errors import QuantizationError
from compress.quantization.prepare import QPoint, quantization_points, quantized_layers
from compress.quantization.ranges import ActivationGrid, Ranges, WeightGrid

TrainFn = Callable[[nn.Module], object]
"""Trains the model it is given in place; the model simulates quantization by itself."""

_OUTPUT, _WEIGHT = "_output_0", "weight"
_OBSERVE, _QUANTIZE = "bypass", "espalier_clamp_round"
"""NNI's names for what a wrapper does with its tensor; the second is `_ClampRound`."""
_SMALLEST_CHANNEL = 2.0**-12
"""A channel whose weights are all smaller than this share of the layer's largest gets a range as if one were not.
Runtimes store a bias in units of input scale times channel scale; a (nearly) empty channel would overflow its int32."""


def quantize_with_nni(
    prepared: fx.GraphModule,
    *,
    weight_bits: int,
    activation_bits: int,
    calibration: Iterable[Tensor],
    train: TrainFn | None,
) -> tuple[dict[str, Tensor], Ranges]:
    """Calibrate, train when `train` is given, and return (trained float state_dict, ranges); `prepared` is untouched.

    `calibration` yields float32 images (N, 3, H, W), normalised. Raises `QuantizationError`, naming the layer, when a
    range was never observed, is not finite, or is empty.
    """
    model = copy.deepcopy(prepared)
    points, layers = quantization_points(model), quantized_layers(model)
    quantizer = _wrap(model, layers, points, weight_bits, activation_bits)
    _observe_present_weights(quantizer, layers)
    _share_group_scales(quantizer, points)
    _calibrate(model, quantizer, points, calibration)
    if train is not None:
        train(model)
    _observe_final_weights(quantizer, layers)
    _share_group_scales(quantizer, points, once=True)
    observed = quantizer.get_calibration_config()
    with quiet():
        quantizer.unwrap_model()
    ranges = Ranges(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        activations={name: _activation_grid(name, point, observed[name][_OUTPUT]) for name, point in points.items()},
        weights={name: _weight_grid(name, observed[name][_WEIGHT]) for name in layers},
    )
    return model.state_dict(), ranges


def _wrap(
    model: nn.Module, layers: Iterable[str], points: dict[str, QPoint], weight_bits: int, activation_bits: int
) -> Any:
    """Attach NNI's wrappers. Activations and weights share zero as code 0, which every runtime accepts."""
    import_nni()
    from nni.compression.base.apply_method import quant_apply_methods
    from nni.compression.base.setting import QuantizationSetting
    from nni.compression.quantization import QATQuantizer

    quant_apply_methods[_QUANTIZE] = _ClampRound.apply

    setting = {"quant_dtype": None, "quant_scheme": None, "granularity": "default", "apply_method": "clamp_round"}
    QuantizationSetting.register(QPoint.__name__, {"_input_": setting, "_output_": setting})
    weight = {"quant_dtype": f"int{weight_bits}", "quant_scheme": "symmetric"}
    per_channel = {_WEIGHT: {**weight, "granularity": "out_channel"}}
    config = [{"op_names": list(layers), "target_names": [_WEIGHT], **weight, "target_settings": per_channel}]
    # An int8 container holds 0..127 but not 0..255: below 8 bits a tensor without negative values uses all levels.
    unsigned = [name for name, point in points.items() if point.non_negative and activation_bits < 8]
    signed = [name for name in points if name not in unsigned]
    for names, dtype, scheme in ((signed, "int", "symmetric"), (unsigned, "uint", "affine")):
        activation = {"quant_dtype": f"{dtype}{activation_bits}", "quant_scheme": scheme}
        if names:
            config.append({"op_names": names, "target_names": [_OUTPUT], **activation})
    with quiet():
        return QATQuantizer(model, config, None)


class _ClampRound(torch.autograd.Function):
    """NNI's `qat_clamp_round` where zero is code 0: the same values and gradients in half the passes over memory.

    The gradient passes where the value lies inside the range (straight-through estimator). Weights always do.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, space: Any) -> Tensor:
        codes = target / space.scale
        ctx.is_weight = space._target_name == _WEIGHT
        if not ctx.is_weight:
            ctx.save_for_backward((codes >= space.qmin) & (codes <= space.qmax))
        return codes.clamp_(space.qmin, space.qmax).round_().mul_(space.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient if ctx.is_weight else gradient * ctx.saved_tensors[0]), None


def _observe_present_weights(quantizer: Any, layers: Iterable[str]) -> None:
    """Weight ranges follow the weights of this very step (Jacob et al. 2018, section 3.1: a := min w, b := max w).

    NNI averages them over steps; the average lags, and weights that grew since are clipped.
    """

    def forget(wrapper: Any, target_name: str, target: Tensor) -> None:
        if wrapper.training and target_name == _WEIGHT:
            space = wrapper.quantization_target_spaces[_WEIGHT]
            space.tracked_max = space.tracked_min = None

    def widen_empty_channels(wrapper: Any, target_name: str, target: Tensor) -> None:
        if wrapper.training and target_name == _WEIGHT:
            space = wrapper.quantization_target_spaces[_WEIGHT]
            floor = target.detach().abs().max() * _SMALLEST_CHANNEL
            space.tracked_max = torch.maximum(space.tracked_max, floor)

    for name in layers:
        functions = quantizer._module_wrappers[name]._track_funcs
        functions.insert(functions.index(quantizer.track_min_max_val), forget)
        functions.insert(functions.index(quantizer.update_scale_zp), widen_empty_channels)


def _share_group_scales(quantizer: Any, points: dict[str, QPoint], *, once: bool = False) -> None:
    """Points of one group use the largest of their scales: now, or (by default) after every observation."""
    groups: dict[str, list[Any]] = {}
    for name, point in points.items():
        if point.scale_group:
            groups.setdefault(point.scale_group, []).append(quantizer._module_wrappers[name])
    for wrappers in groups.values():

        def share(wrapper: Any, target_name: str, target: Tensor | None, members: list[Any] = wrappers) -> None:
            spaces = [member.quantization_target_spaces[_OUTPUT] for member in members]
            known = [space.scale for space in spaces if space.scale is not None]
            if wrapper.training and target_name == _OUTPUT and known:
                wrapper.quantization_target_spaces[_OUTPUT].scale = torch.stack(known).amax()

        for wrapper in wrappers:
            if once:
                wrapper.training = True
                share(wrapper, _OUTPUT, None)
            else:
                wrapper.register_track_func(share)


def _calibrate(model: nn.Module, quantizer: Any, points: dict[str, QPoint], calibration: Iterable[Tensor]) -> None:
    """Observe float activations; a range is the mean over batches of each batch's extremes.

    The layers run in eval mode (a dropout or BatchNorm in training mode would show ranges that deployment never
    sees); only the points' wrappers are in training mode, which is when they observe.
    """
    spaces = {name: quantizer._module_wrappers[name].quantization_target_spaces[_OUTPUT] for name in points}
    extremes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in spaces}
    model.eval()
    for name in points:
        quantizer._module_wrappers[name].training = True
    _set_apply_method(quantizer, _OBSERVE)
    with torch.no_grad():
        for images in calibration:
            for space in spaces.values():
                space.tracked_max = space.tracked_min = None
            model(images)
            for name, space in spaces.items():
                if space.tracked_max is not None:
                    extremes[name].append((space.tracked_min, space.tracked_max))
    for name, space in spaces.items():
        if not extremes[name]:
            raise QuantizationError(
                f"{points[name].source}: no calibration image reached this layer, so its range is unknown; give at "
                "least one batch of images."
            )
        low, high = (torch.stack(values).mean(0) for values in zip(*extremes[name], strict=True))
        space.tracked_min, space.tracked_max = low, high
        quantizer.update_scale_zp(quantizer._module_wrappers[name], _OUTPUT, low)
    _set_apply_method(quantizer, _QUANTIZE)


def _set_apply_method(quantizer: Any, method: str) -> None:
    for targets in quantizer._target_spaces.values():
        for space in targets.values():
            space.apply_method = method


def _observe_final_weights(quantizer: Any, layers: Iterable[str]) -> None:
    """The last optimizer step came after the last observation: look once more, so that no final weight is clipped."""
    for name in layers:
        wrapper = quantizer._module_wrappers[name]
        wrapper.training = True
        wrapper._track_info(_WEIGHT, wrapper.quantization_target_spaces[_WEIGHT].target)


def _activation_grid(name: str, point: QPoint, observed: dict[str, Any]) -> ActivationGrid:
    low, high = _extremes(point.source, observed)
    if low == high == 0:
        raise QuantizationError(
            f"{point.source}: its output is zero for every calibration image, so it has no range; calibrate with more "
            "images, or check that the model is not broken there."
        )
    if int(observed["zero_point"]) != 0:
        raise QuantizationError(f"{name}: NNI put zero at code {int(observed['zero_point'])}; only 0 can be exported.")
    highest = 2 ** (observed["quant_bits"] - 1) - 1
    if observed["quant_dtype"].startswith("uint"):
        return ActivationGrid(float(observed["scale"]), 0, 2 ** observed["quant_bits"] - 1)
    return ActivationGrid(float(observed["scale"]), -highest, highest)


def _weight_grid(name: str, observed: dict[str, Any]) -> WeightGrid:
    low, high = _extremes(name, observed)
    if low == high == 0:
        raise QuantizationError(f"{name}: all its weights are zero, so it has no range; load its weights first.")
    scales = observed["scale"].reshape(-1).tolist()
    return WeightGrid(tuple(scales), 2 ** (observed["quant_bits"] - 1) - 1)


def _extremes(name: str, observed: dict[str, Any]) -> tuple[float, float]:
    """Smallest and largest value NNI saw; raises `QuantizationError` when there is none or it is not finite."""
    if observed["scale"] is None or observed.get("tracked_min") is None:
        raise QuantizationError(f"{name}: this layer was never run, so its range is unknown; calibrate with images.")
    low, high = float(observed["tracked_min"].amin()), float(observed["tracked_max"].amax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise QuantizationError(
            f"{name}: values from {low} to {high} were observed, which cannot be quantized; check the weights and the "
            "normalisation of the images, or train with a lower learning rate."
        )
    return low, high
