"""The estimate before a run: counted from the plan, and equal to what the pruned model really has."""

from __future__ import annotations

import json

import pytest
import torch
from places import ROOT

from compress import pruning
from compress.errors import RequestError
from compress.models import architectures, counting
from compress.pruning import profiles
from compress.pruning.estimate import estimates

pytestmark = pytest.mark.integration

COVERAGE = ROOT / "docs" / "coverage.json"
FAMILIES = (
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "vgg11",
    "vit_b_16",
    "swin_v2_t",
)
"""Residual sums, depthwise, concatenations, whole groups, channel shuffles, a flattened map, attention, window attention."""


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_really_shrunk_models_have(name: str) -> None:
    """The coverage table was made by shrinking each model and counting it."""
    row = next(row for row in json.loads(COVERAGE.read_text())["rows"] if row["model"] == name)
    size = row["input_size"]
    build = architectures.build if name.startswith(profiles.NEED_NUMBERS) else architectures.build_empty
    model = build(architectures.fresh(name, 10, size))
    example = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    (found,) = estimates(model, example, [0.5])
    assert found.parameters / counting.count_parameters(model) == pytest.approx(row["parameters_kept"], abs=1e-12)
    close = 0.01 if name.startswith("swin_v2") else 1e-12  # its tables of positions do not all go with the heads
    assert found.macs / counting.count_macs(model, size) == pytest.approx(row["macs_kept"], rel=close)
    assert len(found.plan.unpruned) == len(row["left_out"])


@pytest.mark.parametrize(("sparsity", "multiple"), [(0.3, 8), (0.8, 1)])
def test_it_is_the_plan_and_the_model_of_a_run(sparsity: float, multiple: int) -> None:
    torch.manual_seed(0)
    model = architectures.build(architectures.fresh("resnet18", 10, 32)).eval()
    example = torch.rand(1, 3, 32, 32)
    plan = pruning.plan(model, example, sparsity=sparsity, multiple=multiple)
    (found,) = estimates(model, example, [sparsity], multiple=multiple)
    assert found.plan == plan
    shrunk = pruning.prune(model, example, plan, "l1-norm").model
    assert found.parameters == counting.count_parameters(shrunk)
    assert found.macs == counting.count_macs(shrunk, 32)


def test_a_profile_is_json_with_a_row_for_each_percent() -> None:
    found = profiles.profile("resnet18", 10, 32, 8)
    assert json.loads(json.dumps(found)) == found
    assert (found["parameters"], found["input_size"], list(found["rows"])[:2]) == (11_181_642, 32, ["1", "2"])
    counts = [row["parameters"] for row in found["rows"].values()]
    assert len(counts) == 99 and counts == sorted(counts, reverse=True) and counts[49] == 2_801_450
    layers, before, after, reason = found["rows"]["50"]["groups"][0]
    assert (before, after) == (64, 32)
    assert "conv1" in found["words"][layers].split() and "added" in found["words"][reason]
    assert profiles.profile("alexnet", 1000, None, 8)["input_size"] == 224
    with pytest.raises(RequestError, match="model: got 'resnet19'"):
        profiles.profile("resnet19", 10, None, 8)
