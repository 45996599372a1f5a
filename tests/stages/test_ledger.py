"""The loss ledger: a seeded fault is named by hop and layer, flips are counted, and chance is not called a loss."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantization_networks import SIZE, calibrated, images, quantized_at, scratch_folder, trained
from torch import Tensor, nn

import compress
from compress import machine, onnx_export, quantization
from compress.engines.onnxruntime import recorder
from compress.engines.openvino import OpenVino
from compress.errors import HandoffError
from compress.quantization import FLAVOURS, Quantized, file_noise, noisiest, quantization_noise
from compress.quantization.layer_noise import CEILING_DB, OUTPUT, sqnr_by_layer
from compress.report import Hop
from compress.stages import ledger
from compress.stages.results import Answers, BaselineResult, FinetuneResult, PruneResult, Skipped, last_answers
from compress.tasks import CLASSIFICATION

pytestmark = pytest.mark.integration

LAYERS = ("stem", "conv1", "conv2", "conv3", "down", "depthwise", "left", "right", "last", "fc")


@functools.cache
def exported() -> dict[str, Path]:
    folder = scratch_folder()
    paths = {flavour: folder / f"quantized.{flavour}.onnx" for flavour in FLAVOURS}
    onnx_export.export_flavours(calibrated(), paths, input_size=SIZE)
    return paths


def batches() -> tuple[Tensor, ...]:
    return images(32, seed=41)[0].split(16)


def rescaled(path: Path, constant: str, factor: float) -> None:
    """Multiply a constant of the file: the seeded fault."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == constant)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), constant))
    onnx.save(model, path)


def noise_of(path: Path, flavour: quantization.Flavour) -> list[quantization.LayerSqnr]:
    values = recorder(path, {point: f"{point}.dequantize" for point in calibrated().grids.activations}, threads=1)

    def record(batch: Tensor) -> dict[str, Tensor]:
        return {point: torch.from_numpy(value) for point, value in values(batch.numpy()).items()}

    return file_noise(calibrated(), flavour, record, batches())


# ---- local noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_faithful_file_is_clean_at_every_point(flavour):
    noise = noise_of(exported()[flavour], flavour)
    points = quantization.quantization_points(calibrated().model)
    kept = [name for name, point in points.items() if not (flavour == "tensorrt" and point.only_onnxruntime)]
    assert [row.point for row in noise] == [*kept, OUTPUT]
    assert min(row.sqnr_db for row in noise) > 60
    assert set(sqnr_by_layer(noise)) == set(LAYERS)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("layer", ["stem", "conv2", "depthwise", "left", "fc"])
def test_a_wrong_scale_of_weights_in_the_file_is_named(tmp_path, flavour, layer):
    path = tmp_path / "faulty.onnx"
    path.write_bytes(exported()[flavour].read_bytes())
    rescaled(path, f"{layer}.scales", 1.3)
    noise = noise_of(path, flavour)
    assert noisiest(noise).layers == (layer,) and noisiest(noise).sqnr_db < 20
    assert all(row.sqnr_db > 60 for row in noise if layer not in row.layers), "those behind it are not to blame"


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("point", "name"), [("q_relu_1", "conv1"), ("q_x", "the input"), ("q_flatten", "adaptive_avg_pool2d and flatten")]
)
def test_a_wrong_scale_of_activations_in_the_file_is_named(tmp_path, flavour, point, name):
    path = tmp_path / "faulty.onnx"
    path.write_bytes(exported()[flavour].read_bytes())
    rescaled(path, f"{point}.scale", 0.5)
    noise = noise_of(path, flavour)
    assert (noisiest(noise).point, noisiest(noise).name) == (point, name)
    assert all(row.sqnr_db > 60 for row in noise if row.point != point)


@pytest.mark.parametrize("layer", ["conv1", "down", "fc"])
def test_a_wrong_grid_in_the_fake_quantized_model_is_named(layer):
    healthy = sqnr_by_layer(quantization_noise(calibrated(), batches()))
    assert all(15 < value < 60 for value in healthy.values())
    noise = quantization_noise(with_weight_scales(calibrated(), layer, 0.2), batches())
    assert noisiest(noise).name == layer and noisiest(noise).sqnr_db < 10
    assert all(value > 15 for other, value in sqnr_by_layer(noise).items() if other != layer)


def with_weight_scales(quantized: Quantized, layer: str, factor: float) -> Quantized:
    grid = quantized.grids.weights[layer]
    wrong = dataclasses.replace(grid, scales=tuple(scale * factor for scale in grid.scales))
    grids = dataclasses.replace(quantized.grids, weights={**quantized.grids.weights, layer: wrong})
    return Quantized(quantized.model, grids)


def test_noise_is_measured_against_the_signal_over_all_batches():
    whole, parts = (quantization_noise(calibrated(), split) for split in (batches(), torch.cat(batches()).split(5)))
    for one, other in zip(whole, parts, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=0.05)
    copied = next(row for row in whole if row.point == "q_cat")
    assert (copied.sqnr_db, copied.layers, copied.name) == (CEILING_DB, (), "cat"), "its inputs are on its grid already"


