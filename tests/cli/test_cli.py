"""Bad input at the shell: one clear sentence, a non-zero exit, nothing half-written."""

import json

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from compress.cli import main as shell

pytestmark = pytest.mark.integration


def call(capsys, monkeypatch, *words):
    """Exit code, standard output and standard error of the command line."""
    monkeypatch.setattr("sys.argv", ["compress", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        shell.main()
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    def run(*words):
        out = tmp_path / "out"
        code, _, error = call(capsys, monkeypatch, "run", *words, "--out", out)
        assert code != 0
        assert not out.exists(), "nothing half-written"
        assert error.count("Error:") == 1 and "Traceback" not in error
        return error.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--sparsity", "0"), "Error: sparsity: got '0', expected a fraction strictly between 0 and 1."),
        (("--sparsity", "1"), "Error: sparsity: got '1', expected a fraction strictly between 0 and 1."),
        (("--sparsity", "nan"), "Error: sparsity: got 'nan', expected a fraction strictly between 0 and 1."),
        (
            ("--weight-bits", "1"),
            "Error: weight_bits: got 1, expected a whole number from 2 to 8 with qat, or 16, or 32.",
        ),
        (
            ("--model", "resnet19"),
            "Error: model: got 'resnet19', expected a torchvision classifier; did you mean resnet",
        ),
        (("--runtime", "tensorrt"), "Error: runtime: got 'tensorrt', which is not available here. TensorRT"),
        (
            ("--data", "no/such/folder"),
            "Error: There is no data at no/such/folder: give fashion-mnist, a folder, a .zip, or none.",
        ),
        (("--checkpoint", "no/such/file.pth"), "Error: "),
        (("--request", "no/such.json"), "Error: request: got 'no/such.json', expected a readable JSON file"),
        (("--exclude", "layer9.conv"), "layer9.conv"),
    ],
)
def test_wrong_values_get_one_sentence(refused, words, sentence):
    assert (
        sentence in refused("--model", "resnet18", *words)
        if words[0] not in ("--model", "--request")
        else sentence in refused(*words)
    )


def test_an_empty_data_folder(refused, tmp_path):
    (tmp_path / "images").mkdir()
    assert "images" in refused("--data", tmp_path / "images", "--checkpoint", "random", "--input-size", "32")


def test_a_checkpoint_of_another_architecture_names_layer_shapes_and_match(refused, tmp_path):
    save_file(torchvision.models.resnet34(num_classes=10).state_dict(), tmp_path / "other.safetensors")
    text = refused("--model", "resnet18", "--checkpoint", tmp_path / "other.safetensors")
    assert "resnet34" in text and "layer" in text


def test_a_class_count_that_does_not_match_the_head(refused, tmp_path):
    for name in ("cat", "dog"):
        for index in range(12):
            path = tmp_path / "pets" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 50 + index).convert("RGB").save(path)
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "five.safetensors")
    text = refused("--checkpoint", tmp_path / "five.safetensors", "--data", tmp_path / "pets", "--input-size", "32")
    assert "5" in text and "2" in text and "--class-map" in text and '"cat"' in text


def test_request_file_and_options_do_not_mix(refused, tmp_path):
    (tmp_path / "request.json").write_text("{}")
    assert "nothing beside --request" in refused("--request", tmp_path / "request.json", "--seed", "1")


def test_lists_are_readable_and_json(capsys, monkeypatch):
    for command, expected in (("pruners", "l1-norm"), ("quantizers", "qat"), ("runtimes", "openvino")):
        assert expected in call(capsys, monkeypatch, command)[1]
        assert expected in {row["name"] for row in json.loads(call(capsys, monkeypatch, command, "--json")[1])}
    rows = {row["name"]: row for row in json.loads(call(capsys, monkeypatch, "pruners", "--json")[1])}
    assert rows["l1-norm"]["needs"] == "nothing" and rows["agp"]["needs"] == "training images, and trains on them"
    assert rows["amc"]["needs"] == "python -m compress search --strategy amc"
    rows = json.loads(call(capsys, monkeypatch, "models", "--json")[1])
    assert len(rows) >= 80 and {"name": "resnet18", "parameters": 11689512, "input_size": 224} in rows


def test_check_tells_the_plan_without_writing_anything(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(
        capsys,
        monkeypatch,
        "check",
        "--model",
        "resnet18",
        "--checkpoint",
        "random",
        "--data",
        "none",
        "--input-size",
        "64",
    )
    assert code == 0
    assert "resnet18: 11.69 M parameters" in out and "fc" in out and "onnxruntime: runs here" in out
    assert list(tmp_path.iterdir()) == []


def test_check_exits_non_zero_when_something_asked_for_is_impossible(capsys, monkeypatch):
    words = (
        "--model",
        "resnet18",
        "--checkpoint",
        "random",
        "--data",
        "none",
        "--input-size",
        "64",
        "--runtime",
        "tensorrt",
        "--json",
    )
    code, out, _ = call(capsys, monkeypatch, "check", *words)
    assert code == 1
    found = json.loads(out)
    assert not found["possible"] and "tensorrt" in found["problems"][0]


def test_every_field_of_the_request_is_an_option(capsys, monkeypatch):
    from compress.request import Request

    help_text = call(capsys, monkeypatch, "run", "--help")[1]
    for name in Request.model_fields:
        assert "--" + name.replace("_", "-") in help_text
    torch.manual_seed(0)


def test_fractions_and_config_lists_come_from_the_shell(capsys, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("compress.pipeline.check", lambda request: given.append(request) or {"possible": True})
    call(capsys, monkeypatch, "check", "--layer-sparsity", "layer1=0.3", "--layer-sparsity", "conv1=0", "--json")
    entries = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    call(capsys, monkeypatch, "check", "--config-list", tmp_path / "list.json", "--json")
    call(capsys, monkeypatch, "check", "--config-list", json.dumps(entries), "--json")
    assert given[0].layer_sparsity == {"layer1": 0.3, "conv1": 0.0}
    assert given[1].config_list == given[2].config_list == tuple(entries)
    error = call(capsys, monkeypatch, "check", "--config-list", "no/list.json")[2]
    assert "config_list: got 'no/list.json', expected a readable JSON file, or JSON itself" in error


def test_the_reports_command_repeats_the_plan():
    from compress.request import Request
    from compress.request.snippets import shell_command

    ratios = Request(layer_sparsity="layer1=0.3 conv1=0").model_dump(mode="json")
    assert shell_command(ratios).endswith("--layer-sparsity layer1=0.3 --layer-sparsity conv1=0.0")
    entries = '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]'
    command = shell_command(Request(config_list=entries).model_dump(mode="json"))
    assert command.endswith(f"--config-list '{entries}'")
