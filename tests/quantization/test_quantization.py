"""Ranges learned by NNI: exact, complete, and consistent with the weights that are handed on."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from quantization_networks import (
    Mixed,
    accuracy,
    answers,
    calibrated,
    calibration,
    images,
    quantized_at,
    train,
    trained,
)
from torch import nn

from compress.errors import QuantizationError
from compress.quantization import (
    Grids,
    assign_bits,
    fake_quantized,
    prepare,
    quantization_points,
    quantize,
    restore,
    save,
    weight_sqnr_db,
)


def test_calibration_alone_keeps_the_accuracy():
    float_accuracy = accuracy(trained())
    assert float_accuracy > 0.9
    assert accuracy(fake_quantized(calibrated())) >= float_accuracy - 0.01


def test_training_recovers_what_few_bits_lose():
    prepared = prepare(trained())
    before = copy.deepcopy(prepared.state_dict())
    lost = accuracy(fake_quantized(calibrated(2, 4)))
    quantized = quantize(
        prepared,
        assign_bits(prepared, 2, 4),
        calibration=calibration(),
        train=lambda model: train(model, steps=60, learning_rate=0.001),
    )
    assert accuracy(fake_quantized(quantized)) > lost + 0.02
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert not any("_nni" in name for name, _ in quantized.model.named_modules())
    assert not torch.equal(quantized.model.get_submodule("conv1").weight, prepared.get_submodule("conv1").weight)


def test_the_reference_is_what_nni_simulates_bit_for_bit():
    batch = images(16, seed=7)[0]
    seen = []

    def observe_only(model: nn.Module) -> None:
        with torch.no_grad():
            model.train()
            model(batch)
            model.eval()
            seen.append(model(batch))

    quantized = quantized_at(trained(), train=observe_only)
    assert torch.equal(answers(fake_quantized(quantized), batch), seen[0])


def test_no_final_weight_is_clipped_by_a_range_that_lags():
    def jump(model: nn.Module) -> None:
        train(model, steps=2, learning_rate=0.01)
        with torch.no_grad():  # as a last optimizer step would, after the last observation
            for parameter in model.parameters():
                parameter.mul_(1.5)

    quantized = quantized_at(trained(), train=jump)
    for name, grid in quantized.grids.weights.items():
        weight = quantized.model.get_submodule(name).weight.detach()
        scales = torch.tensor(grid.scales).reshape(-1, *[1] * (weight.dim() - 1))
        assert float((weight / scales).abs().max()) <= 127.001, name
        largest = weight.abs().flatten(1).amax(1)
        torch.testing.assert_close(scales.flatten() * 127, largest.clamp_min(float(largest.max()) / 4096))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_use_their_own_grid_and_say_so(bits):
    quantized = calibrated(bits, bits)
    qmax = 2 ** (bits - 1) - 1
    for name, grid in quantized.grids.weights.items():
        assert int(grid.codes(quantized.model.get_submodule(name).weight).abs().max()) == qmax
    for name, point in quantization_points(quantized.model).items():
        grid = quantized.grids.activations[name]
        expected = (0, 2**bits - 1) if point.non_negative else (-qmax, qmax)
        assert (grid.qmin, grid.qmax, grid.bits) == (*expected, bits)
    assert quantized.grids.label == f"{bits}-bit weights and {bits}-bit activations in int8 containers"
    assert calibrated().grids.label == "int8"


def test_weights_and_activations_take_different_bits():
    quantized = calibrated(4, 8)
    assert {grid.qmax for grid in quantized.grids.weights.values()} == {7}
    assert {grid.qmax for grid in quantized.grids.activations.values()} == {127}


def test_concatenated_tensors_share_their_largest_scale():
    quantized = calibrated()
    points = quantization_points(quantized.model)
    scales = {quantized.grids.activations[name].scale for name, point in points.items() if point.scale_group}
    assert len(scales) == 1


def test_an_empty_channel_gets_a_range_that_no_bias_overflows():
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.last.weight[3] = 0
    quantized = quantized_at(model)
    scales = torch.tensor(quantized.grids.weights["last"].scales)
    torch.testing.assert_close(scales[3], scales.max() / 4096)


def test_ranges_are_exact_in_json():
    grids = calibrated().grids
    again = Grids.from_json(grids.to_json())
    assert again == grids
    for name, grid in grids.activations.items():
        assert np.float32(grid.scale) == grid.scale, f"{name} is not a float32 value"
        assert np.float32(again.activations[name].scale).tobytes() == np.float32(grid.scale).tobytes()
    with pytest.raises(QuantizationError, match="grids cannot be read .*version 7"):
        Grids.from_json(grids.to_json().replace('"version": 2', '"version": 7'))


def test_a_saved_result_is_restored_where_nni_is_missing(tmp_path):
    quantized = calibrated()
    save(quantized, tmp_path)
    again = restore(Mixed(), tmp_path)
    batch = images(4, seed=8)[0]
    assert torch.equal(answers(fake_quantized(again), batch), answers(fake_quantized(quantized), batch))
    program = (
        "import sys; sys.modules['nni'] = None; sys.path[:0] = ['.', 'tests/helpers', 'tests/networks']\n"
        "from pathlib import Path; from quantization_networks import Mixed\n"
        "from compress.quantization import restore\n"
        f"print(restore(Mixed(), Path({str(tmp_path)!r})).grids.label)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("int8", 0), done.stderr
    with pytest.raises(QuantizationError, match="has no readable quantized model"):
        restore(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), tmp_path)


def test_a_layer_that_no_image_reaches_is_named():
    with pytest.raises(QuantizationError, match="no calibration image reached this layer"):
        quantized_at(trained(), batches=[])


def test_a_value_that_is_not_finite_names_the_layer():
    broken = [torch.full((2, 3, 24, 24), float("nan"))]
    with pytest.raises(QuantizationError, match="^x: values from nan to nan were observed"):
        quantized_at(trained(), batches=broken)
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match="^fc: values from .* to inf were observed"):
        quantized_at(model)


def test_a_dead_layer_is_named():
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.left.weight.zero_()
    with pytest.raises(QuantizationError, match="^left: all its weights are zero"):
        quantized_at(model)
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.last.bias.fill_(-1e6)
    with pytest.raises(QuantizationError, match="its output is zero for every calibration image"):
        quantized_at(model)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "field"), [(1, 8, "weight_bits"), (8, 9, "activation_bits")]
)
def test_other_bits_are_refused(weight_bits, activation_bits, field):
    with pytest.raises(QuantizationError, match=f"{field}: got .*, expected a whole number from 2 to 8"):
        quantized_at(trained(), weight_bits, activation_bits)


def test_more_bits_mean_less_noise_in_every_layer():
    eight, four = weight_sqnr_db(calibrated()), weight_sqnr_db(calibrated(4, 4))
    assert eight.keys() == calibrated().grids.weights.keys()
    assert all(eight[name] > four[name] + 18 for name in eight)  # 6 dB a bit
