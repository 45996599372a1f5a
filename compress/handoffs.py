"""A model passing from one form to the next: both answer the same images, and the run ends when they differ too much."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress import machine
from compress.errors import HandoffError
from compress.evaluation import Difference, compare
from compress.quantization import LocalNoise, noisiest

Facts = dict[str, Any]

FLOAT_TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of the largest logit: torch and the runtimes add numbers in different orders."""
AGREEMENT, RMS = 0.98, 0.02
"""A quantized file passes with this share of equal top-1 answers, or when its logits are this near (root mean square), as a
share of the largest logit (a model with random weights has no clear top-1). The grids are the same; where an
activation lies on the border of two codes the order of float additions decides, and the codes after it follow."""
QUANTIZED_RULE = f"{AGREEMENT:.0%} equal top-1, or logits within {RMS:.0%} (root mean square)"


def row(source: str, target: str, check: str, difference: Difference, tolerance: str, passed: bool) -> Facts:
    """A hand-off as the report lists it."""
    return {
        "source": source,
        "target": target,
        "check": check,
        "max_abs_diff": difference.max_abs_diff,
        "reference_scale": difference.reference_scale,
        "top1_agreement": difference.top1_agreement,
        "n_images": difference.n_images,
        "tolerance": tolerance,
        "passed": passed,
    }


def judge(variant: str, target: str, expected: np.ndarray, got: np.ndarray) -> Facts:
    """The file or engine `target` of a variant against the torch model that it was made from; logits [N, classes]."""
    if variant == "quantized":
        difference = compare(expected, got)
        return row("fake-quantized, torch", target, "top-1 and logits", difference, QUANTIZED_RULE, same(expected, got))
    tolerance, difference = HALF_TOLERANCE if variant == "half" else FLOAT_TOLERANCE, compare(expected, got)
    allowed = f"{tolerance:g} of the largest logit"
    return row(f"{variant}, torch", target, "logits", difference, allowed, difference.relative <= tolerance)


def same(expected: np.ndarray, got: np.ndarray) -> bool:
    """Whether two executions of one quantized model answer alike, by `QUANTIZED_RULE`; logits [N, classes]."""
    difference = compare(expected, got)
    rms = float(np.sqrt(np.mean(np.square(expected - got))))
    return difference.top1_agreement >= AGREEMENT or rms <= RMS * difference.reference_scale


def checked(found: Facts, noise: list[LocalNoise] | None = None) -> Facts:
    """`found`, or `HandoffError` with both numbers when it is out of tolerance.

    Args:
        noise: where the target leaves the source, point by point, where that is known; the worst is named.
    """
    if not found["passed"]:
        raise HandoffError(
            f"{found['source']} and {found['target']} answer differently: the logits differ by up to "
            f"{found['max_abs_diff']:.3g} of {found['reference_scale']:.3g} and "
            f"{100 * found['top1_agreement']:.1f} % of {found['n_images']} images get the same class, where "
            f"{found['tolerance']} is allowed. {_where(noise)}The file is not handed on; please report this model."
        )
    return found


def _where(noise: list[LocalNoise] | None) -> str:
    if not noise:
        return ""
    worst = noisiest(noise)
    return f"They part at {worst.name}: given the same inputs, its output has {worst.sqnr_db:.1f} dB of SQNR. "


def saturation() -> str:
    """Why 8-bit answers go wrong on this CPU and what to do, as the end of a sentence's paragraph; else empty."""
    if machine.has_int8_dot_product():
        return ""
    return (
        " This CPU has no int8 dot product, and sums of 8-bit products (u8s8) saturate in its kernels: choose "
        "onnxruntime, or --weight-bits 7, which cannot saturate."
    )
