"""Every graph that a model becomes is compared with the model, and one that answers differently is handed to nobody."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from user_modules_quantization import InPlaceSkip, Names, Odd, OwnProjection, Statements, built, images

from compress import equality, tracing
from compress.errors import HandoffError
from compress.quantization import (
    PROOFS,
    assign_bits,
    left_float,
    prepare,
    quantization_points,
    quantize,
    quantized_layers,
)
from compress.quantization import prepare as prepare_function
from compress.quantization.convert import convert
from compress.tracing import functional

prepare_file = __import__("sys").modules[prepare_function.__module__]


@pytest.mark.parametrize("kind", [InPlaceSkip, Statements, Names, OwnProjection, Odd])
def test_the_prepared_graph_is_the_model(kind):
    model = built(kind)
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, images())
    assert [row.target for row in prepared.meta[PROOFS]] == [
        f"{form} graph, torch" for form in ("traced", "folded", "prepared")
    ]
    assert all(row.passed and row.n_images == 8 for row in prepared.meta[PROOFS])
    others = torch.randn(5, 3, 16, 16)
    expected, got = equality.answers(model, others), equality.answers(prepared, others)
    assert abs(expected - got).max() <= 1e-5 * abs(expected).max()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_points_and_constants_take_free_names():
    model = built(Names)
    prepared = prepare(model, images())
    layers = ("conv", "q_conv", "q_relu", "a.b_c", "a_b.c", "head.0", "head.4")
    assert quantized_layers(prepared) == layers, "an attribute of the caller's own says nothing"
    points = quantization_points(prepared)
    assert not set(points) & {"q_conv", "q_relu", "q_relu_1"} and len(points) == len(set(points))
    assert torch.equal(prepared.constant_exp, model.constant_exp) and torch.equal(
        prepared.constant_exp_2, model.offset.exp()
    )
    assert model.inplace and model.keep_float


def test_a_part_of_the_attentions_own_keeps_its_name():
    layers = quantized_layers(prepare(built(OwnProjection), images()))
    assert layers == ("patch", "attention.in_proj_2", "attention.out_proj", "attention.in_proj", "head")


def test_slices_that_keep_everything_are_gone_and_sizes_get_no_point():
    prepared = prepare(built(Odd), images())
    targets = [node.target for node in prepared.graph.nodes]
    assert "narrow" not in targets
    assert not any(isinstance(arg, slice) for node in prepared.graph.nodes for arg in _flat(node.args))
    sources = {point.source for point in quantization_points(prepared).values()}
    assert not any("size" in source for source in sources)


def test_a_slice_of_the_batch_stays():
    class First(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[:8]

    prepared = prepare(First(nn.Conv2d(3, 4, 16), nn.Flatten()), images(8))
    assert len(prepared(images(9))) == 8


def test_a_concatenation_of_a_list_may_be_negative():
    prepared = prepare(built(Odd), images())
    assert not any(point.non_negative for point in quantization_points(prepared).values() if "cat" in point.source)


def test_a_layer_whose_weights_the_model_also_reads_stays_float():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

        def forward(self, x):
            x = self.fc(self.conv(x).mean((2, 3)))
            return x @ self.fc.weight

    prepared = prepare(built(Tied), images())
    assert quantized_layers(prepared) == ("conv",)
    reasons = {row["layer"]: row["reason"] for row in left_float(prepared)}
    assert "the model reads this layer's weights itself" in reasons["fc"]
    quantized = quantize(prepared, assign_bits(prepared, 8, 8), calibration=[images()], train=None)
    assert convert(quantized)(images()).shape == (8, 8)


def test_an_in_place_operation_taken_for_another_is_found(monkeypatch):
    """What the comparison is there for: readers of a changed tensor that are not redirected."""

    def forget(graph_module: fx.GraphModule, _: object) -> None:
        for module in graph_module.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False

    monkeypatch.setattr("compress.quantization.attention.make_functional", forget)
    with pytest.raises(
        HandoffError, match=r"model, torch and traced graph, torch answer differently: .* They part between"
    ):
        prepare(built(InPlaceSkip), images())


def test_a_fold_that_is_wrong_is_found(monkeypatch):
    def wrong(graph_module: fx.GraphModule) -> None:
        graph_module.get_submodule("conv").weight.data.mul_(1.01)

    monkeypatch.setattr(prepare_file, "fold", wrong)
    with pytest.raises(HandoffError, match="model, torch and folded graph, torch answer differently"):
        prepare(built(Statements), images())


def test_points_that_are_set_wrongly_are_found_and_the_place_is_named(monkeypatch):
    insert = prepare_file.insert_points

    def wrong(graph_module: fx.GraphModule) -> None:
        insert(graph_module)
        node = next(node for node in graph_module.graph.nodes if node.target == "conv")
        node.replace_input_with(node.args[0], node.args[0].args[0].args[0])

    monkeypatch.setattr(prepare_file, "insert_points", wrong)
    with pytest.raises(
        HandoffError, match=r"prepared graph, torch answer differently.* They part between act and conv\."
    ):
        prepare(built(InPlaceSkip), images())


def test_an_operation_that_cannot_be_made_functional_is_refused_in_words(monkeypatch):
    def refuse(*_):
        raise functional.InPlaceError("The operation `f` changes a tensor in place.")

    monkeypatch.setattr("compress.quantization.attention.make_functional", refuse)
    with pytest.raises(Exception, match="InPlaceSkip cannot be quantized: The operation `f` changes a tensor in place"):
        prepare(built(InPlaceSkip), images())


def test_a_head_that_is_all_zero_is_equal_to_itself():
    model = built(InPlaceSkip)
    nn.init.zeros_(model.head[4].weight)
    nn.init.zeros_(model.head[4].bias)
    assert all(row.passed for row in prepare(model, images()).meta[PROOFS])


def _flat(value):
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, tuple | list) else [value]


def test_a_model_that_differs_from_nnis_simulation_is_not_handed_on(monkeypatch):
    """The grids that were found, put down as numbers, have to be those that were trained on."""
    package = __import__("sys").modules["compress.quantization"]
    real = package.fake_quantized

    def wrong(quantized):
        model = real(quantized)
        model.get_submodule("head.4").weight.data.mul_(-1)
        return model

    prepared = prepare(built(InPlaceSkip), images())
    plan = assign_bits(prepared, 8, 8)
    quantized = quantize(prepared, plan, calibration=[images()], train=None)
    row = quantized.model.meta[PROOFS][-1]
    assert row.source == "trained on the grid by NNI" and row.max_abs_diff == 0
    monkeypatch.setattr(package, "fake_quantized", wrong)
    with pytest.raises(HandoffError, match="trained on the grid by NNI and fake-quantized, torch answer differently"):
        quantize(prepared, plan, calibration=[images()], train=None)


def test_a_graph_for_pruning_that_is_another_function_is_refused():
    model = built(InPlaceSkip)
    graph_module = tracing.capture(copy.deepcopy(model), images(2)).graph_module
    tracing.prove(graph_module, model, images(2))
    graph_module.get_submodule("conv").weight = nn.Parameter(model.conv.weight * 2)
    with pytest.raises(tracing.Untraceable, match="gives other answers than the operations found in it"):
        tracing.prove(graph_module, model, images(2))
