"""How each of NNI's quantizers learns the grid of one tensor, for weights and for activations.

A method starts from a range that calibration found, so that nothing begins at NNI's stock values (a scale of 0.01 for
LSQ, a zero point of 127.5 for LSQ+), and ends in numbers that integers hold exactly.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.quantization.calibration import Estimator, weight_thresholds
from compress.quantization.grids import ActivationGrid, WeightGrid

OUTPUT, WEIGHT = "_output_0", "weight"
CLAMP_ROUND, DOREFA_SCALED, BINARY_SCALED, LSQ_PLUS_WHOLE = (
    "espalier_clamp_round", "espalier_dorefa", "espalier_binary", "espalier_lsq_plus")  # fmt: skip
SMALLEST_CHANNEL = 2.0**-12
"""A channel whose weights are all smaller than this share of the layer's largest gets a range as if one were not.
Runtimes store a bias in units of input scale times channel scale; a (nearly) empty channel would overflow its int32."""
_GAIN = 32.0
"""A learnt scale moves this many learning rates per step, relative to itself: as fast as typical weights (0.03) do."""
_ATANH_LIMIT = 0.76159416
"""tanh(1)."""


@dataclass(frozen=True)
class Target:
    """A tensor to quantize and where its grid starts."""

    name: str
    """Of its layer or quantization point."""
    bits: int
    low: Tensor
    high: Tensor
    """Scalars for an activation; per output channel, [channels], for a weight (low is -high)."""
    unsigned: bool = False
    """No value is negative and the container has room for all levels above zero."""
    group: str = ""

    @property
    def dtype(self) -> str:
        return f"{'uint' if self.unsigned else 'int'}{self.bits}"

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1 if self.unsigned else (1 << (self.bits - 1)) - 1


def register_apply_methods(methods: dict[str, Any]) -> None:
    """Add to NNI's table of apply methods those that it lacks."""
    stock: dict[str, Callable[[Tensor, Any], Tensor]] = {
        name: methods[name] for name in ("dorefa_clamp_round_weight", "bnn_clamp_round", "lsq_plus_clamp_round")
    }

    def dorefa(weight: Tensor, space: Any) -> Tensor:
        gain: Tensor = space._wrapper.gain
        return stock["dorefa_clamp_round_weight"](weight, space) * gain

    def binary(weight: Tensor, space: Any) -> Tensor:
        return stock["bnn_clamp_round"](weight, space) * _mean_magnitude(weight)

    def lsq_plus(values: Tensor, space: Any) -> Tensor:
        offset = space.zero_point
        whole = offset + (offset.round() - offset).detach()
        grid = SimpleNamespace(qmin=space.qmin, qmax=space.qmax, _scaler=None, scale=space.scale, zero_point=whole)
        return stock["lsq_plus_clamp_round"](values, grid)

    methods |= {CLAMP_ROUND: _ClampRound.apply, DOREFA_SCALED: dorefa, BINARY_SCALED: binary, LSQ_PLUS_WHOLE: lsq_plus}


