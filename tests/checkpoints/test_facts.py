"""What a checkpoint's metadata may say of its use, and names from outside: checked before anything is made of them."""

from __future__ import annotations

import json

import pytest
import torch
from image_files import RECIPE, class_entries, encoded, open_at, photo, zipped
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

from compress import naming, workload
from compress.checkpoints import metadata
from compress.checkpoints.metadata import Facts
from compress.data import dataset as data_dataset
from compress.data import images
from compress.data.images import Unreadable
from compress.errors import CheckpointError, DataError, RequestError
from compress.preprocessing import Preprocessing
from compress.request import Request

GOOD = {"input_size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"resize_size": 20_000},
            "resize_size as 20000, expected null, or a whole number of pixels from the input size",
        ),
        ({"resize_size": 16}, "resize_size as 16"),
        ({"resize_size": float("nan")}, "resize_size as nan"),
        ({"resize_size": 70.5}, "resize_size as 70.5"),
        ({"resize_size": True}, "resize_size as True"),
        ({"input_size": 70.5}, "input_size as 70.5, expected a whole number of pixels from 1 to 1024"),
        ({"input_size": 2048}, "input_size as 2048"),
        ({"input_size": "32"}, "input_size as 32"),
        ({"input_size": True}, "input_size as True"),
        ({"input_size": -(10**400)}, "input_size as -1000"),
        ({"mean": [0, 0]}, "mean as [0, 0], expected three numbers from -10 to 10"),
        ({"mean": "abc"}, "mean as abc"),
        ({"mean": [0, float("inf"), 0]}, "mean as [0, inf, 0]"),
        ({"mean": [123.7, 116.3, 103.5]}, "one per RGB channel of pixels in 0..1"),
        ({"std": [1, 1, 1e-30]}, "std as [1, 1, 1e-30]"),
        ({"std": [1, True, 1]}, "std as [1, True, 1]"),
        ({"std": [[[1]], 1, 1]}, "std as [[[1]], 1, 1]"),
        ({"interpolation": "lanczos"}, "interpolation as lanczos, expected bilinear or bicubic"),
        ({"interpolation": ["bilinear"]}, "interpolation as ['bilinear']"),
        ({"threads\x1b[2J": 1}, "other fields (threads<U+001B>[2J)"),
    ],
)
def test_preprocessing_out_of_range_is_refused_with_its_value(change, words):
    with pytest.raises(CheckpointError) as refused:
        metadata.read("a.safetensors", {"preprocessing": json.dumps(GOOD | change)})
    text = str(refused.value)
    assert text.startswith("a.safetensors: its metadata gives ") and words in text and len(text) < 400
    assert text.endswith(": correct it, or save the file without this metadata.")


@pytest.mark.parametrize("text", ["no json", "[" * 100_000, '{"a": 1', "\ud800"])
def test_metadata_that_is_no_json_is_refused(text):
    with pytest.raises(CheckpointError, match="its metadata `preprocessing` is not the JSON"):
        metadata.read("a.safetensors", {"preprocessing": text})


@pytest.mark.parametrize("value", [None, 3, [], "x", {"input_size": 32}])
def test_preprocessing_of_another_kind_is_refused(value):
    with pytest.raises(CheckpointError, match="its metadata gives preprocessing as"):
        metadata.read("a.safetensors", {"preprocessing": json.dumps(value)})


@pytest.mark.parametrize(
    "value, words",
    [
        ({}, "expected a list of 1 to 50,000 names"),
        ([], "expected a list of 1 to 50,000 names"),
        (["a"] * 50_001, "expected a list of 1 to 50,000 names"),
        (["a", 1], "class_names[1] as 1, expected a text of at most 200 characters"),
        (["a", "b" * 201], "class_names[1] as bbbb"),
        (["a", ["b"]], "class_names[1] as ['b']"),
        (["a", ""], "the name of class 1 in its metadata holds nothing that can be seen"),
        (["a", " \t"], "the name of class 1 in its metadata holds a control character (U+0009)"),
        (["\x1b[31mred", "b"], "the name of class 0 in its metadata holds a control character (U+001B)"),
        (["two\nlines"], "a control character (U+000A)"),
        (["\x9b31m"], "a control character (U+009B)"),
        (["\x7f"], "a control character (U+007F)"),
        (["\ud800"], "half of a character (U+D800)"),
        (["a\u202egpj"], "turns the direction of text (U+202E)"),
        (["\u2066a"], "turns the direction of text (U+2066)"),
        (["a\u200bb"], "an invisible character"),
        (["a\u2028b"], "a line separator (U+2028)"),
        (["a\ufffe"], "a code that is no character (U+FFFE)"),
    ],
)
def test_class_names_that_cannot_be_used_are_refused(value, words):
    with pytest.raises(CheckpointError) as refused:
        metadata.read("a.safetensors", {"class_names": json.dumps(value)})
    assert words in str(refused.value) and str(refused.value).isprintable()


