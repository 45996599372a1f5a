"""Memory layout and number format of training steps: the fastest one whose gradients are those of contiguous fp32.

A layout may be wrong without a sign of it. oneDNN (issue 6035; torch 2.14.1 on a CPU with AVX2, tried in child processes)
takes the gradient of the weights of a 1x1 convolution with a stride from memory that is not its own when the input lies
channels_last, in fp32, with 2 to 7 channels: strides 2, 3, (1, 2) and (2, 1), any number of outputs, whether or not the
input wants a gradient. With one thread the heap is corrupted (SIGABRT, SIGSEGV, SIGBUS); with two the gradient is 4 to 30
times its size off, or the call never returns. Right are 1 and from 8 channels, stride 1, kernels from 2, padding, groups,
transposed convolutions, bf16 autocast, and the forward pass.

So models with such a convolution never get that layout: no trial may meet a crash. Another process would take the
trial's harm as well, but starting one costs more than the trial (`import torch` alone: 3 to 10 s on two cores), and not every
module can be pickled. What the rule does not know is caught by comparing gradients.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress import memory
from compress.errors import TrainingError
from compress.models.calls import logits_of, own_errors

SAFE_CHANNELS = 8
"""From this many input channels of a group, a 1x1 convolution with a stride has right gradients channels_last."""
TOLERANCE, HALF_TOLERANCE = 1e-2, 1.0
"""Of a parameter's gradient in eval mode (norm of the difference over norm), in fp32 and in 16 bits. Measured: 2e-6 and 0.3 in
resnet50; in training mode, where BatchNorm passes every rounding on, 0.03 and 1.6, which tells less. Wrong ones are 4 to 30."""
NEGLIGIBLE = 1e-3
"""Of the largest gradient: those below it (of a bias before BatchNorm, for example) are rounding errors themselves."""
TIMED_STEPS = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """Memory layout and number format of the forward pass."""

    channels_last: bool
    autocast: torch.dtype | None

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{layout} {'fp32' if self.autocast is None else str(self.autocast).removeprefix('torch.')}"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def computing(self, place: torch.device) -> Any:
        """The context in which the forward pass is made."""
        return nullcontext() if self.autocast is None else torch.autocast(place.type, dtype=self.autocast)


PLAIN = Format(channels_last=False, autocast=None)


def fastest_format(model: nn.Module, images: Tensor) -> Format:
    """The quickest of the formats that are right for this model on this machine: a training step of a copy in each, in turn.

    Args:
        model: as it is trained, with the channels that pruning has left; unchanged.
        images: float32 [N, C, H, W] on its device, a batch as in training.

    Raises:
        ModelError: the model's own code stops in training mode.
        TrainingError: the model itself reorders its tensors so that no format is right.
    """
    candidates = [Format(True, None)] if allows_channels_last(model, images) else []
    if _has_fast_bfloat16(images.device):
        candidates.append(Format(bool(candidates), torch.bfloat16))
    plain = _Trial(model, PLAIN)
    with torch.random.fork_rng(_generators(images)):
        with own_errors(plain.model, in_training_mode(images)):
            plain.step(images)
        expected = _attempt(lambda: _Trial(model, PLAIN).gradients(images)) if candidates else None
        trials = [trial for layout in candidates if (trial := _right(model, layout, images, expected))]
        for _ in range(TIMED_STEPS if trials else 0):
            for trial in (plain, *trials):
                trial.time(images)
    return min([plain, *trials], key=lambda trial: trial.seconds).layout


def allows_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether no convolution that `model` computes on `images`, called as a layer or as a function, meets the bug above.

    The model is called once, in its modes, without gradients, on `images`, float32 [N, C, H, W].

    Raises:
        ModelError: its own code stops.
        TrainingError: it reorders tensors itself, and meets the bug in any layout.
    """
    copied = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    watch = _StridedPointwise()
    with (
        torch.random.fork_rng(_generators(images)),
        torch.no_grad(),
        own_errors(copied, in_training_mode(images)),
        watch,
    ):
        copied(images.contiguous())
    if watch.channels_last:
        raise TrainingError(
            f"The model brings {watch.channels_last} channels into the channels_last order before a 1 x 1 convolution with a "
            f"stride, whose gradients the CPU's library (oneDNN) computes wrongly below {SAFE_CHANNELS} channels: call "
            ".contiguous() on the input of that convolution, or set --finetune-epochs and --qat-epochs to 0."
        )
    return not watch.unsafe or images.device.type != "cpu"


