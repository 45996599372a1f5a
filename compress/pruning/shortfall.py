"""Whether a plan removes far less than the sparsity that the user set, why, and what would help."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from compress.pruning.interface import Plan, Unpruned, clause

FAR_BELOW = 0.5
"""A plan falls short when it removes less than this share of the sparsity. Removing the fraction s of every layer's
channels removes between s of the parameters (where only outputs or only inputs go) and 1 - (1 - s)^2."""
NAMED = 3
"""Number of reasons in the text: those that keep the most parameters."""
WORTH_NAMING = 0.01
"""Share of all parameters that a reason has to keep to be named."""


def shortfall(
    model: nn.Module,
    plan: Plan,
    sparsity: float,
    multiple: int,
    parameters_kept: int,
    macs_removed: float | None = None,
) -> str | None:
    """A text for the user of a plan that removes little; None where it removes about the sparsity.

    Layers that the user excludes or gives a sparsity of 0 are left out of the account.

    Args:
        model: the module that the plan was made for.
        sparsity: fraction of the channels to remove; 0 < sparsity < 1.
        multiple: kept channels are multiples of this.
        parameters_kept: number of parameters of the pruned model.
        macs_removed: fraction of the multiply-accumulates, 0..1.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {layer.layer: _own_parameters(model, layer.layer) for layer in plan.unpruned}
    excluded = sum(sizes[layer.layer] for layer in plan.unpruned if layer.kind == "asked")
    removed, prunable = total - parameters_kept, total - excluded
    if not plan.groups or prunable <= 0 or removed >= FAR_BELOW * sparsity * prunable:
        return None
    macs = "" if macs_removed is None else f" ({_percent(macs_removed)} of the multiply-accumulates)"
    unpruned = [layer for layer in plan.unpruned if layer.kind != "asked"]
    share = sum(sizes[layer.layer] for layer in unpruned) / total
    because = (
        f"{_percent(share)} of them are in layers that are not pruned: {_reasons(unpruned, sizes, total)}"
        if share > sparsity / 2
        else f"most layers can lose only a few channels, as they keep multiples of {multiple} and whole groups"
    )
    return (
        f"Only {_percent(removed / total)} of the parameters{macs} can be removed at {_percent(sparsity)} sparsity: "
        f"{because}. To get further: {_advice(unpruned, sizes, multiple)}."
    )


def _reasons(unpruned: Sequence[Unpruned], sizes: dict[str, int], total: int) -> str:
    """The reasons that keep the most parameters, each with its layers."""
    by_cause: dict[str, list[Unpruned]] = defaultdict(list)
    for layer in unpruned:
        by_cause[layer.cause].append(layer)
    weights = {cause: sum(sizes[layer.layer] for layer in layers) for cause, layers in by_cause.items()}
    causes = sorted((cause for cause in by_cause if weights[cause] >= WORTH_NAMING * total), key=lambda c: -weights[c])
    texts = []
    for cause in causes[:NAMED]:
        layers = sorted(by_cause[cause], key=lambda layer: -sizes[layer.layer])
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        texts.append(f"{_percent(weights[cause] / total)} in {layers[0].layer}{more} ({clause('it', cause)})")
    rest = len(causes) - len(texts)
    return "; ".join(texts) + (f"; and {rest} more reasons" if rest > 1 else "; and one more reason" if rest else "")


def _advice(unpruned: Sequence[Unpruned], sizes: dict[str, int], multiple: int) -> str:
    kinds = {layer.kind for layer in unpruned if sizes[layer.layer] > 0}
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
