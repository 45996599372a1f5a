"""Class folders and the model's outputs: which belongs to which."""

from __future__ import annotations

import pytest

from compress.data import layout
from compress.errors import DataError


def assign(folders, **options):
    return layout.assign_outputs(
        folders, **({"num_classes": 3, "class_names": None, "class_map": None, "source": "pets"} | options)
    )


def test_folders_match_the_models_names_whatever_their_order_and_spelling():
    outputs, names, _ = assign(["dog", "guinea pig", "t shirt top"], class_names=["T-shirt/top", "Dog", "Guinea_Pig"])
    assert outputs == {"dog": 1, "guinea pig": 2, "t shirt top": 0} and names == ("T-shirt/top", "Dog", "Guinea_Pig")


def test_a_class_map_decides_and_names_the_outputs():
    outputs, names, _ = assign(["lion", "tiger", "wolf"], num_classes=4, class_map={"lion": 2, "tiger": 2, "wolf": 0})
    assert outputs == {"lion": 2, "tiger": 2, "wolf": 0} and names == ("wolf", "class 1", "lion / tiger", "class 3")


def test_imagenets_folder_codes_are_in_the_models_order():
    folders = [f"n{number:08}" for number in range(1000)]
    outputs, names, _ = assign(folders, num_classes=1000, class_names=[f"thing {number}" for number in range(1000)])
    assert outputs[folders[7]] == 7 and names[7] == "thing 7"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"class_names": ["a", "b", "c"]}, "the folder x is not a class name of the model. Write a JSON file"),
        ({"class_map": {"x": 0, "y": 1}}, "does not name the folder z of pets"),
        ({"class_map": {"x": 0, "y": 1, "z": 2, "q": 1}}, "names q, but pets has no such folder"),
        ({"class_map": {"x": 0, "y": 1, "z": 3}}, r"gives z the output 3, but the model's outputs are 0 to 2"),
        ({"class_map": {"x": 0, "y": 1, "z": True}}, "gives z the output True"),
        ({"class_map": {"x": 1, "y": 1, "z": 1}}, "every folder of pets the same output"),
    ],
)
def test_names_and_maps_that_do_not_fit_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        assign(["x", "y", "z"], **options)


def test_very_unequal_classes_are_noted():
    assert layout.check_counts(["a"] * 1000 + ["b"] * 60, "x") == (
        "the largest class has over 10 times the images of the smallest",
    )
