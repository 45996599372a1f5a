"""A request as text to be copied: each text, carried out, asks for the same."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest

import compress
from compress.cli import main
from compress.request import Request, snippets
from compress.ui.form import from_request, to_request

RICH = (
    {},
    {"model": "resnet50", "data": "my photos.zip", "checkpoint": "it's mine.pth", "input_size": 64},
    {"mean": (-0.1, 0.2, 0.3), "std": (1.0, 0.5, 3e-05), "sparsity": 0.123456, "augment": True, "seed": 7},
    {"exclude": ("layer1.0.conv1", "fc"), "layer_sparsity": {"layer2": 0.25, "conv1": 0.0}, "channel_multiple": 4},
    {"ranking": "global", "max_layer_sparsity": 0.75, "pruner": "fpgm", "learning_rate": 1e-07},
    {"config_list": '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "op_names": ["it\'s \\"$HOME\\""]}]'},
    {"quantization_config_list": '[{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8"}]'},
    {"weight_bits": 4, "activation_bits": 8, "layer_bits": {"layer1": "4/8", "fc": "32"}, "quantizer": "lsq"},
    {"quantizer": "none", "weight_bits": 16, "activation_bits": 16, "pruner": "none"},
    {"quantizer": "none", "weight_bits": 32, "activation_bits": 32, "pruning_epochs": 0.5, "finetune_epochs": 0.25},
    {"engine_targets": ("SM86", "SM89"), "runtime": "openvino", "runtime_hint": "throughput", "batch_size": 1},
    {"checkpoint": "hf://team/net@v2/weights/a.pth", "model": "resnet50", "data": "none"},
    {"data": "none", "checkpoint": "random", "max_quantization_loss": 0.5, "reconstruction_images": 0},
)


@pytest.fixture(params=RICH, ids=lambda given: " ".join(given) or "defaults")
def request_asked(request: pytest.FixtureRequest) -> Request:
    return Request(**request.param)


def test_the_shell_command_is_parsed_into_the_same_request(
    request_asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(snippets.shell_command(request_asked.model_dump(mode="json")))
    assert words[:4] == ["python", "-m", "compress", "run"]
    parsed = []

    def carried_out(request: Request, **_: Any) -> None:
        parsed.append(request)
        raise SystemExit(0)

    monkeypatch.setattr("compress.pipeline.run", carried_out)
    monkeypatch.setattr(sys, "argv", ["compress", *words[3:]])
    with pytest.raises(SystemExit):
        main.cli(prog_name="python -m compress")
    assert parsed == [request_asked]


def test_the_python_code_runs_the_same_request(
    request_asked: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Report:
        class verdict:
            text = "2x smaller"

    monkeypatch.setattr(compress, "run", lambda request, out: asked.append((request, out)) or Report)
    exec(compile(snippets.python_code(request_asked.model_dump(mode="json")), "copied", "exec"), {})
    assert asked == [(request_asked, "runs/again")]
    assert capsys.readouterr().out == "2x smaller\n"


def test_the_form_filled_with_a_request_asks_for_it_again(request_asked: Request, tmp_path: Any) -> None:
    files = {name: tmp_path / getattr(request_asked, name) for name in ("checkpoint", "data")}
    kept = {name: path for name, path in files.items() if "." in path.name and "hf:" not in path.parts}
    assert to_request(from_request(request_asked), kept) == (request_asked, kept)


def test_what_is_at_its_default_is_not_said() -> None:
    values = Request(seed=3).model_dump(mode="json")
    assert snippets.shell_command(values) == ("python -m compress run --model resnet18 --data fashion-mnist --seed 3")
    said = "    model='resnet18',\n    data='fashion-mnist',\n    seed=3,\n"
    assert f"compress.Request(\n{said})\n" in snippets.python_code(values)
    assert f"client.predict(\n{said}    api_name=" in snippets.client_code(values, "http://127.0.0.1:1/", ())


def test_files_are_named_without_their_folders():
    asked = {
        "data": "/srv/runs/0123/uploads/pets.zip",
        "checkpoint": "hf://team/net",
        "class_map": "maps/a.json",
        "x": 1,
    }
    assert snippets.without_folders(asked) == asked | {"data": "pets.zip", "class_map": "a.json"}
    assert (
        snippets.without_folders({"data": "none", "checkpoint": "auto", "class_map": None, "forecast": 3})["data"]
        == "none"
    )
    assert (
        snippets.without_folders({"data": "../pets/"})["data"] == "pets"
        and snippets.without_folders({"data": "/"})["data"] == "data"
    )