class _ClampRound(torch.autograd.Function):
    """NNI's `qat_clamp_round` where zero is code 0: the same values and gradients in half the passes over memory.

    The gradient passes where the value lies inside the range (straight-through estimator). Weights always do.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, space: Any) -> Tensor:
        codes: Tensor = target / space.scale
        ctx.is_weight = space._target_name == WEIGHT
        if not ctx.is_weight:
            ctx.save_for_backward((codes >= space.qmin) & (codes <= space.qmax))
        return codes.clamp_(space.qmin, space.qmax).round_().mul_(space.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient if ctx.is_weight else gradient * ctx.saved_tensors[0]), None


class Method(ABC):
    """One way to learn a grid. `quantizer` is NNI's object, `wrapper` NNI's wrapper around the layer or point."""

    nni: str
    """NNI's class."""
    apply: str
    """NNI's name for what a wrapper does with its tensor."""
    scheme = "symmetric"
    per_channel = True
    """A weight has one scale for each output channel in NNI's own setting."""

    def config(self, target: Target, role: str) -> dict[str, Any]:
        """An entry of NNI's config list."""
        setting = {"quant_dtype": target.dtype, "quant_scheme": self.scheme}
        entry: dict[str, Any] = {"op_names": [target.name], "target_names": [role], **setting}
        if role == WEIGHT and self.per_channel:
            entry["target_settings"] = {WEIGHT: {**setting, "granularity": "out_channel"}}
        return entry

    @abstractmethod
    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        """Put the wrapper's tensor on the grid that `target` begins with, before any training."""

    def share(self, wrappers: list[Any]) -> None:  # noqa: B027 - a hook that most leave out
        """Make activations of one group use one scale from now on; they start with equal ranges."""

    def finish(self, wrapper: Any, role: str) -> None:  # noqa: B027 - a hook that most leave out
        """After the last step of training, while still wrapped."""

    def settle(self, wrappers: list[Any]) -> None:  # noqa: B027 - a hook that most leave out
        """After `finish`: what differs within a group becomes equal."""

    def weight_grid(self, wrapper: Any, target: Target) -> WeightGrid:
        scale = wrapper.quantization_target_spaces[WEIGHT].scale
        return WeightGrid(tuple(scale.detach().reshape(-1).tolist()), target.qmax, target.bits)

    def final_weight(self, wrapper: Any) -> Tensor:
        """The float32 weight, of the layer's shape [channels, ...], whose codes on the grid are the integers to deploy."""
        weight: Tensor = wrapper.weight
        return weight.detach()

    def activation_grid(self, wrapper: Any, target: Target) -> ActivationGrid:
        scale = float(wrapper.quantization_target_spaces[OUTPUT].scale.detach())
        return ActivationGrid(scale, 0 if target.unsigned else -target.qmax, target.qmax)


class _FromRange(Method):
    """The scale follows from a range, by NNI's own formula."""

    apply = CLAMP_ROUND

    def config(self, target: Target, role: str) -> dict[str, Any]:
        return super().config(target, role) | ({"quant_scheme": "affine"} if target.unsigned else {})


class Qat(_FromRange):
    """Ranges follow the tensors while the model trains (Jacob et al. 2018, section 3.1)."""

    nni = "QATQuantizer"

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        space = wrapper.quantization_target_spaces[role]
        if role == WEIGHT:
            _follow_present_weights(quantizer, wrapper)
            self.finish(wrapper, role)
            return
        space.tracked_min, space.tracked_max = target.low, target.high
        wrapper.training = True
        quantizer.update_scale_zp(wrapper, role, target.low)

    def share(self, wrappers: list[Any]) -> None:
        def share_scale(wrapper: Any, target_name: str, target: Tensor) -> None:
            if wrapper.training and target_name == OUTPUT:
                wrapper.quantization_target_spaces[OUTPUT].scale = _largest_scale(wrappers)

        for wrapper in wrappers:
            wrapper.register_track_func(share_scale)

    def finish(self, wrapper: Any, role: str) -> None:
        """The last optimizer step came after the last observation: look once more, so that no weight is clipped."""
        if role == WEIGHT:
            wrapper.training = True
            wrapper._track_info(WEIGHT, wrapper.quantization_target_spaces[WEIGHT].target)

    def settle(self, wrappers: list[Any]) -> None:
        scale = _largest_scale(wrappers)
        for wrapper in wrappers:
            wrapper.quantization_target_spaces[OUTPUT].scale = scale


def _largest_scale(wrappers: list[Any]) -> Tensor:
    return torch.stack([wrapper.quantization_target_spaces[OUTPUT].scale for wrapper in wrappers]).amax()


def _follow_present_weights(quantizer: Any, wrapper: Any) -> None:
    """Weight ranges follow the weights of this very step (Jacob et al. 2018, section 3.1: a := min w, b := max w).

    NNI averages them over steps; the average lags, and weights that grew since are clipped.
    """

    def forget(wrapper: Any, target_name: str, target: Tensor) -> None:
        if wrapper.training and target_name == WEIGHT:
            space = wrapper.quantization_target_spaces[WEIGHT]
            space.tracked_max = space.tracked_min = None

    def widen_empty_channels(wrapper: Any, target_name: str, target: Tensor) -> None:
        if wrapper.training and target_name == WEIGHT:
            space = wrapper.quantization_target_spaces[WEIGHT]
            space.tracked_max = widened(space.tracked_max, target.detach().abs().max())

    functions = wrapper._track_funcs
    functions.insert(functions.index(quantizer.track_min_max_val), forget)
    functions.insert(functions.index(quantizer.update_scale_zp), widen_empty_channels)