class FloatStream(nn.Module):
    """Two blocks around a sum that stays in floating point, as in a transformer: no point stands on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(3).flatten(1)
        x = x + self.first(self.norm1(x))
        x = x + self.second(self.norm2(x))
        return self.head(self.norm3(x))


def test_noise_that_a_float_sum_carries_on_is_blamed_on_its_maker():
    torch.manual_seed(0)
    inputs = torch.randn(32, 3, 4, 4)
    quantized = quantized_at(FloatStream(), batches=[inputs])
    noise = quantization_noise(with_weight_scales(quantized, "first", 0.1), [inputs])
    assert [(row.layers, row.inherits) for row in noise] == [
        (("norm1",), ()),
        (("first", "norm2"), ()),
        (("second", "norm3"), ("q_norm2",)),
        (("head",), ()),
    ]
    assert noise[2].sqnr_db < 10, "the stream carries it on"
    assert noisiest(noise) == noise[1]
    worse = [*noise[:2], dataclasses.replace(noise[2], sqnr_db=noise[1].sqnr_db - 5), noise[3]]
    assert noisiest(worse) == noise[1]
    much_worse = [*noise[:2], dataclasses.replace(noise[2], sqnr_db=noise[1].sqnr_db - 7), noise[3]]
    assert noisiest(much_worse) == much_worse[2]


# ---- hops ---------------------------------------------------------------------------------------------------------


def answers(folder: Path, name: str, through: str, classes: list[int]) -> dict:
    """A hop with the given answers, of four classes."""
    path = folder / f"{name}-{through}.npy"
    np.save(path, np.eye(4, dtype=np.float32)[classes])
    share = 0.5
    return Answers(
        name=name, through=through, accuracy=share, accuracy_ci95=(share, share), n=len(classes), answers=path.name
    )


def test_each_hop_is_compared_with_the_one_that_it_came_from(tmp_path):
    (tmp_path / "stages" / "answers").mkdir(parents=True)
    np.save(tmp_path / ledger.TARGETS, np.array([0, 1, 2, 3]))
    take = functools.partial(answers, tmp_path)
    in_torch = [
        take("baseline", "torch", [0, 1, 2, 0]),
        take("pruned", "torch", [0, 1, 3, 3]),
        take("fake-quantized", "torch", [0, 0, 3, 3]),
    ]
    of_files = [
        take("a.onnx", "onnxruntime", [0, 1]),
        take("b.onnx", "onnxruntime", [1, 1, 3, 3]),
        take("b.onnx", "openvino", [0, 1, 2, 3]),
    ]
    hops = ledger.collect(tmp_path, CLASSIFICATION, in_torch, of_files)
    assert [(hop.previous, hop.agreement_with_previous, hop.lost, hop.gained) for hop in hops] == [
        (None, None, None, None),
        ("baseline, torch", 0.5, 1, 1),
        ("pruned, torch", 0.75, 1, 0),
        ("fake-quantized, torch", 0.5, 0, 1),
        ("fake-quantized, torch", 0.5, 1, 1),
        ("b.onnx, onnxruntime", 0.5, 0, 2),
    ]


def test_a_stage_that_changed_nothing_leaves_the_answers_before_it(tmp_path):
    size = {"parameters": 1, "macs": 1, "layers": ()}
    dense = BaselineResult(ledger=(answers(tmp_path, "baseline", "torch", [0]),), **size)
    pruned, untrained = PruneResult(ledger=(answers(tmp_path, "pruned", "torch", [0]),)), FinetuneResult(**size)
    skipped = Skipped(skipped="not pruned, as asked")
    assert last_answers(dense).name == "baseline" and last_answers(dense, skipped, untrained).name == "baseline"
    assert last_answers(dense, pruned).name == last_answers(dense, pruned, untrained).name == "pruned"


def hop(name: str, through: str, lost: int | None, gained: int | None, n: int = 1000) -> Hop:
    return Hop(
        name=name, through=through, accuracy=0.9, accuracy_ci95=(0.9, 0.9), previous=None,
        agreement_with_previous=None, lost=lost, gained=gained, n=n,
    )  # fmt: skip


BLAME = {("fake-quantized", "torch"): ("conv2", "has a local SQNR of 3.0 dB")}


@pytest.mark.parametrize(
    ("flips", "text", "named"),
    [
        (
            [(4, 0), (40, 10)],
            "Most was lost at fake-quantized (torch): 40 of 1,000 answers turned wrong there and 10 right (3.0 points); "
            "its worst layer is conv2, whose output has a local SQNR of 3.0 dB.",
            ("fake-quantized", "torch", "conv2"),
        ),
        (
            [(12, 8), (10, 10)],
            "Most was lost at fine-tuned (torch): 12 of 1,000 answers turned wrong there and 8 right (0.4 points), no "
            "more than chance explains.",
            ("fine-tuned", "torch", None),
        ),
        ([(0, 0), (8, 9)], "No step lost answers: none turned more of them wrong than right.", (None, None, None)),
    ],
)
def test_one_sentence_names_the_hop_and_the_layer(flips, text, named):
    names = ("fine-tuned", "fake-quantized")
    hops = [hop("baseline", "torch", None, None), *(hop(n, "torch", *f) for n, f in zip(names, flips, strict=True))]
    found = ledger.loss(hops, BLAME)
    assert found.text == text and (found.hop, found.through, found.layer) == named


def test_a_sample_decides_between_loss_and_chance():
    assert ledger._sign_test(5, 0) == pytest.approx(1 / 32)
    assert ledger._sign_test(8, 8) == pytest.approx(0.598, abs=1e-3)
    assert ledger._sign_test(5_200, 4_800) == pytest.approx(3.3e-5, rel=0.05)


@pytest.mark.parametrize("dot_product", [True, False])
def test_runtimes_that_disagree_about_one_file_are_flagged(tmp_path, monkeypatch, dot_product):
    monkeypatch.setattr(machine, "has_int8_dot_product", lambda: dot_product)
    (tmp_path / "stages" / "answers").mkdir(parents=True)
    np.save(tmp_path / ledger.TARGETS, np.array([0, 1, 2, 3]))
    rows = [
        answers(tmp_path, "b.onnx", "onnxruntime", [0, 1, 2, 3]),
        answers(tmp_path, "a.onnx", "onnxruntime", [0, 1, 2, 3]),
        answers(tmp_path, "b.onnx", "openvino", [0, 1, 0, 3]),
    ]
    (check,) = ledger.cross_checks(tmp_path, CLASSIFICATION, rows)
    assert (check.file, check.first, check.second) == ("b.onnx", "onnxruntime", "openvino")
    assert (check.different, check.n, check.accuracy_difference_points, check.agrees) == (1, 4, -25.0, False)
    assert "1 of 4 images get different classes, 100.00 and 75.00 % of the answers are right" in check.text
    assert "Allowed is 98% equal top-1" in check.text
    assert ("u8s8" in check.text) == (not dot_product)
    assert ledger.cross_checks(tmp_path, CLASSIFICATION, rows[:2]) == ()


# ---- in a run -----------------------------------------------------------------------------------------------------


def request() -> compress.Request:
    return compress.Request(
        model="custom", input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, data="none", pruner="none", batch_size=4,
        calibration_images=32,
    )  # fmt: skip


@pytest.mark.usefixtures("short_run")
def test_a_run_whose_file_has_a_wrong_scale_is_refused_with_the_layers_name(tmp_path, monkeypatch):
    real = onnx_export.export_flavours

    def damaged(quantized, paths, **options):
        real(quantized, paths, **options)
        rescaled(paths["onnxruntime"], "conv3.scales", 4.0)

    monkeypatch.setattr(onnx_export, "export_flavours", damaged)
    with pytest.raises(
        HandoffError,
        match=r"fake-quantized, torch and quantized.onnxruntime.onnx answer differently: .* They part at conv3: given the "
        r"same inputs, its output has -?\d+\.\d dB of SQNR\.",
    ):
        compress.run(request(), model=trained(), out=tmp_path / "run")


@pytest.mark.usefixtures("short_run")
def test_a_run_names_the_hop_and_the_layer_of_a_wrong_grid_and_charts_no_precision_that_is_not_real(
    tmp_path, monkeypatch
):
    real = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda *a, **k: with_weight_scales(real(*a, **k), "conv2", 0.1))
    monkeypatch.setattr(OpenVino, "half_precision", "bf16")
    report = compress.run(request(), model=trained(), out=tmp_path / "run")
    assert (report.loss.hop, report.loss.through, report.loss.layer) == ("fake-quantized", "torch", "conv2")
    torch_hops = [hop for hop in report.ledger if hop.through == "torch"]
    assert [hop.name for hop in torch_hops] == ["baseline", "fake-quantized"], "nothing was pruned, and nothing trained"
    assert f"{torch_hops[1].lost:,} of {torch_hops[1].n:,} answers turned wrong there" in report.loss.text
    rows = {layer.name: layer for layer in report.layers}
    assert rows["conv2"].output_sqnr_db < 10 < rows["conv3"].output_sqnr_db
    assert all(set(row.file_sqnr_db) == {f"quantized.{flavour}.onnx" for flavour in FLAVOURS} for row in rows.values())
    assert [check.file for check in report.cross_checks] == ["quantized.onnxruntime.onnx"]
    worth = {row.runtime: row for row in report.worth}
    assert set(worth) == {"onnxruntime", "openvino"} and {row.variant for row in report.worth} == {"baseline"}
    really = {m.precision for m in report.measurements if m.precision_requested == "bf16"}
    assert really == ({"bf16"} if worth["openvino"].half_ms else set())
    assert (worth["openvino"].half_precision == "bf16") == (worth["openvino"].half_ms is not None)
