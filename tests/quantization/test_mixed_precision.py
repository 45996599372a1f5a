"""The layers that bear few bits worst are found, and no more of them widened than the budget asks for."""

import copy

import pytest
import torch
from image_files import encoded, photo
from quantization_networks import SIZE, accuracy, calibration, images, trained

import compress
from compress.quantization import assign_bits, fake_quantized, prepare, quantize, search_bits
from compress.quantization.bits import FLOAT
from compress.quantization.mixed_precision import sensitivity
from compress.report import charts, tables

pytestmark = pytest.mark.integration


def fragile():
    """The trained network with one layer whose channels differ in size by 10,000, and the next one undoing it."""
    model = copy.deepcopy(trained())
    with torch.no_grad():
        factor = torch.logspace(0, -4, 16)
        model.bn1.weight.mul_(factor)
        model.bn1.bias.mul_(factor)
        model.conv2.weight.div_(factor.reshape(1, -1, 1, 1))
    return model


def chosen(model, bits, target):
    def quantized(plan):
        return quantize(prepare(model, keep_float=plan.keep_float), plan, calibration=calibration(), train=None)

    plan = assign_bits(prepare(model), *bits)
    return search_bits(plan, quantized, lambda q: accuracy(fake_quantized(q)), images(64, 4)[0], target)


def test_the_layer_that_cannot_bear_its_grid_comes_first():
    model = fragile()
    assert accuracy(model) == accuracy(trained())
    plan = assign_bits(prepare(model), 8, 8)
    found = sensitivity(quantize(prepare(model), plan, calibration=calibration(), train=None), images(64, 4)[0])
    assert next(iter(found)) == "conv2" and list(found.values()) == sorted(found.values())
    assert set(found) == set(plan.layers)


def test_no_more_layers_are_widened_than_needed():
    good = accuracy(trained())
    result = chosen(fragile(), (8, 8), good - 0.01)
    assert result.within_budget and result.steps[0].score < good - 0.01 <= result.steps[-1].score
    assert "conv2" in result.plan.keep_float and len(result.plan.keep_float) <= 3
    assert [len(step.widened) for step in result.steps] == [0, 1, 2, 3][: len(result.steps)]
    bits = [step.weight_bits for step in result.steps]
    assert bits[0] == 8 and bits == sorted(bits)


def test_few_bits_widen_to_eight_and_a_hopeless_target_says_so():
    result = chosen(trained(), (2, 4), 2.0)
    assert not result.within_budget
    widened = result.steps[-1].widened
    assert {str(result.plan.layers[name]) for name in widened} == {"8/8"}
    assert FLOAT not in {bits.weights for bits in result.plan.layers.values()}
    assert {str(bits) for name, bits in result.plan.layers.items() if name not in widened} == {"2/4"}


def test_what_is_good_enough_stays_as_it_is():
    result = chosen(trained(), (8, 8), accuracy(trained()) - 0.02)
    assert result.within_budget and len(result.steps) == 1 and not result.plan.keep_float


def test_a_run_keeps_to_its_budget_and_charts_the_way_there(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.png").write_bytes(encoded(photo(number)))
    request = compress.Request(
        model="custom", checkpoint="random", data=str(folder), input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3,
        pruner="none", weight_bits=2, activation_bits=2, first_last_bits=2, qat_epochs=0, max_quantization_loss=100,
    )  # fmt: skip
    report = compress.run(request, model=trained(), out=tmp_path / "within")
    (step,) = report.mixed_precision
    assert step.widened == () and any("Mixed precision: no layer got more bits" in note for note in report.notes)
    request = request.model_copy(update={"max_quantization_loss": 0.0})
    report = compress.run(request, model=trained(), out=tmp_path / "strict")
    assert [len(step.widened) for step in report.mixed_precision][:2] == [0, 1]
    bits = {layer.name: layer.weight_bits for layer in report.layers}
    assert {name for name, width in bits.items() if width == 8} == set(report.mixed_precision[-1].widened)
    assert {"mixed"} <= set(charts.figures(report)) and len(tables.tables(report)["mixed"][1]) >= 2
