"""Whether a plan removes far less than what was asked for, why, and what would help."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from compress.pruning.plan import Plan, Unpruned

FAR_BELOW = 0.5
"""A plan falls short when it removes less than this share of the sparsity asked for. Removing the fraction s of every
layer's channels removes between s of the parameters (where only outputs or only inputs go) and 1 - (1 - s)^2."""
NAMED = 3
"""Reasons that are told, of those that keep the most parameters."""
WORTH_TELLING = 0.01
"""Of all parameters."""


def shortfall(
    model: nn.Module,
    plan: Plan,
    sparsity: float,
    multiple: int,
    parameters_kept: int,
    macs_removed: float | None = None,
) -> str | None:
    """What to tell the user of a plan that removes little; None where it removes about what was asked.

    Layers that the user keeps whole count as asked for.

    Args:
        model: the module that the plan was made for.
        sparsity: fraction of the channels that should go.
        multiple: kept channels are multiples of this.
        parameters_kept: of the pruned model.
        macs_removed: fraction of the multiply-accumulates.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {left.layer: _own_parameters(model, left.layer) for left in plan.unpruned}
    asked = sum(sizes[left.layer] for left in plan.unpruned if left.kind == "asked")
    removed, open_to_pruning = total - parameters_kept, total - asked
    if not plan.groups or open_to_pruning <= 0 or removed >= FAR_BELOW * sparsity * open_to_pruning:
        return None
    macs = "" if macs_removed is None else f" ({_percent(macs_removed)} of the multiply-accumulates)"
    whole = [left for left in plan.unpruned if left.kind != "asked"]
    share = sum(sizes[left.layer] for left in whole) / total
    because = (
        f"{_percent(share)} of them are in layers that stay whole: {_reasons(whole, sizes, total)}"
        if share > sparsity / 2
        else f"of most layers only a few channels can go, as they keep multiples of {multiple} and whole groups"
    )
    return (
        f"Only {_percent(removed / total)} of the parameters{macs} can be removed at {_percent(sparsity)} sparsity: "
        f"{because}. To get further: {_advice(whole, sizes, multiple)}."
    )


def _reasons(whole: list[Unpruned], sizes: dict[str, int], total: int) -> str:
    """The reasons that keep most, each with its layers."""
    by_cause: Mapping[str, list[Unpruned]] = defaultdict(list)
    for left in whole:
        by_cause[left.cause].append(left)
    weights = {cause: sum(sizes[left.layer] for left in layers) for cause, layers in by_cause.items()}
    told = []
    by_cause = {cause: layers for cause, layers in by_cause.items() if weights[cause] >= WORTH_TELLING * total}
    for cause in sorted(by_cause, key=lambda cause: -weights[cause])[:NAMED]:
        layers = sorted(by_cause[cause], key=lambda left: -sizes[left.layer])
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        reason = cause if cause.startswith("its ") else f"it {cause}"
        told.append(f"{_percent(weights[cause] / total)} in {layers[0].layer}{more} ({reason})")
    left = len(by_cause) - len(told)
    return "; ".join(told) + (f"; and {left} more reasons" if left > 1 else "; and one more reason" if left else "")


def _advice(whole: list[Unpruned], sizes: dict[str, int], multiple: int) -> str:
    kinds = {left.kind for left in whole if sizes[left.layer] > 0}
    advice = []
    if "structure" in kinds:
        advice.append("write the operations named here so that each channel is treated alone, where that is possible")
    if "size" in kinds and multiple > 1:
        advice.append(f"let layers keep any number of channels (channel_multiple=1, now {multiple})")
    advice.append("raise the sparsity, which takes more from the layers that can be pruned, or take a smaller network")
    return "; ".join(advice)


def _own_parameters(model: nn.Module, layer: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(layer).parameters())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
