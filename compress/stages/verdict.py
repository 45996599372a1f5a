"""Is int8 worth it here? One sentence for each runtime, from medians of the same race and the kernels it really chose."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.engines import Kernel

FASTER, SLOWER = 1.05, 0.95
"""Ratios of medians between these are no difference: the machine's own noise is of that order."""
NAMED_LAYERS = 4


@dataclass(frozen=True)
class Raced:
    """One runtime's medians in milliseconds per image, all of one structure, and what its int8 session is made of."""

    runtime: str
    variant: str
    """The float model of the structure."""
    fp32_ms: float
    int8_ms: float
    half: tuple[str, float] | None
    """bf16 or fp16 as read back, and its median; None where the runtime offers neither on this machine."""
    kernels: Sequence[Kernel]
    conversions: int | None
    """Operations left that only turn floats into integers or back."""
    agrees: bool
    """Whether its int8 answers are those of the model."""

    @property
    def best(self) -> tuple[str, float]:
        """The precision that int8 has to beat, and its median."""
        return min([("fp32", self.fp32_ms), *([self.half] if self.half else [])], key=lambda row: row[1])

    @property
    def speedup(self) -> float:
        return self.best[1] / self.int8_ms

    @property
    def pays(self) -> bool:
        return self.speedup >= FASTER and self.agrees

    @property
    def float_layers(self) -> tuple[str, ...]:
        return tuple(kernel.name for kernel in self.kernels if kernel.precision != "int8")


def to_exclude(raced: Raced, quantized_layers: Collection[str]) -> dict[str, int]:
    """`layer_bits` that takes the integers from layers which run in floating point all the same; empty where int8 pays.

    Args:
        quantized_layers: those with an integer grid in the file; only they can be excluded.
    """
    return {} if raced.pays else {name: 32 for name in raced.float_layers if name in quantized_layers}


def judge(raced: Raced, excluded: Mapping[str, int], excluded_ms: float | None) -> dict[str, Any]:
    """The fields of `compress.report.Worth`.

    Args:
        excluded: what `to_exclude` found.
        excluded_ms: median of the file without those layers' integers; None where there is none.
    """
    (precision, best), speedup = raced.best, raced.speedup
    against = f"{raced.int8_ms:.2f} ms against {best:.2f} ms in {precision} of the same structure"
    text = (
        f"On {raced.runtime} int8 answers wrongly here, so its speed is worth nothing."
        if not raced.agrees
        else f"On {raced.runtime} int8 is worth it: {against}, {speedup:.1f}x as fast{_other(raced, precision)}."
        if raced.pays
        else f"On {raced.runtime} int8 is not worth it: {against}, {_slower(speedup)}{_other(raced, precision)}. "
        f"{_why(raced)} {_fix(raced, excluded, excluded_ms)}"
    )
    return {
        "runtime": raced.runtime,
        "variant": raced.variant,
        "text": text,
        "fp32_ms": raced.fp32_ms,
        "half_precision": raced.half and raced.half[0],
        "half_ms": raced.half and raced.half[1],
        "int8_ms": raced.int8_ms,
        "speedup": speedup,
        "float_layers": list(raced.float_layers),
        "conversions": raced.conversions,
        "layer_bits": dict(excluded),
        "excluded_ms": excluded_ms,
    }


def _slower(speedup: float) -> str:
    return f"{1 / speedup:.1f}x SLOWER" if speedup <= SLOWER else "no difference"


def _other(raced: Raced, best: str) -> str:
    """The precision that the comparison is not with."""
    if raced.half is None:
        return " (it computes with no 16-bit floats here)"
    precision, median = ("fp32", raced.fp32_ms) if best != "fp32" else raced.half
    return f" ({precision}: {median:.2f} ms)"


def _why(raced: Raced) -> str:
    floats = raced.float_layers
    left = "" if raced.conversions is None else f" Conversions between floats and integers left: {raced.conversions}."
    if not floats:
        return f"All {len(raced.kernels)} layers run on integers, so the time goes elsewhere.{left}"
    names = ", ".join(floats[:NAMED_LAYERS]) + (" ..." if len(floats) > NAMED_LAYERS else "")
    return f"{len(floats)} of {len(raced.kernels)} layers stay in floating point ({names}).{left}"


def _fix(raced: Raced, excluded: Mapping[str, int], excluded_ms: float | None) -> str:
    deploy = f"deploy {raced.variant}.onnx on this runtime."
    if not excluded:
        return f"There is no layer to exclude: {deploy}"
    wish = f"`layer_bits` {json.dumps(dict(excluded))}"
    if excluded_ms is None:
        return f"It takes no file in which those layers are floats ({wish}): {deploy}"
    gain = raced.best[1] / excluded_ms
    if gain < FASTER:
        return f"With those layers in floating point ({wish}) it takes {excluded_ms:.2f} ms, no gain either: {deploy}"
    return f"Ask for {wish}: with those layers in floating point it takes {excluded_ms:.2f} ms, {gain:.1f}x as fast."