class Ptq(_FromRange):
    """Ranges are those of calibration and stay."""

    nni = "PtqQuantizer"

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        wrapper._track_funcs.remove(quantizer.track_min_max_val)
        space = wrapper.quantization_target_spaces[role]
        shape = _per_channel_shape(wrapper) if role == WEIGHT else ()
        space.tracked_min, space.tracked_max = target.low.reshape(shape), target.high.reshape(shape)
        space.scale, space.zero_point = sys.modules[type(quantizer).__module__].compute_scale_zp(space)


class Lsq(Method):
    """Scales are learnt like weights (Esser et al. 2020), as logarithms (Jain et al. 2020, "Trained quantization
    thresholds"): AdamW's steps know nothing of a scale's own size, and a logarithm keeps it positive."""

    nni, apply = "LsqQuantizer", "lsq_clamp_round"

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        quantizer.is_init = True  # NNI would set every scale to 0.01 until the first step
        space = wrapper.quantization_target_spaces[role]
        scale = torch.maximum(target.high, -target.low) / target.qmax
        scale = scale.reshape(_per_channel_shape(wrapper) if role == WEIGHT else (1,))
        _learn(wrapper, f"{role}_scale", scale, _Exponential())
        space.zero_point = torch.zeros_like(scale)

    def share(self, wrappers: list[Any]) -> None:
        for name in wrappers[0].parametrizations:
            shared = wrappers[0].parametrizations[name].original
            for wrapper in wrappers[1:]:
                wrapper.parametrizations[name].original = shared


class LsqPlus(Lsq):
    """The offset is learnt, too (Bhalgat et al. 2020); it is a whole number of codes, as integers need it."""

    nni, apply, scheme = "LsqPlusQuantizer", LSQ_PLUS_WHOLE, "affine"

    def config(self, target: Target, role: str) -> dict[str, Any]:
        return super().config(target, role) | {"quant_dtype": f"uint{target.bits}"}

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        quantizer.is_init = True
        levels = 2**target.bits - 1
        low, high = target.low.clamp(max=0), target.high.clamp(min=0)
        scale = ((high - low) / levels).reshape(1)
        _learn(wrapper, f"{role}_scale", scale, _Exponential())
        _learn(wrapper, f"{role}_zero_point", (-low / scale).round(), _Times(_GAIN * levels))

    def activation_grid(self, wrapper: Any, target: Target) -> ActivationGrid:
        space = wrapper.quantization_target_spaces[OUTPUT]
        zero = int(space.zero_point.detach().round())
        return ActivationGrid(float(space.scale.detach()), space.qmin - zero, space.qmax - zero)


class DoReFa(Method):
    """Weights are 2 * round(levels * (tanh(v) / (2 max|tanh v|) + 1/2)) / levels - 1 (Zhou et al. 2016, equation 9).

    In the paper BatchNorm follows and restores each channel's scale; here it is folded into the weights, so each channel
    keeps a gain, and v starts where the weights were. The values are odd multiples of gain / levels: whole numbers that
    an int8 holds up to 7 bits. Gradients stay float: quantizing them serves hardware that trains in few bits.
    """

    nni, apply, scheme, per_channel = "DoReFaQuantizer", DOREFA_SCALED, "affine", False

    def config(self, target: Target, role: str) -> dict[str, Any]:
        return super().config(target, role) | {"quant_dtype": f"uint{target.bits}"}

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        shape = _per_channel_shape(wrapper)
        weight, gain = wrapper.weight.detach().clone(), target.high.reshape(shape)
        wrapper.quantization_target_spaces[WEIGHT].apply_method = self.apply
        wrapper.register_buffer("gain", torch.ones(()), persistent=False)
        with torch.no_grad():
            wrapper.weight.copy_(torch.atanh((weight / gain).clamp(-1, 1) * _ATANH_LIMIT))
        quantizer.is_init = False
        quantizer.initialize_scale_zp(wrapper, WEIGHT, weight)
        quantizer.is_init = True
        values = self._simulated(wrapper)
        fitted = ((weight * values).flatten(1).sum(1) / values.square().flatten(1).sum(1)).reshape(shape)
        wrapper.gain = widened(fitted, fitted.max())

    def _simulated(self, wrapper: Any) -> Tensor:
        space = wrapper.quantization_target_spaces[WEIGHT]
        with torch.no_grad():
            simulated: Tensor = wrapper._apply_quant_helper(wrapper.weight, space)
        return simulated.detach()

    def weight_grid(self, wrapper: Any, target: Target) -> WeightGrid:
        levels = 2**target.bits - 1
        return WeightGrid(tuple((wrapper.gain / levels).reshape(-1).tolist()), levels, target.bits)

    def final_weight(self, wrapper: Any) -> Tensor:
        """As simulated: float32 [channels, ...], on the grid."""
        return self._simulated(wrapper)


