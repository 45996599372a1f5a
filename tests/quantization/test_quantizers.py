"""Every quantizer: what its paper says of the grid, exact integers in the file, and what it is there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantization_networks import (
    SIZE,
    accuracy,
    answers,
    calibrated,
    images,
    quantized_at,
    trained,
)
from torch import nn

from compress.engines import RUNTIMES, BuildSpec
from compress.errors import CompressError, RequestError
from compress.methods.quantizers import QUANTIZERS
from compress.onnx_export import export_flavours
from compress.quantization import (
    assign_bits,
    fake_quantized,
    prepare,
    quantization_points,
    quantize,
    quantized_layers,
    restore,
    save,
)
from compress.quantization.calibration import Histogram, calibrate, weight_thresholds
from compress.request import Request

pytestmark = pytest.mark.integration

BITS = {"qat": (8, 8), "ptq": (8, 8), "lsq": (4, 4), "lsq-plus": (4, 4), "dorefa": (4, 8), "bnn": (1, 8)}


def tune(model: nn.Module) -> None:
    """A short training as the pipeline does it: AdamW at a rate that suits trained weights."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, labels = images(60 * 32, seed=1)
    for start in range(0, len(batch), 32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[start : start + 32]), labels[start : start + 32]).backward()
        optimizer.step()
    model.eval()


def made(quantizer: str, **options):
    return quantized_at(trained(), *BITS[quantizer], quantizer=quantizer, train=tune, **options)


@pytest.fixture(scope="module", params=QUANTIZERS)
def result(request):
    return request.param, made(request.param)


def test_the_result_is_integers_on_its_grid_and_as_accurate_as_its_bits_allow(result, tmp_path):
    name, quantized = result
    weight_bits, activation_bits = BITS[name]
    for layer, grid in quantized.grids.weights.items():
        codes = grid.codes(quantized.model.get_submodule(layer).weight)
        assert grid.bits == weight_bits and len(codes.unique()) <= max(2, 2**weight_bits)
        if name in ("dorefa", "bnn"):
            assert bool((codes % 2 != 0).all()), "a level of this grid is no odd number"
            weight = quantized.model.get_submodule(layer).weight.detach()
            torch.testing.assert_close(grid.dequantized(weight), weight)
    assert all(grid.bits == activation_bits for grid in quantized.grids.activations.values())
    floor = {"bnn": 0.6, "dorefa": 0.85}.get(name, 0.9)
    assert accuracy(fake_quantized(quantized)) > floor
    for flavour in quantized.grids.flavours:
        path = tmp_path / f"{flavour}.onnx"
        export_flavours(quantized, {flavour: path}, input_size=SIZE)
        batch = images(64, seed=5)[0]
        expected = answers(fake_quantized(quantized, flavour), batch).numpy()
        with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE, static=False)) as session:
            got = session.run(batch.numpy())
            if flavour == "onnxruntime":
                assert {kernel.precision for kernel in session.kernels()} == {"int8"}
        assert (got.argmax(1) == expected.argmax(1)).mean() > 0.98
        # On the border of two of 16 codes the order of float additions decides, and a code is 1/15 of the range.
        assert np.sqrt(np.square(got - expected).mean()) < 0.05 * np.abs(expected).max()


def test_learnt_scales_move_and_stay_shared():
    before = quantized_at(trained(), 4, 4, quantizer="lsq").grids
    after = made("lsq").grids
    assert before.weights["conv1"].scales != after.weights["conv1"].scales
    assert before.activations["q_relu"] != after.activations["q_relu"]
    points = quantization_points(prepare(trained()))
    assert len({after.activations[name].scale for name, point in points.items() if point.scale_group}) == 1


def test_learnt_scales_beat_fixed_ones_at_few_bits():
    fixed = accuracy(fake_quantized(quantized_at(trained(), 2, 2, quantizer="qat", train=tune)))
    learnt = accuracy(fake_quantized(quantized_at(trained(), 2, 2, quantizer="lsq", train=tune)))
    assert learnt > fixed


def test_a_learnt_offset_is_a_whole_number_and_uses_the_range_that_is_there():
    shifted = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    batch = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 4 - 1
    grid = quantized_at(shifted, 8, 8, quantizer="lsq-plus", batches=[batch]).grids.activations["q_input_1"]
    assert grid.qmax - grid.qmin == 255 and grid.qmin == round(float(batch.min()) / grid.scale)
    symmetric = quantized_at(shifted, 8, 8, quantizer="lsq", batches=[batch]).grids.activations["q_input_1"]
    assert grid.scale == pytest.approx(symmetric.scale * 127 * 4 / 3 / 255, rel=0.01)


def test_offsets_of_8_bits_have_no_tensorrt_file_and_those_of_7_have():
    shifted = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    batch = torch.rand(32, 3, 4, 4) * 4 - 1
    eight = quantized_at(shifted, 8, 8, quantizer="lsq-plus", batches=[batch])
    seven = quantized_at(shifted, 8, 7, quantizer="lsq-plus", batches=[batch])
    assert eight.grids.flavours == ("onnxruntime",) and seven.grids.flavours == ("tensorrt", "onnxruntime")


