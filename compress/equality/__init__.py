"""A model passing from one form to the next: both answer the same images, and the run ends when they differ too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from compress import machine
from compress.errors import HandoffError
from compress.report import Handoff
from compress.tasks import CLASSIFICATION, Difference, Task

Precision = Literal["fp32", "fp16", "int8"]
"""That a file was written in."""
GRAPH_TOLERANCE = 1e-4
"""Of the largest logit, between two forms of one float model in torch."""
FLOAT_TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of the largest logit: torch and the runtimes add numbers in different orders."""
AGREEMENT, RMS = 0.98, 0.02
"""A quantized file passes with this share of equal top-1 answers, or when its logits are this near (root mean square), as a
share of the largest logit (a model with random weights has no clear top-1). The grids are the same; where an
activation lies on the border of two codes the order of float additions decides, and the codes after it follow."""
QUANTIZED_RULE = f"{AGREEMENT:.0%} equal top-1, or logits within {RMS:.0%} (root mean square)"


def row(source: str, target: str, check: str, difference: Difference, tolerance: str, passed: bool) -> Handoff:
    """A hand-off as the report lists it."""
    return Handoff(
        source=source,
        target=target,
        check=check,
        max_abs_diff=difference.max_abs_diff,
        reference_scale=difference.reference_scale,
        top1_agreement=difference.top1_agreement,
        n_images=difference.n_images,
        tolerance=tolerance,
        passed=passed,
    )


def judge(
    source: str,
    target: str,
    expected: np.ndarray,
    got: np.ndarray,
    precision: Precision = "fp32",
    task: Task = CLASSIFICATION,
) -> Handoff:
    """A file or an engine against the torch model that it was made from.

    Args:
        source, target: the two, as the report calls them.
        expected, got: their outputs on the same images, float32 [N, ...].
        precision: of the file; "int8" is compared with the fake-quantized model, by `QUANTIZED_RULE`.
    """
    if precision == "int8":
        return judge_grids(source, target, expected, got, task)
    tolerance, difference = HALF_TOLERANCE if precision == "fp16" else FLOAT_TOLERANCE, task.compare(expected, got)
    allowed = f"{tolerance:g} of the largest logit"
    return row(source, target, "logits", difference, allowed, difference.relative <= tolerance)


def judge_grids(
    source: str, target: str, expected: np.ndarray, got: np.ndarray, task: Task = CLASSIFICATION
) -> Handoff:
    """Two executions of one quantized model; outputs float32 [N, ...]."""
    difference = task.compare(expected, got)
    return row(source, target, "top-1 and logits", difference, QUANTIZED_RULE, same(expected, got, task))


def same(expected: np.ndarray, got: np.ndarray, task: Task = CLASSIFICATION) -> bool:
    """Whether two executions of one quantized model agree, by `QUANTIZED_RULE`; outputs float32 [N, ...]."""
    difference = task.compare(expected, got)
    rms = float(np.sqrt(np.mean(np.square(expected - got))))
    return difference.top1_agreement >= AGREEMENT or rms <= RMS * difference.reference_scale


def checked(handoff: Handoff, where: str = "") -> Handoff:
    """`handoff`, or `HandoffError` with both numbers when it is out of tolerance.

    Args:
        where: a sentence that says where the target leaves the source, where that is known.
    """
    if not handoff.passed:
        raise HandoffError(
            f"{handoff.source} and {handoff.target} answer differently: the logits differ by up to "
            f"{handoff.max_abs_diff:.3g} of {handoff.reference_scale:.3g} and "
            f"{100 * handoff.top1_agreement:.1f} % of {handoff.n_images} images get the same class, where "
            f"{handoff.tolerance} is allowed. {where and f'{where} '}Nothing is handed on; please report this model."
        )
    return handoff


# ---- forms of one float model in torch ----------------------------------------------------------------------------


def few(images: Tensor) -> Tensor:
    """As many of `images` [N, C, H, W] as prove that two forms of a model are one function, and at least two."""
    images = images[: 16 if images.shape[-1] <= 96 else 4]
    return images if len(images) > 1 else torch.cat([images, images.flip(-1)])


def answers(model: nn.Module, images: Tensor) -> np.ndarray:
    """What `model`, as its modes are, says of `images` [N, C, H, W]: every tensor of its answer, [N, numbers]."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), images.device)
    with torch.no_grad():
        answer = model(images.clone().to(device))
    tensors = [leaf for leaf in _pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.float().cpu().reshape(len(images), -1) for leaf in tensors], 1).numpy()


def same_function(
    source: str, target: str, expected: np.ndarray, got: np.ndarray, where: Callable[[], str] = lambda: ""
) -> Handoff:
    """The row of two forms of one float model; both [N, numbers].

    Raises `HandoffError`, with the sentence of `where`, beyond 1e-4 of the largest number.
    """
    difference = CLASSIFICATION.compare(np.nan_to_num(expected, posinf=0, neginf=0), np.nan_to_num(got, posinf=0, neginf=0))
    passed = difference.max_abs_diff <= GRAPH_TOLERANCE * difference.reference_scale
    passed = passed and np.array_equal(np.isfinite(expected), np.isfinite(got))
    found = row(source, target, "logits", difference, f"{GRAPH_TOLERANCE:g} of the largest logit", passed)
    return found if passed else checked(found, where())


class Proof:
    """Compares the graphs that a model becomes, one after the other, with the model.

    Args:
        model: in eval mode; only read.
        images: float32 [N, C, H, W], normalised.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._model, self._images = model, images
        self._expected = answers(model, images)
        self.rows: list[Handoff] = []

    def compare(self, target: str, graph_module: fx.GraphModule) -> None:
        """Adds a row for this form. Raises `HandoffError`, which names the layers between which the two part."""
        got = answers(graph_module, self._images)
        self.rows.append(
            same_function("model, torch", target, self._expected, got, lambda: self._parting(graph_module))
        )

    def _parting(self, graph_module: fx.GraphModule) -> str:
        """The first layer, as both call it, whose output differs; one that took in a BatchNorm differs rightly."""
        ours, theirs = _layer_outputs(self._model, self._images[:2]), _layer_outputs(graph_module, self._images[:2])
        last = "the image"
        for (name, number), output in theirs.items():
            if (name, number) not in ours or not _same_tensors(self._model, graph_module, name):
                continue
            expected = ours[name, number]
            if expected.shape != output.shape or not _near(expected, output):
                return f"They part between {last} and {name}."
            last = name
        return f"They part after {last}."


def _layer_outputs(model: nn.Module, images: Tensor) -> dict[tuple[str, int], Tensor]:
    """(module without parts, number of its call) -> what it gave, in the order of the calls."""
    found: dict[tuple[str, int], Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            found[name, calls[name]] = output.clone()
            calls[name] += 1

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        answers(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _same_tensors(model: nn.Module, other: nn.Module, name: str) -> bool:
    tensors = [dict(one.get_submodule(name).named_parameters()) for one in (model, other)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


def _near(expected: Tensor, got: Tensor) -> bool:
    return float((expected - got).abs().max()) <= GRAPH_TOLERANCE * float(expected.abs().max())


# ---- what is told -------------------------------------------------------------------------------------------------


def saturation() -> str:
    """Why 8-bit answers go wrong on this CPU and what to do, as the end of a sentence's paragraph; else empty."""
    if machine.has_int8_dot_product():
        return ""
    return (
        " This CPU has no int8 dot product, and sums of 8-bit products (u8s8) saturate in its kernels: choose "
        "onnxruntime, or --weight-bits 7, which cannot saturate."
    )