class Bnn(Method):
    """Weights are +a or -a (Courbariaux et al. 2016); a, one for each channel, is their mean magnitude, which stands in
    for the folded BatchNorm (Rastegari et al. 2016, "XNOR-Net", equation 6)."""

    nni, apply, per_channel = "BNNQuantizer", BINARY_SCALED, False

    def config(self, target: Target, role: str) -> dict[str, Any]:
        return super().config(target, role) | {"quant_dtype": None}

    def start(self, quantizer: Any, wrapper: Any, target: Target, role: str) -> None:
        quantizer.is_init = False
        quantizer.init_scale_zp(wrapper, WEIGHT, wrapper.weight)
        quantizer.is_init = True

    def weight_grid(self, wrapper: Any, target: Target) -> WeightGrid:
        return WeightGrid(tuple(_mean_magnitude(wrapper.weight).reshape(-1).tolist()), 1, 1)

    def final_weight(self, wrapper: Any) -> Tensor:
        """float32 [channels, ...], in each channel +a or -a."""
        weight = wrapper.weight.detach()
        return torch.where(weight < 0, -1.0, 1.0) * _mean_magnitude(weight)


WEIGHT_METHODS: dict[str, Method] = {
    "qat": Qat(), "ptq": Ptq(), "lsq": Lsq(), "lsq-plus": Lsq(), "dorefa": DoReFa(), "bnn": Bnn()}  # fmt: skip
ACTIVATION_METHODS: dict[str, Method] = {
    "qat": Qat(), "ptq": Ptq(), "lsq": Lsq(), "lsq-plus": LsqPlus(), "dorefa": Qat(), "bnn": Qat()}  # fmt: skip


def weight_target(name: str, weight: Tensor, bits: int, quantizer: str, estimator: Estimator) -> Target:
    """Where the grid of a weight, float32 [channels, ...], starts; learnt scales start at the least squared error."""
    levels = max(1, 2 ** (bits - 1) - 1)
    high = weight_thresholds(weight, levels, "mse" if quantizer.startswith("lsq") else estimator)
    if quantizer == "dorefa":
        high = weight_thresholds(weight, levels, "minmax")
    high = widened(high, high.max())
    return Target(name, bits, -high, high)


def widened(values: Tensor, largest: Tensor) -> Tensor:
    """`values`, float32 of shape [channels], none of them below its share of the layer's largest, a scalar."""
    return torch.maximum(values, largest * SMALLEST_CHANNEL)


def _mean_magnitude(weight: Tensor) -> Tensor:
    """Of each output channel, in a shape that multiplies the weight."""
    means = weight.detach().abs().flatten(1).mean(1)
    return widened(means, means.max()).reshape(-1, *[1] * (weight.dim() - 1))


def _per_channel_shape(wrapper: Any) -> tuple[int, ...]:
    return (-1, *[1] * (wrapper.weight.dim() - 1))


class _Exponential(nn.Module):
    """value = exp(gain * parameter)."""

    def forward(self, parameter: Tensor) -> Tensor:
        return (parameter * _GAIN).exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log() / _GAIN


class _Times(nn.Module):
    """value = factor * parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / self.factor


def _learn(wrapper: Any, name: str, start: Tensor, mapping: nn.Module) -> None:
    """Make the wrapper's tensor `name` a learnt one that begins at `start`."""
    if name in wrapper._parameters:
        delattr(wrapper, name)
    wrapper.register_parameter(name, nn.Parameter(start.detach().clone()))
    parametrize.register_parametrization(wrapper, name, mapping)