def test_a_tensor_that_keeps_8_bits_among_few_has_no_offset_so_that_tensorrt_reads_the_file():
    prepared = prepare(trained())
    plan = assign_bits(prepared, 4, 4, first_last_bits=8)
    grids = quantize(prepared, plan, quantizer="lsq-plus", calibration=[images(64, 2)[0]], train=None).grids
    assert (grids.activations["q_x"].qmin, grids.activations["q_x"].qmax) == (-127, 127)
    assert grids.flavours == ("tensorrt", "onnxruntime")


def test_dorefa_starts_where_the_weights_are():
    """Equation 9 on two bits: odd thirds of a gain, the nearest to each weight; tanh cancels at the start."""
    layer = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([0.9, -0.25, 0.1]).reshape(1, 3, 1, 1))
    batch = torch.rand(8, 3, 2, 2)
    quantized = quantized_at(layer, 2, 8, quantizer="dorefa", batches=[batch])
    # u = w / 0.9; round(3 (u/2 + 1/2)) = 3, 1, 2; odd levels 3, -1, 1 of 3: the gain is <w, d> / <d, d>.
    levels = torch.tensor([1.0, -1 / 3, 1 / 3])
    gain = float((torch.tensor([0.9, -0.25, 0.1]) @ levels) / (levels @ levels))
    found = quantized.model.get_submodule("0").weight.detach().flatten()
    torch.testing.assert_close(found, gain * levels)


def test_binary_weights_are_a_sign_times_the_mean_magnitude():
    layer = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[0.9, -0.3, 0.0], [-0.1, -0.2, 0.3]]).reshape(2, 3, 1, 1))
    quantized = quantized_at(layer, 1, 8, quantizer="bnn", batches=[torch.rand(8, 3, 2, 2)])
    expected = torch.tensor([[0.4, -0.4, 0.4], [-0.2, -0.2, 0.2]])
    torch.testing.assert_close(quantized.model.get_submodule("0").weight.detach().reshape(2, 3), expected)


# ---- calibration --------------------------------------------------------------------------------------------------


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x).flatten(1)


def ranges_of(batches, estimator, bits=8):
    prepared = prepare(Identity())
    return calibrate(prepared, batches, estimator, dict.fromkeys(quantization_points(prepared), bits))["q_x"]


def test_ranges_are_averages_or_extremes_of_the_batches():
    batches = [torch.full((2, 3, 4, 4), 1.0), torch.full((2, 3, 4, 4), -3.0)]
    assert [float(end) for end in ranges_of(batches, "average")] == [-1, -1]
    assert [float(end) for end in ranges_of(batches, "minmax")] == [-3, 1]


def test_clipping_estimators_leave_an_outlier_outside():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(4)]
    batches[1][0, 0, 0, 0] = 40.0
    assert float(ranges_of(batches, "minmax")[1]) == 40
    for estimator, bits in (("percentile", 8), ("mse", 4), ("entropy", 8)):
        low, high = (float(end) for end in ranges_of(batches, estimator, bits))
        assert 2 < high < 8 and -8 < low < -2, (estimator, low, high)


def test_the_least_squares_threshold_is_the_one_that_brute_force_finds():
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1)).reshape(10, 1, -1, 1).expand(-1, 3, -1, 1)
    high = float(ranges_of([values.contiguous()], "mse", bits=4)[1])

    def error(threshold: float) -> float:
        scale = threshold / 7
        return float(((values / scale).round().clamp(-7, 7) * scale - values).square().mean())

    best = min(error(step / 100) for step in range(50, 450))
    assert error(high) < 1.02 * best
    assert 2.0 < high < 3.0  # 2.55 standard deviations for 15 levels of a normal distribution


def test_a_histogram_that_grows_counts_every_value_once():
    histogram = Histogram()
    histogram.add(torch.tensor([0.0, 0.5, 1.0]))
    histogram.add(torch.tensor([-7.5]))
    assert histogram.limit == 8 and float(histogram.counts.sum()) == 3
    heaviest = histogram.centres[histogram.counts > 0]
    torch.testing.assert_close(heaviest, torch.tensor([0.5, 1.0, 7.5]).double(), atol=8 / 2048, rtol=0)


def test_weight_thresholds_clip_only_where_squared_error_says_so():
    weight = torch.cat([torch.linspace(-1, 1, 1023), torch.tensor([4.0])]).reshape(1, 1024, 1, 1)
    assert float(weight_thresholds(weight, 7, "minmax")) == 4
    assert float(weight_thresholds(weight, 7, "mse")) < 2.5


