"""Which image belongs to which part, class and model output: decided from names alone, before any image is opened."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress import naming
from compress.data.images import SUFFIXES
from compress.errors import DataError

TRAIN_FOLDER, TEST_FOLDERS = "train", ("test", "val", "valid", "validation")
MIN_IMAGES_PER_CLASS, FEW_IMAGES_PER_CLASS, IMBALANCE = 10, 50, 10
_OTHER_IMAGES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ico", ".jfif", ".jpe")
"""Meant as images; they are opened like the others, so that what is not usable is counted and listed."""
_IMAGENET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Layout:
    """Image names by part, and the class folder of each; no class folder anywhere means unlabelled."""

    train: tuple[str, ...]
    test: tuple[str, ...] | None
    """None: there is no test folder, the caller splits."""
    folder_of: Mapping[str, str]
    """Image name -> class folder; empty when unlabelled."""
    notes: tuple[str, ...]


def arrange(names: Sequence[str], source: str) -> Layout:
    """Read the folder layout out of relative file names.

    Raises DataError when there are no images, or the folders are neither one per class nor none at all.
    """
    images = [name for name in names if name.lower().endswith(SUFFIXES + _OTHER_IMAGES)]
    if not images:
        raise DataError(
            f"There are no images in {source}: expected JPEG, PNG, WebP or BMP files, in one folder per class, or all "
            "in one folder without labels."
        )
    notes = [f"{len(names) - len(images)} files that are not images were ignored"] if len(images) < len(names) else []
    root = _common_root(images)
    inside = {name: name.removeprefix(root) for name in images}
    parts = {path.partition("/")[0].lower() for path in inside.values() if "/" in path}
    if not parts & {TRAIN_FOLDER, *TEST_FOLDERS}:
        return Layout(tuple(images), None, _class_folders(inside, source), tuple(notes))
    return _own_parts(inside, parts, source, notes)


def _own_parts(inside: Mapping[str, str], parts: set[str], source: str, notes: list[str]) -> Layout:
    loose = parts - {TRAIN_FOLDER, *TEST_FOLDERS}
    if loose or TRAIN_FOLDER not in parts or any("/" not in path for path in inside.values()):
        raise DataError(
            f"{source} holds {' and '.join(sorted(parts))}: give train/ and test/ folders with the same class folders "
            "in each and nothing beside them, or class folders alone."
        )
    by_part = {
        part: {name: path.partition("/")[2] for name, path in inside.items() if path.lower().startswith(f"{part}/")}
        for part in parts
    }
    test = next((part for part in TEST_FOLDERS if part in parts), None)
    unused = sorted(parts - {TRAIN_FOLDER, test})
    notes += [f"the folder {part}/ was not used; {test}/ is the test part" for part in unused]
    folder_of = {part: _class_folders(by_part[part], f"{source}/{part}") for part in (TRAIN_FOLDER, test) if part}
    if test is None:
        return Layout(tuple(by_part[TRAIN_FOLDER]), None, folder_of[TRAIN_FOLDER], tuple(notes))
    strange = set(folder_of[test].values()) - set(folder_of[TRAIN_FOLDER].values())
    if strange or bool(folder_of[test]) != bool(folder_of[TRAIN_FOLDER]):
        only = f"{test}/{min(strange)}" if strange else f"{test}/ without class folders"
        raise DataError(f"{source}: the class folders of train/ and {test}/ differ ({only}): give both the same.")
    return Layout(
        tuple(by_part[TRAIN_FOLDER]), tuple(by_part[test]), folder_of[TRAIN_FOLDER] | folder_of[test], tuple(notes)
    )


def _common_root(images: Sequence[str]) -> str:
    """Folders at the top that hold nothing but one further level of folders."""
    root = ""
    while True:
        rest = [name.removeprefix(root) for name in images]
        tops = {name.partition("/")[0] for name in rest}
        deep = all(name.count("/") >= 2 for name in rest)
        if len(tops) != 1 or not deep or tops & {TRAIN_FOLDER, *TEST_FOLDERS}:
            return root
        root += f"{tops.pop()}/"


def _class_folders(inside: Mapping[str, str], source: str) -> dict[str, str]:
    """Image name -> its first folder; empty when no image is in a folder."""
    loose = sum("/" not in path for path in inside.values())
    if loose == len(inside):
        return {}
    if loose:
        raise DataError(
            f"{source} holds {loose} images beside class folders: put every image into the folder of its class."
        )
    return {name: path.partition("/")[0] for name, path in inside.items()}


def assign_outputs(
    folders: Sequence[str],
    *,
    num_classes: int,
    class_names: Sequence[str] | None,
    class_map: Mapping[str, int] | None,
    source: str,
) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    """Folder -> output of the model, the name of every output, and notes.

    Without a class map, as many folders as outputs are needed: matched by name when the model's class names are known,
    else taken in the given (sorted) order.

    Raises:
        DataError: the folders do not fit the outputs; the sentence shows how to write a class map.
    """
    if class_map is not None:
        outputs = _from_map(folders, num_classes, class_map, source)
        return outputs, _output_names(outputs, num_classes, class_names), ()
    if len(folders) < 2:
        raise DataError(
            f"{source} has one class folder ({folders[0]}), but a classifier needs at least 2: add the others, or give "
            "the folder of images itself to use them without labels."
        )
    if len(folders) != num_classes:
        problem = f"has {len(folders)} class folders, but the model has {num_classes} outputs"
        raise DataError(f"{source} {problem}. {_how_to_map(folders, num_classes)}")
    if class_names is None or (num_classes == 1000 and all(_IMAGENET_ID.fullmatch(folder) for folder in folders)):
        outputs = {folder: index for index, folder in enumerate(folders)}
        ends = f"{folders[0]} is output 0, {folders[-1]} is output {num_classes - 1}"
        note = f"class folders were taken in sorted order: {ends}"
        return outputs, tuple(class_names or folders), (note,)
    index_of = {_plain(name): index for index, name in enumerate(class_names)}
    outputs = {folder: index_of[_plain(folder)] for folder in folders if _plain(folder) in index_of}
    if len(set(outputs.values())) != num_classes:
        unknown = next((folder for folder in folders if folder not in outputs), folders[0])
        raise DataError(
            f"{source}: the folder {unknown} is not a class name of the model. {_how_to_map(folders, num_classes)}"
        )
    return outputs, tuple(class_names), ()


def _from_map(folders: Sequence[str], num_classes: int, class_map: Mapping[str, int], source: str) -> dict[str, int]:
    missing, surplus = sorted(set(folders) - set(class_map)), sorted(set(class_map) - set(folders))
    if missing:
        raise DataError(
            f"The class map does not name the folder {missing[0]} of {source}. {_how_to_map(folders, num_classes)}"
        )
    if surplus:
        raise DataError(
            f"The class map names {surplus[0]}, but {source} has no such folder: remove it or correct its name."
        )
    wrong = next(
        (
            folder
            for folder in folders
            if type(class_map[folder]) is not int or not 0 <= class_map[folder] < num_classes
        ),
        None,
    )
    if wrong is not None:
        raise DataError(
            f"The class map gives {wrong} the output {naming.shown(repr(class_map[wrong]))}, but the model's outputs are 0 to "
            f"{num_classes - 1}."
        )
    if len({class_map[folder] for folder in folders}) < 2:
        raise DataError(f"The class map gives every folder of {source} the same output: at least 2 classes are needed.")
    return {folder: class_map[folder] for folder in folders}


def _output_names(outputs: Mapping[str, int], num_classes: int, class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is not None and len(class_names) == num_classes:
        return tuple(class_names)
    named = {
        index: " / ".join(folder for folder, other in outputs.items() if other == index) for index in outputs.values()
    }
    return tuple(named.get(index, f"class {index}") for index in range(num_classes))


def _how_to_map(folders: Sequence[str], num_classes: int) -> str:
    example = json.dumps(
        {folder: min(index, num_classes - 1) for index, folder in enumerate(folders[:2])}, ensure_ascii=False
    )
    return (
        f"Write a JSON file that gives every folder the number of its output (0 to {num_classes - 1}), such as "
        f"{example}, and give it with --class-map."
    )


def _plain(name: str) -> str:
    """Names compare without case, spaces and punctuation: a folder cannot be called T-shirt/top."""
    return "".join(character for character in name.casefold() if character.isalnum())


def check_counts(folders: Sequence[str], source: str) -> tuple[str, ...]:
    """Notes about small or unequal classes; `folders` has one entry per image.

    Raises DataError when a class has fewer than 10 images.
    """
    counts = Counter(folders)
    name, least = min(counts.items(), key=lambda item: item[1])
    if least < MIN_IMAGES_PER_CLASS:
        raise DataError(
            f"{source}: the class {name} has {least} images; at least {MIN_IMAGES_PER_CLASS} per class are needed."
        )
    notes = []
    if least < FEW_IMAGES_PER_CLASS:
        notes.append(f"the class {name} has only {least} images; accuracies will be uncertain")
    if max(counts.values()) > IMBALANCE * least:
        notes.append(f"the largest class has over {IMBALANCE} times the images of the smallest")
    return tuple(notes)