def test_honest_metadata_of_all_scripts_is_taken_and_written_again():
    class_names = ("chat", "Katze 猫", "кошка", "گربه\u200cها", "🐈\u200d⬛", "T-shirt/top", "<b>&amp;")
    told = metadata.read(
        "a", {"preprocessing": json.dumps(GOOD), "class_names": json.dumps(class_names), "anything": "else"}
    )
    assert told == Facts(Preprocessing(32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)), class_names)
    assert metadata.read("a", told.as_metadata()) == told and set(told.as_metadata()) == {"preprocessing", "class_names"}
    assert metadata.read("a", {"format": "pt"}) == Facts()


def test_the_largest_input_is_what_a_request_may_ask_for():
    Request(input_size=metadata.MAX_INPUT)
    with pytest.raises(RequestError):
        Request(input_size=metadata.MAX_INPUT + 1)


@pytest.mark.parametrize("name", ["clean", "n\u00e4ht"])
def test_a_name_that_can_be_shown_has_no_flaw(name):
    assert naming.flaw(name) is None and naming.shown(name) == name
    assert naming.shown("\x1b" + "a" * 99) == "<U+001B>" + "a" * 56 + "..."


def test_as_many_class_names_as_outputs(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(get_model("squeezenet1_1", num_classes=3).state_dict(), path, {"class_names": '["a", "b", "c", "d"]'})
    with pytest.raises(CheckpointError, match="its metadata names 4 classes, but the model has 3 outputs: correct"):
        workload.open_workload(Request(model="squeezenet1_1", checkpoint=str(path), data="none"))


def test_an_input_size_that_the_model_does_not_take_is_a_refusal(tmp_path):
    path = tmp_path / "a.safetensors"
    state = get_model("squeezenet1_1", num_classes=3).state_dict()
    save_file(state, path, {"preprocessing": json.dumps(GOOD | {"input_size": 1})})
    with pytest.raises(RequestError, match="input_size: got 1, expected a size that the model accepts"):
        workload.open_workload(Request(model="squeezenet1_1", checkpoint=str(path), data="none"))

    class Asserts(torch.nn.Module):
        def forward(self, images):
            torch._assert(images.shape[-1] == 7, "Wrong image height!")

    with pytest.raises(RequestError, match="it answered: Wrong image height!"):
        workload._outputs(Asserts(), RECIPE)


def test_names_in_a_class_map_can_be_shown(tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"a\\u001b[2J": 0}')
    with pytest.raises(DataError, match=r"names a<U\+001B>\[2J, which holds a control character"):
        workload._class_map(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        workload._class_map(str(path))


@pytest.mark.parametrize("name", ["a\x1b.png", "\udcff.png"])
def test_names_in_a_folder_can_be_shown(name, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(b"x")
    with pytest.raises(DataError, match="whose name holds .*: rename it"):
        open_at(tmp_path)


# ---- pixels that resizing would make ----------------------------------------------------------------------------------

WIDE = Preprocessing(1024, RECIPE.mean, RECIPE.std, 4096)


def test_a_strip_is_refused_before_it_is_decoded(monkeypatch):
    strip = encoded(Image.new("1", (14, 990_000)))
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(Unreadable, match="one side is over 100 times the other"):
        images.decode(strip)


@pytest.mark.parametrize("size", [(100, 200), (4000, 1000), (33, 3200)])
def test_what_resizing_would_make_is_bounded_before_it_is_made(size, monkeypatch):
    image = Image.new("RGB", size)
    monkeypatch.setattr(Image.Image, "resize", None)
    with pytest.raises(Unreadable, match="pixels once its shorter side has 4096, more than 25 million"):
        images.fit(image, WIDE)


def test_images_that_would_grow_too_large_are_listed_whether_kept_or_not(tmp_path, monkeypatch):
    entries = class_entries() | {"cat/wide.png": encoded(photo(1, (64, 640)))}
    path = zipped(tmp_path / "a.zip", entries)
    recipe = Preprocessing(64, RECIPE.mean, RECIPE.std, 2000)
    for memory in (2**31, 0):
        monkeypatch.setattr(data_dataset, "MEMORY_BYTES", memory)
        dataset = data_dataset.open_data(str(path), recipe, num_classes=2)
        assert len(dataset.train) + len(dataset.test) == 24
        assert any("wide.png (2,000 x 20,000 pixels once" in note for note in dataset.notes)


def test_thumbnails_and_images_of_the_right_size_are_never_too_large():
    assert images.fit(Image.new("RGB", (1, 32)), WIDE).size == (1024, 1024)
    assert images.fit(Image.new("RGB", (1024, 1024)), WIDE).size == (1024, 1024)


@pytest.mark.parametrize("change", [{"resize_size": 4097}, {"resize_size": float("nan")}, {"input_size": 24.0}])
def test_preprocessing_from_anywhere_keeps_its_bounds(change):
    with pytest.raises(RequestError, match="a whole number of pixels"):
        Preprocessing.from_dict(RECIPE.as_dict() | change)


def test_a_checkpoint_with_such_metadata_is_refused_before_it_is_loaded(tmp_path):
    from torture.hostile import NO_LOADER

    from compress.checkpoints import reader

    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path, {"preprocessing": json.dumps(GOOD | {"resize_size": 20_000})})
    with pytest.raises(CheckpointError, match="resize_size as 20000"):
        reader.read(path, loader=NO_LOADER)
