"""NNI's config lists for quantization: both styles of keys, what they mean, and what cannot be honoured."""

import pytest
from quantization_networks import trained
from torch import nn

from compress.errors import RequestError
from compress.quantization import bits_of_config_list, prepare
from compress.request import Request

NEW = [
    {"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"},
    {"op_types": ["ReLU"], "target_names": ["_output_"], "quant_dtype": "int8"},
]
OLD = [
    {"quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}, "op_types": ["Conv2d"]},
    {"quant_types": ["output"], "quant_bits": {"output": 8}, "op_types": ["ReLU"]},
]


def words(entries, offsets=False):
    plan = bits_of_config_list(trained(), prepare(trained()), entries, offsets)
    return {name: str(bits) for name, bits in plan.layers.items()}


@pytest.mark.parametrize("entries", [NEW, OLD])
def test_the_tutorials_list_quantizes_convolutions_and_leaves_linear_layers(entries):
    found = words(entries)
    assert found.pop("fc") == "float" and set(found.values()) == {"8/8"} and len(found) == 9


def test_later_entries_override_and_exclude():
    entries = [
        *NEW,
        {"op_names": ["conv2"], "target_names": ["weight"], "target_settings": {"weight": {"quant_dtype": "int4"}}},
        {"op_names": ["last"], "exclude": True},
    ]
    entries[3] = {"op_names": ["last"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}
    found = words(entries)
    assert (found["conv2"], found["conv1"], found["last"]) == ("4/8", "8/8", "8/8")
    old = [*OLD, {"op_names": ["last"], "exclude": True}]
    assert words(old)["last"] == "float"


def test_a_weight_alone_reads_what_the_layer_before_writes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
    entries = [
        {"op_names": ["0"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"},
        {"op_names": ["1"], "target_names": ["_output_"], "quant_dtype": "uint6"},
        {"op_names": ["2"], "target_names": ["weight"], "quant_dtype": "int4", "granularity": "out_channel"},
    ]
    plan = bits_of_config_list(model, prepare(model), entries, False)
    assert {name: str(bits) for name, bits in plan.layers.items()} == {"0": "8/8", "2": "4/6"}
    with pytest.raises(
        RequestError, match="the weight of 2 without what it reads', expected _input_ of it, or _output_"
    ):
        bits_of_config_list(model, prepare(model), [entries[0], entries[2]], False)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"op_types": ["Conv2d"], "target_names": ["weight"], "quant_start_step": 10}, "got quant_start_step, expected nothing"),
        ({"op_types": ["Conv2d"], "target_names": ["weight"], "fuse_names": []}, "got fuse_names, expected nothing"),
        ({"op_types": ["LSTM"], "target_names": ["weight"]}, "got LSTM in op_types, expected Conv2d or Linear or ReLU"),
        ({"op_names": ["conv7"], "target_names": ["weight"]}, "got conv7 in op_names, expected the name of a layer, such as conv"),
        ({"op_types": ["Conv2d"]}, "got entry 1 without targets, expected target_names"),
        ({"op_types": ["Conv2d"], "target_names": ["bias"]}, "got the target bias in entry 1, expected weight"),
        ({"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "fp8"}, "got quant_dtype=fp8 in entry 1"),
        ({"op_types": ["Conv2d"], "quant_types": ["weight"], "quant_bits": 12}, "got quant_bits=12 in entry 1"),
        (
            {"op_types": ["Conv2d"], "target_names": ["_input_", "weight"], "quant_scheme": "affine"},
            "got quant_scheme=affine of input in entry 1, expected symmetric",
        ),
        (
            {"op_types": ["Conv2d"], "target_names": ["weight"], "granularity": "per_block"},
            "got granularity=per_block of weight in entry 1, expected default or out_channel",
        ),
        (
            {"op_types": ["Conv2d"], "target_names": ["weight"], "quant_types": ["weight"]},
            "expected the keys of one version of NNI",
        ),
        ({"op_types": ["ReLU"], "target_names": ["_output_"]}, "got no weight of a layer, expected at least one"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(entry, sentence):
    with pytest.raises(RequestError) as refusal:
        words([entry])
    told = str(refusal.value).replace("'", "").replace('"', "")
    assert told.startswith("quantization_config_list: ") and sentence in told


def test_a_tensor_has_one_grid():
    entries = [NEW[0], {"op_types": ["ReLU"], "target_names": ["_output_"], "quant_dtype": "int6"}]
    with pytest.raises(RequestError, match="6 bits for the output of relu', expected 8, which the layers that read it"):
        words(entries)


def test_a_request_holds_the_list_and_nothing_beside_it():
    assert Request(quantization_config_list=NEW).quantization_config_list == tuple(NEW)
    for field, value in (("weight_bits", 4), ("layer_bits", {"fc": "4"}), ("first_last_bits", 2)):
        with pytest.raises(RequestError, match=f"{field}: got .* because quantization_config_list is given"):
            Request(quantization_config_list=NEW, **{field: value})
