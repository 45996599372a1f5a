"""Is int8 worth it here? One sentence for each runtime, from medians of the same race and the kernels it really chose."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from compress.engines.base import Kernel
from compress.report import Worth

FASTER, SLOWER = 1.05, 0.95
"""Ratios of medians between these are no difference: the machine's own noise is of that order."""
NAMED_LAYERS = 4


@dataclass(frozen=True)
class LatencyComparison:
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


def to_exclude(comparison: LatencyComparison, quantized_layers: Collection[str]) -> dict[str, int]:
    """`layer_bits` that takes the integers from layers which run in floating point all the same; empty where int8 pays.

    Args:
        quantized_layers: those with an integer grid in the file; only they can be excluded.
    """
    return {} if comparison.pays else {name: 32 for name in comparison.float_layers if name in quantized_layers}


def judge(comparison: LatencyComparison, excluded: Mapping[str, int], excluded_ms: float | None) -> Worth:
    """Whether int8 pays on one runtime, in a sentence and numbers.

    Args:
        excluded: what `to_exclude` found.
        excluded_ms: median of the file without those layers' integers; None where there is none.
    """
    (precision, best), speedup = comparison.best, comparison.speedup
    against = f"{comparison.int8_ms:.2f} ms against {best:.2f} ms in {precision} of the same structure"
    text = (
        f"On {comparison.runtime} int8 answers wrongly here, so its speed is worth nothing."
        if not comparison.agrees
        else f"On {comparison.runtime} int8 is worth it: {against}, {speedup:.1f}x as fast{_other(comparison, precision)}."
        if comparison.pays
        else f"On {comparison.runtime} int8 is not worth it: {against}, {_slower(speedup)}{_other(comparison, precision)}. "
        f"{_why(comparison)} {_fix(comparison, excluded, excluded_ms)}"
    )
    return Worth(
        runtime=comparison.runtime,
        variant=comparison.variant,
        text=text,
        fp32_ms=comparison.fp32_ms,
        half_precision=comparison.half and comparison.half[0],
        half_ms=comparison.half and comparison.half[1],
        int8_ms=comparison.int8_ms,
        speedup=speedup,
        float_layers=comparison.float_layers,
        conversions=comparison.conversions,
        layer_bits=dict(excluded),
        excluded_ms=excluded_ms,
    )


def _slower(speedup: float) -> str:
    return f"{1 / speedup:.1f}x SLOWER" if speedup <= SLOWER else "no difference"


def _other(comparison: LatencyComparison, best: str) -> str:
    """The precision that the comparison is not with."""
    if comparison.half is None:
        return " (it computes with no 16-bit floats here)"
    precision, median = ("fp32", comparison.fp32_ms) if best != "fp32" else comparison.half
    return f" ({precision}: {median:.2f} ms)"


def _why(comparison: LatencyComparison) -> str:
    floats = comparison.float_layers
    left = "" if comparison.conversions is None else f" Conversions between floats and integers left: {comparison.conversions}."
    if not floats:
        return f"All {len(comparison.kernels)} layers run on integers, so the time goes elsewhere.{left}"
    names = ", ".join(floats[:NAMED_LAYERS]) + (" ..." if len(floats) > NAMED_LAYERS else "")
    return f"{len(floats)} of {len(comparison.kernels)} layers stay in floating point ({names}).{left}"


def _fix(comparison: LatencyComparison, excluded: Mapping[str, int], excluded_ms: float | None) -> str:
    deploy = f"deploy {comparison.variant}.onnx on this runtime."
    if not excluded:
        return f"There is no layer to exclude: {deploy}"
    wish = f"`layer_bits` {json.dumps(dict(excluded))}"
    if excluded_ms is None:
        return f"It takes no file in which those layers are floats ({wish}): {deploy}"
    gain = comparison.best[1] / excluded_ms
    if gain < FASTER:
        return f"With those layers in floating point ({wish}) it takes {excluded_ms:.2f} ms, no gain either: {deploy}"
    return f"Ask for {wish}: with those layers in floating point it takes {excluded_ms:.2f} ms, {gain:.1f}x as fast."
