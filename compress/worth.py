"""Is int8 worth it here? One sentence for each runtime, from medians of the same race and the kernels it really chose."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
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


def judge(raced: Raced, quantized_layers: Collection[str]) -> dict[str, Any]:
    """The fields of `compress.report.Worth`.

    Args:
        quantized_layers: those with an integer grid in the file; only they can be excluded.
    """
    precision, best = min([("fp32", raced.fp32_ms), *([raced.half] if raced.half else [])], key=lambda row: row[1])
    speedup = best / raced.int8_ms
    floats = tuple(kernel.name for kernel in raced.kernels if kernel.precision != "int8")
    pays = speedup >= FASTER and raced.agrees
    excluded = {} if pays else {name: 32 for name in floats if name in quantized_layers}
    against = f"{raced.int8_ms:.2f} ms against {best:.2f} ms in {precision} of the same structure"
    text = (
        f"On {raced.runtime} int8 answers wrongly here, so its speed is worth nothing."
        if not raced.agrees
        else f"On {raced.runtime} int8 is worth it: {against}, {speedup:.1f}x as fast{_other(raced, precision)}."
        if pays
        else f"On {raced.runtime} int8 is not worth it: {against}, {_slower(speedup)}{_other(raced, precision)}. "
        f"{_why(raced, floats)} {_fix(raced, excluded)}"
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
        "float_layers": list(floats),
        "conversions": raced.conversions,
        "layer_bits": excluded,
    }


def _slower(speedup: float) -> str:
    return f"{1 / speedup:.1f}x SLOWER" if speedup <= SLOWER else "no difference"


def _other(raced: Raced, best: str) -> str:
    """The precision that the comparison is not with."""
    if raced.half is None:
        return " (it computes with no 16-bit floats here)"
    precision, median = ("fp32", raced.fp32_ms) if best != "fp32" else raced.half
    return f" ({precision}: {median:.2f} ms)"


def _why(raced: Raced, floats: Sequence[str]) -> str:
    left = "" if raced.conversions is None else f" Conversions between floats and integers left: {raced.conversions}."
    if not floats:
        return f"All {len(raced.kernels)} layers run on integers, so the time goes elsewhere.{left}"
    names = ", ".join(floats[:NAMED_LAYERS]) + (" ..." if len(floats) > NAMED_LAYERS else "")
    return f"{len(floats)} of {len(raced.kernels)} layers stay in floating point ({names}).{left}"


def _fix(raced: Raced, excluded: dict[str, int]) -> str:
    if not excluded:
        return f"There is no layer to exclude: deploy {raced.variant}.onnx on this runtime."
    return (
        f"Ask for `layer_bits` {json.dumps(excluded)}: those layers then need no conversions around them "
        f"(not measured here); or deploy {raced.variant}.onnx on this runtime."
    )