def test_calibration_estimators_reach_the_grid():
    grids = {name: quantized_at(trained(), quantizer="ptq", estimator=name).grids for name in ("minmax", "mse")}
    scales = {name: found.activations["q_relu"].scale for name, found in grids.items()}
    assert scales["mse"] < scales["minmax"]


# ---- bits of single layers ----------------------------------------------------------------------------------------


def test_first_and_last_layer_and_single_layers_have_bits_of_their_own():
    prepared = prepare(trained())
    plan = assign_bits(prepared, 4, 4, first_last_bits=8, layer_bits={"conv2": "6", "down": "3/5", "last": "32"})
    words = {name: str(bits) for name, bits in plan.layers.items()}
    assert words == {
        "stem": "8/8", "conv1": "4/4", "conv2": "6/4", "conv3": "4/4", "down": "3/5", "depthwise": "4/4",
        "left": "4/4", "right": "4/4", "last": "float", "fc": "8/8",
    }  # fmt: skip
    assert plan.keep_float == {"last"}
    points = plan.of_points(prepared)
    assert points["q_x"] == 8, "the first layer reads the image"
    readers = {name for name, bits in points.items() if bits == 5}
    assert len(readers) == 1, "conv3 and down read one tensor: the wider of the two decides"


def test_a_layer_kept_in_floating_point_has_no_points_of_its_own(tmp_path):
    prepared = prepare(trained(), keep_float=frozenset({"conv1", "fc"}))
    assert set(quantized_layers(prepare(trained()))) - set(quantized_layers(prepared)) == {"conv1", "fc"}
    plan = assign_bits(prepare(trained()), 8, 8, layer_bits={"conv1": "32", "fc": "32"})
    quantized = quantize(prepared, plan, calibration=[images(64, 2)[0]], train=None)
    save(quantized, tmp_path)
    again = restore(trained(), tmp_path)
    batch = images(16, seed=5)[0]
    assert torch.equal(answers(fake_quantized(again), batch), answers(fake_quantized(quantized), batch))
    path = tmp_path / "model.onnx"
    export_flavours(quantized, {"onnxruntime": path}, input_size=SIZE)
    with RUNTIMES["onnxruntime"].load(path, BuildSpec(SIZE, static=False)) as session:
        precisions = [kernel.precision for kernel in session.kernels()]
    assert (precisions.count("fp32"), precisions.count("int8")) == (2, 8)


@pytest.mark.parametrize(
    ("layer_bits", "sentence"),
    [
        (
            {"conv7": "4"},
            "layer_bits: got 'conv7', expected a layer to quantize, or a module with some, such as conv3, conv2, conv1.",
        ),
        (
            {name: "32" for name in quantized_layers(prepare(trained()))},
            "Every layer is asked to stay in floating point",
        ),
    ],
)
def test_bits_of_layers_that_are_not_there_are_refused(layer_bits, sentence):
    with pytest.raises(CompressError) as refusal:
        assign_bits(prepare(trained()), 8, 8, layer_bits=layer_bits)
    assert sentence in str(refusal.value)


def test_requests_take_text_and_former_names():
    request = Request(quantizer="observer", layer_bits="layer1=4 conv1=4/8 fc=32")
    assert (request.quantizer, request.layer_bits) == ("ptq", {"layer1": "4", "conv1": "4/8", "fc": "32"})
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"quantizer": "bnn"}, "weight_bits: got 8, expected 1 with bnn, or 16, or 32."),
        ({"quantizer": "dorefa"}, "weight_bits: got 8, expected a whole number from 2 to 7 with dorefa, or 16, or 32."),
        (
            {"quantizer": "lsq-plus", "runtime": "tensorrt-rtx"},
            "runtime: got 'tensorrt-rtx', expected another one: TensorRT reads 8-bit integers whose zero is code 0, and "
            "learnt offsets of 8 bits need others; take lsq, or lsq-plus with at most 7 activation bits.",
        ),
        ({"quantizer": "quick"}, "expected one of qat, ptq, lsq, lsq-plus, dorefa, bnn, none."),
        (
            {"layer_bits": {"fc": "9"}},
            "expected layer or module names with bits, such as layer1=4, conv1=4/8 or fc=32.",
        ),
        ({"layer_bits": {"fc": "1"}}, "expected 2 to 8 bits: 1 is for quantizer bnn."),
        ({"layer_bits": {"fc": "4"}, "quantizer": "none"}, "expected nothing, because nothing is quantized."),
        ({"first_last_bits": 16}, "first_last_bits: got 16, expected a whole number from 2 to 8, or 32."),
        ({"calibration": "median"}, "expected one of average, minmax, percentile, mse, entropy."),
    ],
)
def test_impossible_bits_are_refused(values, sentence):
    with pytest.raises(RequestError) as refusal:
        Request(**values)
    assert sentence in str(refusal.value)


def test_the_calibrated_network_is_the_same_by_qat_and_ptq():
    assert quantized_at(trained(), quantizer="ptq").grids.activations == calibrated().grids.activations
