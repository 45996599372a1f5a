"""Results of stages: what variants a run has, and records of the version before."""

from __future__ import annotations

import pytest

from compress.request import Request
from compress.stages.results import ExportResult, FinetuneResult, QuantizeResult, variants_of

HALF = {"weight_bits": 16, "activation_bits": 16}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [("baseline", None, "fp32"), ("pruned", "baseline", "fp32"), ("quantized", "pruned", "int8")]),
        ({"pruner": "none"}, [("baseline", None, "fp32"), ("quantized", "baseline", "int8")]),
        ({"quantizer": "none"}, [("baseline", None, "fp32"), ("pruned", "baseline", "fp32")]),
        (HALF, [("baseline", None, "fp32"), ("pruned", "baseline", "fp32"), ("half", "pruned", "fp16")]),
        (HALF | {"pruner": "none"}, [("baseline", None, "fp32"), ("half", "baseline", "fp16")]),
    ],
)
def test_a_request_says_which_variants_there_will_be(changes, expected):
    variants = variants_of(Request(**changes))
    assert [(one.name, one.parent, one.precision) for one in variants] == expected


def test_a_variant_names_its_files():
    *_, deployed = variants_of(Request())
    assert deployed.file_for("tensorrt") == "quantized.tensorrt.onnx"
    assert variants_of(Request())[1].file_for("tensorrt") == "pruned.onnx"


def test_records_of_the_version_before_are_read():
    """Their variants were {name: {file: bytes}}, and a stage without training had the keys of one with it."""
    exported = ExportResult.model_validate(
        {"variants": {"baseline": {"baseline.onnx": 3}, "quantized": {"quantized.tensorrt.onnx": 2}}, "noise": {},
         "handoffs": [], "parents": {}, "files": [], "seconds": 1.0, "peak_rss_bytes": 1}
    )  # fmt: skip
    assert [(one.name, one.parent, one.precision, one.files) for one in exported.variants] == [
        ("baseline", None, "fp32", {"baseline.onnx": 3}),
        ("quantized", "baseline", "int8", {"quantized.tensorrt.onnx": 2}),
    ]
    tuned = {"parameters": 1, "macs": 1, "layers": [], "curve": [], "skipped": "0 epochs, as asked", "memory_note": None}
    assert FinetuneResult.model_validate(tuned | {"handoffs": [], "ledger": []}).skipped == "0 epochs, as asked"
    quantized = QuantizeResult.model_validate(
        {"curve": [], "handoffs": [], "ledger": [], "files": [], "label": "int8", "mixed": None, "left_float": [],
         "bits": {"fc": 8}, "sqnr_db": {"fc": 40.0}, "skipped": None, "note": None,
         "noise": {"layers": {"fc": 40.0}, "noisiest": "fc", "noisiest_db": 40.0}}
    )  # fmt: skip
    assert quantized.noise.layers == {"fc": 40.0}
