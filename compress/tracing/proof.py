"""The proof of a graph: the module's own answers, for several images and numbers of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from compress.tracing.layers import buffers_kept
from compress.tracing.wording import Untraceable

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the module's largest output, in float32."""
BATCHES = (1, 3)


def prove(graph_module: fx.GraphModule, model: nn.Module, images: Tensor) -> None:
    """Compare the graph with the module it was taken from, both in the mode in which it was taken.

    Args:
        model: the module or a copy of it, runnable.
        images: [N, C, H, W] of the size to compare on; others are made of its shape.

    Raises:
        Untraceable: they differ, or the module differs from itself because it is random.
    """
    if images.is_meta or any(tensor.is_meta for tensor in model.parameters()):
        return  # a model without values has no answers
    with buffers_kept(model):
        _compare(graph_module, model, images)


def _compare(graph_module: fx.GraphModule, model: nn.Module, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        inputs = torch.randn(batch, *images.shape[1:], generator=generator).to(images)
        expected, got = _answer(model, inputs), _answer(graph_module, inputs)
        if expected is None or _equal(expected, got):
            continue
        again = _answer(model, inputs)
        if not _equal(expected, again):
            raise Untraceable(*_random_call(graph_module, inputs))
        raise Untraceable(
            f"gives other answers than the operations found in it for {batch} image{'s' * (batch > 1)} at once: it changes "
            "tensors or attributes in a way that cannot be followed"
        )


def _answer(model: nn.Module, images: Tensor) -> list[Tensor] | None:
    """None where it does not run, as some do not on a single image."""
    try:
        with torch.no_grad():
            answer = model(images.clone())
    except Exception:  # noqa: BLE001 - what a model raises is its author's choice
        return None
    return [leaf for leaf in _pytree.tree_leaves(_plain(answer)) if isinstance(leaf, Tensor)]


def _plain(answer: Any) -> Any:
    if hasattr(answer, "items"):
        return {key: _plain(value) for key, value in answer.items()}
    if hasattr(answer, "__dataclass_fields__"):
        return {key: _plain(getattr(answer, key)) for key in answer.__dataclass_fields__}
    return answer


def _equal(expected: list[Tensor], got: list[Tensor] | None) -> bool:
    if got is None or [one.shape for one in expected] != [one.shape for one in got]:
        return False
    scale = max((float(one.float().nan_to_num(0, 0, 0).abs().max()) for one in expected if one.numel()), default=0.0)
    pairs = zip(expected, got, strict=True)
    return all(torch.allclose(one.float(), two.float(), rtol=0, atol=TOLERANCE * scale, equal_nan=True)
               for one, two in pairs)  # fmt: skip


def _random_call(graph_module: fx.GraphModule, images: Tensor) -> tuple[str, Any]:
    """Why the model is called random, and the line of the call."""
    finder = _FindRandom(graph_module)
    with torch.no_grad():
        finder.run(images)
    if finder.node is None:
        return "answers the same image differently each time, even in evaluation; make it repeatable", None
    name = getattr(finder.node.target, "__name__", str(finder.node.target))
    advice = "give it training=self.training" if "dropout" in name else "use it while self.training is set only"
    return (
        f"answers the same image differently each time, even in evaluation, because {name}() is random there; {advice}",
        finder.node.meta.get("place"),
    )


class _FindRandom(fx.Interpreter):
    """Calls each function twice, and remembers the first that answers differently."""

    node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module") or self.node is not None:
            return super().run_node(n)
        inputs = self.fetch_args_kwargs_from_env(n)
        answers = []
        for _ in range(2):
            args, kwargs = _pytree.tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, inputs)
            answers.append([leaf for leaf in _pytree.tree_leaves(getattr(self, n.op)(n.target, args, kwargs))
                            if isinstance(leaf, Tensor)])  # fmt: skip
        if not all(torch.equal(one, two) for one, two in zip(*answers, strict=True)):
            self.node = n
        return super().run_node(n)
