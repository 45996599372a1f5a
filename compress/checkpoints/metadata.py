"""What a safetensors file tells of its own use: preprocessing and class names in its metadata, which anybody may write.

Types, ranges, lengths and characters are checked before anything is made of them: one number here decides how much
memory every image takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from compress import naming
from compress.errors import CheckpointError
from compress.preprocessing import INTERPOLATIONS, MAX_RESIZE, Preprocessing

PREPROCESSING, CLASS_NAMES = "preprocessing", "class_names"
MAX_INPUT = 1024
"""Pixels of a side, as a request may ask for."""
MAX_MEAN, MIN_STD, MAX_STD = 10.0, 1e-4, 100.0
MAX_CLASSES, MAX_CLASS_NAME = 50_000, 200
_FIELDS = {"input_size", "mean", "std", "resize_size", "interpolation"}


@dataclass(frozen=True)
class Facts:
    """Checked; None where the file does not tell. Any other metadata is left behind."""

    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None

    def as_metadata(self) -> dict[str, str]:
        """As this tool writes it."""
        written: dict[str, str] = {}
        if self.preprocessing is not None:
            written[PREPROCESSING] = json.dumps(self.preprocessing.as_dict())
        if self.class_names is not None:
            written[CLASS_NAMES] = json.dumps(self.class_names)
        return written


def read(file: str, metadata: Mapping[str, str]) -> Facts:
    """The facts in the metadata of `file`, a name for the sentence.

    Raises:
        CheckpointError: the metadata has `preprocessing` or `class_names`, and they are not what these may be.
    """
    preprocessing, class_names = (_parsed(file, key, metadata.get(key)) for key in (PREPROCESSING, CLASS_NAMES))
    return Facts(
        None if preprocessing is None else _preprocessing(file, preprocessing),
        None if class_names is None else _class_names(file, class_names),
    )


def _parsed(file: str, key: str, text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: its metadata `{key}` is not the JSON that this tool writes: save the file without this metadata."
        ) from error
    if value is None:
        _refuse(file, key, "null", "leave it out")
    return value


def _preprocessing(file: str, values: Any) -> Preprocessing:
    if not isinstance(values, dict):
        _refuse(file, PREPROCESSING, "no object", 'an object such as {"input_size": 224, "mean": [...], "std": [...]}')
    if odd := sorted((set(values) - _FIELDS) | ({"input_size", "mean", "std"} - set(values))):
        _refuse(file, PREPROCESSING, f"other fields ({naming.shown(odd[0])})", f"{', '.join(sorted(_FIELDS))}")
    size, resize = values["input_size"], values.get("resize_size")
    if type(size) is not int or not 1 <= size <= MAX_INPUT:
        _refuse(file, "input_size", size, f"a whole number of pixels from 1 to {MAX_INPUT}")
    if resize is not None and (type(resize) is not int or not size <= resize <= MAX_RESIZE):
        _refuse(file, "resize_size", resize, f"null, or a whole number of pixels from the input size to {MAX_RESIZE}")
    mean = _three(file, "mean", values["mean"], -MAX_MEAN, MAX_MEAN)
    std = _three(file, "std", values["std"], MIN_STD, MAX_STD)
    interpolation = values.get("interpolation", INTERPOLATIONS[0])
    if interpolation not in INTERPOLATIONS:
        _refuse(file, "interpolation", interpolation, " or ".join(INTERPOLATIONS))
    return Preprocessing(size, mean, std, resize, interpolation)


def _three(file: str, field: str, values: Any, least: float, most: float) -> tuple[float, ...]:
    numbers = values if isinstance(values, list) else []
    if len(numbers) != 3 or not all(
        type(number) in (int, float) and math.isfinite(number) and least <= number <= most for number in numbers
    ):
        _refuse(file, field, values, f"three numbers from {least:g} to {most:g}, one per RGB channel of pixels in 0..1")
    return tuple(map(float, numbers))


def _class_names(file: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_CLASSES:
        _refuse(file, CLASS_NAMES, "no list of names", f"a list of 1 to {MAX_CLASSES:,} names")
    for position, name in enumerate(values):
        if not isinstance(name, str) or len(name) > MAX_CLASS_NAME:
            _refuse(file, f"{CLASS_NAMES}[{position}]", name, f"a text of at most {MAX_CLASS_NAME} characters")
        if found := naming.flaw(name):
            raise CheckpointError(
                f"{file}: the name of class {position} in its metadata holds {found}, which cannot be shown: correct "
                f"`{CLASS_NAMES}`, or save the file without this metadata."
            )
    return tuple(values)


def _refuse(file: str, field: str, got: object, allowed: str) -> NoReturn:
    given = naming.shown(got if isinstance(got, str) else repr(got))
    raise CheckpointError(
        f"{file}: its metadata gives {field} as {given}, expected {allowed}: correct it, or save the file without this "
        "metadata."
    )
