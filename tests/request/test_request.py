"""What a request accepts, refuses and says."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RequestError
from compress.request import Request


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sparsity": 0}, "sparsity: got 0, expected a fraction strictly between 0 and 1."),
        ({"sparsity": 1}, "sparsity: got 1, expected a fraction strictly between 0 and 1."),
        ({"sparsity": math.nan}, "sparsity: got nan, expected a fraction strictly between 0 and 1."),
        ({"weight_bits": 1}, "weight_bits: got 1, expected a whole number from 2 to 8 with qat, or 16, or 32."),
        ({"activation_bits": 9}, "activation_bits: got 9, expected a whole number from 2 to 8 with qat, or 16, or 32."),
        (
            {"weight_bits": 16},
            "activation_bits: got 8, expected 16 as well, because weight_bits and activation_bits of 16 or 32 go",
        ),
        (
            {"runtime": "coreml"},
            "runtime: got 'coreml', expected one of auto, onnxruntime, openvino, onnxruntime-cuda, onnxruntime-tensorrt, "
            "tensorrt, tensorrt-rtx.",
        ),
        ({"sparsty": 0.5}, "sparsty: got 0.5, expected no field of this name; did you mean sparsity?"),
        ({"mean": (0.5, 0.5, 0.5)}, "std: got None, expected three numbers, because mean was given"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "std: got (1.0, 0.0, 1.0), expected three numbers above 0."),
        ({"pruner": "none", "quantizer": "none", "weight_bits": 32, "activation_bits": 32}, "expected something to do"),
        ({"pruning_epochs": 0}, "pruning_epochs: got 0, expected a number above 0 and at most 1000."),
        ({"pruning_steps": 0}, "pruning_steps: got 0, expected a whole number from 1 to 1000."),
        (
            {"pruner": "amc"},
            "movement, admm, lottery-ticket, none, because this one searches a ratio for each layer: "
            "python -m compress search --strategy amc.",
        ),
        ({"pruner": "magic"}, "pruner: got 'magic', expected one of l1-norm, l2-norm, fpgm, level, taylor"),
        ({"layer_sparsity": "conv1=1"}, "layer_sparsity: got 'conv1=1', expected layer or module names with fractions"),
        ({"layer_sparsity": "a=0.1 a=0.2"}, "layer_sparsity: got 'a=0.1 a=0.2', expected layer or module names"),
        ({"ranking": "best"}, "ranking: got 'best', expected one of per-group, global."),
        (
            {"max_layer_sparsity": 0.7},
            "max_layer_sparsity: got 0.7, expected nothing, because it limits global ranking: ask for that.",
        ),
        (
            {"max_layer_sparsity": 0.4, "ranking": "global"},
            "max_layer_sparsity: got 0.4, expected at least the sparsity, which is 0.5.",
        ),
        ({"config_list": "[{]"}, "config_list: got '[{]', expected a JSON list of objects, as in NNI's tutorials."),
        ({"config_list": "[]"}, "config_list: got '[]', expected a JSON list of objects, as in NNI's tutorials."),
        (
            {"config_list": '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]', "sparsity": 0.3},
            "sparsity: got 0.3, expected nothing, because config_list is given and says what is removed where.",
        ),
        (
            {"config_list": '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]', "layer_sparsity": "conv1=0.3"},
            "layer_sparsity: got {'conv1': 0.3}, expected nothing, because config_list is given",
        ),
        (
            {"pruner": "none", "layer_sparsity": {"conv1": 0.3}},
            "layer_sparsity: got {'conv1': 0.3}, expected nothing, because the pruner is none: choose a pruner.",
        ),
        (
            {"pruner": "level", "ranking": "global"},
            "ranking: got 'global', expected nothing, because level treats the layers alike: choose another pruner.",
        ),
        ({"engine_targets": ["8.6"]}, "engine_targets: got ['8.6'], expected GPU architectures such as SM86 and SM89."),
        (
            {"runtime": "onnxruntime", "runtime_hint": "throughput"},
            "runtime_hint: got 'throughput', expected latency, because onnxruntime has no such choice.",
        ),
        ({"seed": -1}, "seed: got -1, expected a whole number from 0 to 4294967295."),
    ],
)
def test_refusals_say_what_is_allowed(values, sentence):
    with pytest.raises(RequestError) as refusal:
        Request(**values)
    assert sentence in str(refusal.value)


@given(
    sparsity=st.floats(0, 1, exclude_min=True, exclude_max=True),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**32 - 1),
    exclude=st.lists(st.text(min_size=1, max_size=8), max_size=3),
)
def test_json_round_trip_is_exact(sparsity, bits, seed, exclude):
    request = Request(sparsity=sparsity, weight_bits=bits, seed=seed, exclude=tuple(exclude))
    assert Request.from_json(request.to_json()) == request


def test_ratios_and_config_lists_are_read_from_text_and_survive_json():
    entries = '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]'
    for text in ("layer1=0.3, conv1=0", ["layer1=0.3", "conv1=0"], '{"layer1": 0.3, "conv1": 0}'):
        assert Request(layer_sparsity=text).layer_sparsity == {"layer1": 0.3, "conv1": 0.0}
    for request in (Request(layer_sparsity="layer1=0.3", ranking="global"), Request(config_list=entries)):
        assert Request.from_json(request.to_json()) == request
    assert Request(config_list=entries).config_list == ({"op_types": ["Conv2d"], "sparse_ratio": 0.5},)


def test_a_request_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        Request().sparsity = 0.3


def test_damaged_request_file_is_refused_by_name(tmp_path):
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(RequestError, match="expected a JSON object, as request.json of a run"):
        Request.from_file(tmp_path / "request.json")
    with pytest.raises(RequestError, match="expected a readable JSON file"):
        Request.from_file(tmp_path / "absent.json")


def test_every_field_has_help_and_a_text_for_refusals():
    for name, field in Request.model_fields.items():
        assert field.description, f"{name} has no help"
        assert field.json_schema_extra["allowed"], f"{name} has no text for refusals"


def test_request_and_report_load_nothing_heavy():
    script = (
        "import sys, json, compress.request, compress.report, compress.errors; print(json.dumps(list(sys.modules)))"
    )
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    )
    assert not {"torch", "nni", "gradio", "onnxruntime", "openvino", "plotly", "tensorrt_rtx"} & set(loaded)