class _StridedPointwise(TorchDispatchMode):
    """Sees every convolution, however it was called, and keeps those that channels_last must not meet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.unsafe = False
        self.channels_last = 0
        """Channels of one whose input is channels_last already; 0 when there is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            maps, weight, _, stride = args[:4]
            channels, kernel = weight.shape[1], weight.shape[2:]
            if max(kernel) == 1 and max(stride) > 1 and channels < SAFE_CHANNELS:
                self.unsafe = True
                if maps.device.type == "cpu" and channels > 1 and _is_channels_last(maps):
                    self.channels_last = channels
        return func(*args, **(kwargs or {}))


def _is_channels_last(maps: Tensor) -> bool:
    return maps.ndim == 4 and maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


class _Trial:
    """A copy of the model in one format."""

    def __init__(self, model: nn.Module, layout: Format) -> None:
        self.model = copy.deepcopy(model).to(memory_format=layout.memory_format)
        self.layout, self.seconds = layout, math.inf

    def gradients(self, images: Tensor) -> dict[str, Tensor]:
        """Of each trained parameter in eval mode, in which nothing is random."""
        self.model.eval()
        self.step(images)
        self.model.train()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return {name: gradient.float() for name, gradient in gradients.items() if gradient is not None}

    def step(self, images: Tensor) -> bool:
        batch = images.contiguous(memory_format=self.layout.memory_format)
        with self.layout.computing(images.device):
            answer = self.model(batch)
        logits_of(answer).float().square().mean().backward()
        return True

    def time(self, images: Tensor) -> None:
        start = time.perf_counter()
        self.step(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        self.seconds = min(self.seconds, time.perf_counter() - start)


def _right(model: nn.Module, layout: Format, images: Tensor, expected: dict[str, Tensor] | None) -> _Trial | None:
    """The trial after a first step; None where the model cannot be computed in this format, or gets other gradients."""
    trial = _Trial(model, layout)
    actual = _attempt(lambda: trial.gradients(images))
    tolerance = HALF_TOLERANCE if layout.autocast else TOLERANCE
    if expected is None or actual is None or not agree(expected, actual, tolerance):
        return None
    trained = _attempt(lambda: trial.step(images))  # in training mode; it also pays for the selection of kernels
    return trial if trained else None


def _attempt(step: Callable[[], T]) -> T | None:
    """What `step` returns; None when the model raises, as one may in a layout or mode that it was not written for."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - what a model raises is its author's choice
        if memory.ran_out(error):
            raise
        return None


def agree(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float) -> bool:
    """Whether every parameter's gradient, of the parameter's shape, is within `tolerance` of the expected one by norm."""
    if expected.keys() != actual.keys():
        return False
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = NEGLIGIBLE * max(norms.values(), default=0.0)
    return all(
        float((actual[name] - gradient).norm()) <= tolerance * max(norms[name], least)
        for name, gradient in expected.items()
    )


def in_training_mode(images: Tensor) -> str:
    """What a model is called for with `images`, [N, C, H, W], in the words of `own_errors`."""
    count, _, height, width = images.shape
    return f"in training mode, with {count} image{'s' * (count != 1)} of {width} x {height} pixels"


def _generators(images: Tensor) -> list[int]:
    """The GPUs whose random numbers a trial uses, beside the CPU's."""
    return [images.device.index or 0] if images.is_cuda else []


def _has_fast_bfloat16(place: torch.device) -> bool:
    if place.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())
