"""The verdict on int8: what it has to beat, why it does not, and what to ask for instead."""

from __future__ import annotations

import dataclasses
import html

import pytest
from example_report import example_report
from quantization_networks import SIZE, calibrated

from compress.engines import RUNTIMES, BuildSpec, Kernel
from compress.engines.int8_verdict import LatencyComparison, judge, to_exclude
from compress.errors import HandoffError
from compress.onnx_export import export_flavours
from compress.report import Worth, card
from compress.stages import measure
from compress.stages.results import Variant
from compress.ui.views import results

INTEGERS = tuple(Kernel(name, "conv", "int8") for name in ("stem", "conv1", "fc"))
MIXED = (*INTEGERS[:1], Kernel("conv1", "conv", "fp32"), Kernel("attention", "gemm", "fp32"))
RACED = LatencyComparison(
    runtime="openvino", variant="pruned", fp32_ms=6.0, int8_ms=1.0, half=("bf16", 2.0), kernels=INTEGERS,
    conversions=2, agrees=True,
)  # fmt: skip

QUANTIZED = Variant(name="quantized", parent="pruned", precision="int8")


def found(excluded_ms: float | None = None, **changes: object) -> Worth:
    raced = dataclasses.replace(RACED, **changes)
    return judge(raced, to_exclude(raced, {"stem", "conv1", "fc"}), excluded_ms)


def test_int8_has_to_beat_the_faster_of_the_floats():
    row = found()
    assert row.speedup == 2.0 and row.layer_bits == {} and row.float_layers == ()
    assert row.text == (
        "On openvino int8 is worth it: 1.00 ms against 2.00 ms in bf16 of the same structure, 2.0x as fast "
        "(fp32: 6.00 ms)."
    )
    assert (row.fp32_ms, row.half_precision, row.half_ms, row.int8_ms) == (6.0, "bf16", 2.0, 1.0)


def test_without_16_bit_floats_fp32_is_what_it_has_to_beat():
    row = found(half=None)
    assert (row.speedup, row.half_precision, row.half_ms) == (6.0, None, None)
    assert "against 6.00 ms in fp32" in row.text and "computes with no 16-bit floats here" in row.text


LOST = (
    "On openvino int8 is not worth it: 4.00 ms against 2.00 ms in bf16 of the same structure, 2.0x SLOWER "
    "(fp32: 6.00 ms). 2 of 3 layers stay in floating point (conv1, attention). Conversions between floats "
    "and integers left: 9. "
)


@pytest.mark.parametrize(
    ("excluded_ms", "words"),
    [
        (
            1.0,
            'Ask for `layer_bits` {"conv1": 32}: with those layers in floating point it takes 1.00 ms, 2.0x as fast.',
        ),
        (
            1.95,
            'With those layers in floating point (`layer_bits` {"conv1": 32}) it takes 1.95 ms, no gain either: deploy '
            "pruned.onnx on this runtime.",
        ),
        (
            None,
            'It takes no file in which those layers are floats (`layer_bits` {"conv1": 32}): deploy pruned.onnx on this '
            "runtime.",
        ),
    ],
)
def test_where_it_loses_the_float_islands_are_named_and_their_exclusion_is_measured(excluded_ms, words):
    row = found(excluded_ms, int8_ms=4.0, kernels=MIXED, conversions=9)
    assert row.speedup == 0.5 and row.float_layers == ("conv1", "attention") and row.excluded_ms == excluded_ms
    assert row.layer_bits == {"conv1": 32}, "attention has no integer grid that could be taken away"
    assert row.text == LOST + words


@pytest.mark.parametrize(("int8_ms", "words"), [(2.0, "no difference"), (1.95, "no difference"), (3.0, "1.5x SLOWER")])
def test_where_nothing_can_be_excluded_the_float_file_is_offered(int8_ms, words):
    row = found(int8_ms=int8_ms, conversions=None)
    assert words in row.text and row.layer_bits == {}
    assert row.text.endswith(
        "All 3 layers run on integers, so the time goes elsewhere. There is no layer to exclude: deploy pruned.onnx on this "
        "runtime."
    )


def test_wrong_answers_are_never_worth_their_speed():
    row = found(agrees=False)
    assert row.text == "On openvino int8 answers wrongly here, so its speed is worth nothing."


def test_every_face_of_the_report_shows_the_findings_escaped():
    report = example_report()
    sentences = [report.loss.text, report.worth[0].text, report.cross_checks[0].text]
    for page in (card.html_report(report), results.findings(report)):
        assert all(text in html.unescape(page) for text in sentences)
        assert "<on two runtimes>" not in page and "&lt;on two runtimes&gt;" in page
    assert all(text in html.unescape(card.model_card(report)) for text in sentences)
    agreed = report.model_copy(update={"cross_checks": (report.cross_checks[0].model_copy(update={"agrees": True}),)})
    assert "two runtimes" not in results.findings(agreed) and "two runtimes" in card.html_report(agreed)


def test_the_exclusion_is_raced_against_the_file_as_it_is(tmp_path):
    path, runtime, spec = tmp_path / "quantized.onnx", RUNTIMES["onnxruntime"], BuildSpec(SIZE)
    export_flavours(calibrated(), {"onnxruntime": path}, input_size=SIZE)
    contender = measure._Contender(QUANTIZED, runtime, path, path, "int8", is_deployed=True)
    with runtime.load(path, spec) as session:
        assert 0.1 < measure.race_without({"conv1"}, contender, session, spec) < 10


def test_a_runtime_that_refuses_the_changed_file_has_no_figure(tmp_path):
    path, spec = tmp_path / "quantized.onnx", BuildSpec(SIZE)
    export_flavours(calibrated(), {"onnxruntime": path}, input_size=SIZE)

    class Refusing(type(RUNTIMES["onnxruntime"])):
        def load(self, *_: object, **options: object) -> None:
            raise HandoffError("It takes no such file.")

    contender = measure._Contender(QUANTIZED, Refusing(), path, path, "int8", is_deployed=True)
    with RUNTIMES["onnxruntime"].load(path, spec) as session:
        assert measure.race_without({"conv1"}, contender, session, spec) is None
