"""What an untrusted checkpoint holds, told from its bytes without loading it: named tensors, or one sentence why not.

Size, container, index and checksums are looked at in this order, cheapest first, with the standard library alone. What
passes is a list of tensors with plausible names, formats and shapes whose numbers are all in the file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import containers, pickles
from compress.containers import ITEM_BYTES, TensorEntry
from compress.errors import CheckpointError
from compress.pickles import StoredTensor

MAX_FILE_BYTES = 2 * 2**30
MAX_ENTRIES = 10_000
MAX_DIMENSION = 2**24

RESAVE = (
    "Where you made it, run `torch.save(model.state_dict(), 'weights.pth')`, "
    "or `safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`, and give that file."
)
NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema")
"""Keys under which training scripts keep the weights, the first one present is taken."""
MAX_NESTING = 4

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")  # torchvision's regnets have dashes
_ENTRY_NAME = re.compile(
    r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_MODEL_OBJECTS = ("torch.nn.", "torchvision.", "timm.")
_PROGRAM_MODULES = frozenset(
    "posix nt os subprocess builtins __builtin__ sys commands importlib runpy pty socket shutil code ctypes pickle "
    "_pickle timeit pdb bdb cProfile profile trace webbrowser pydoc asyncio multiprocessing functools operator".split()
)


@dataclass(frozen=True)
class Inspected:
    """A file that may be loaded, and all that may come out of it."""

    keys: tuple[str, ...]
    """Where in the loaded dictionary the tensors are."""
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    """Of a safetensors file; written by anybody."""
    nbytes: int
    """Size of the file."""
    is_zip: bool


def inspect(path: Path) -> Inspected:
    """Raises `CheckpointError` when the file is unsafe, damaged or no checkpoint; the sentence says what to do."""
    size, start = _look(path)
    if start.startswith(b"PK\x03\x04"):
        keys, tensors = _unwrapped(path, _index_of_zip(path))
        inspected = Inspected(keys, tensors, {}, size, True)
    elif path.suffix.lower() == ".safetensors":
        header = _safetensors_header(path)
        inspected = Inspected((), header.tensors, header.metadata, size, False)
    else:
        raise CheckpointError(_not_a_checkpoint(path, start))
    _check(path, inspected)
    return inspected


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _look(path: Path) -> tuple[int, bytes]:
    """Size and first bytes."""
    try:
        if not path.is_file():
            raise CheckpointError(f"There is no checkpoint file {path}: check the path.")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if size == 0:
        raise CheckpointError(f"{path.name} is empty: copy or upload it again.")
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path.name} has {size / 2**30:.1f} GiB; at most 2 GiB are accepted: save the weights alone, in float16."
        )
    return size, start


def _not_a_checkpoint(path: Path, start: bytes) -> str:
    if start[257:262] == b"ustar" or start[:1] == b"\x80":
        return f"{path.name} is in the old pickle or tar format, which cannot be checked safely. {RESAVE}"
    return f"{path.name} is neither a .safetensors file nor a PyTorch .pth/.pt state dict. {RESAVE}"


def _safetensors_header(path: Path) -> containers.SafetensorsHeader:
    try:
        return containers.read_safetensors_header(path)
    except containers.Refused as reason:
        raise CheckpointError(
            f"{path.name} is not a usable safetensors file: {reason}. Save or upload it again."
        ) from reason


# ---- zip-format checkpoints ---------------------------------------------------------------------------------------


def _index_of_zip(path: Path) -> Any:
    """What the pickle in a zip-format checkpoint describes, after directory, index and checksums have passed."""
    try:
        entries = containers.read_directory(path, MAX_ENTRIES)
        root = _check_names(path, [entry.filename for entry in entries])
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries
        ):
            raise containers.Refused("it was compressed after torch.save wrote it")
        index = _interpreted(path, root)
    except containers.Refused as reason:
        raise CheckpointError(f"{path.name} is not a usable checkpoint: {reason}. {RESAVE}") from reason
    except pickles.ForeignGlobal as foreign:
        raise CheckpointError(_about_foreign(path, foreign)) from foreign
    damaged = containers.checksum_failure(path)
    if damaged is not None:
        entry = containers.printable(damaged.rpartition("/")[2])
        raise CheckpointError(f"{path.name} is damaged (checksum of entry {entry}): copy or upload it again.")
    _check_storages(path, index, {entry.filename.removeprefix(f"{root}data/"): entry.file_size for entry in entries})
    return index.value


def _interpreted(path: Path, root: str) -> pickles.Index:
    try:
        with zipfile.ZipFile(path) as file:
            order = file.NameToInfo.get(f"{root}byteorder")
            if order is not None and (order.file_size != len(b"little") or file.read(order) != b"little"):
                raise containers.Refused("it was written on a big-endian machine")
            if file.getinfo(f"{root}data.pkl").file_size > pickles.MAX_PICKLE_BYTES:
                raise containers.Refused("its index of tensors is larger than 1 MiB")
            data = file.read(f"{root}data.pkl")
    except containers.Refused:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises ten types on damaged bytes, each means the same here
        raise CheckpointError(f"{path.name} is damaged (checksum of its index): copy or upload it again.") from error
    return pickles.interpret(data)


def _check_storages(path: Path, index: pickles.Index, sizes: Mapping[str, int]) -> None:
    """Every storage that the index names is in the archive, and as long as it says."""
    for storage in index.storages:
        if sizes.get(storage.key) != storage.items * ITEM_BYTES[storage.dtype]:
            raise CheckpointError(f"{path.name} is damaged: its tensors cannot be read. {RESAVE}")


def _check_names(path: Path, names: list[str]) -> str:
    """The one folder inside the archive, with its slash; refuses what torch.save does not write."""
    root = names[0].partition("/")[0] + "/" if names else ""
    inside = {name.removeprefix(root) for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise CheckpointError(f"{path.name} is a TorchScript program, not weights. {RESAVE}")
    if "archive_format" in inside or any(name.startswith("models/") for name in inside):
        raise CheckpointError(f"{path.name} is a torch.export (.pt2) program, not weights. {RESAVE}")
    if len(inside) != len(names):
        raise containers.Refused("it holds two entries of one name")
    if root in ("/", "../", "./") or not all(name.startswith(root) for name in names):
        raise containers.Refused("its entries are not in one folder")
    if "data.pkl" not in inside or not all(_ENTRY_NAME.fullmatch(name) for name in inside):
        raise containers.Refused("it is a zip file, but not one that torch.save writes")
    return root


def _about_foreign(path: Path, foreign: pickles.ForeignGlobal) -> str:
    what = containers.printable(f"{foreign.module}.{foreign.name}")
    top = foreign.module.partition(".")[0]
    if foreign.module.startswith(_MODEL_OBJECTS) or top == "__main__":
        return f"{path.name} holds a whole model object ({what}) instead of its weights. {RESAVE}"
    if top in _PROGRAM_MODULES:
        return (
            f"{path.name} asks to run a program when it is opened ({what}): do not use this file, and ask its author "
            "for a safetensors file."
        )
    return f"{path.name} holds a Python object that is not a tensor ({what}). {RESAVE}"


def _unwrapped(path: Path, described: Any) -> tuple[tuple[str, ...], dict[str, TensorEntry]]:
    """The innermost dictionary of tensors, and the keys that lead to it."""
    keys: list[str] = []
    for _ in range(MAX_NESTING):
        if not isinstance(described, dict):
            raise CheckpointError(f"{path.name} holds a {_kind(described)} instead of named tensors. {RESAVE}")
        nested = next((key for key in NESTED_KEYS if isinstance(described.get(key), dict)), None)
        if nested is None:
            break
        keys.append(nested)
        described = described[nested]
    stored = {
        name: value for name, value in described.items() if isinstance(value, StoredTensor) and name != "n_averaged"
    }
    unknown = [value for value in described.values() if not isinstance(value, StoredTensor | int | float | str | None)]
    if not stored or unknown:
        kind = _kind(unknown[0]) if unknown else "no tensor"
        raise CheckpointError(
            f"{path.name} holds {kind} where weights are expected; they are looked for at the top and under "
            f"{', '.join(NESTED_KEYS)}. {RESAVE}"
        )
    entries = {name: TensorEntry(value.dtype, value.shape) for name, value in stored.items()}
    _check_names_and_shapes(path, entries)
    for name, tensor in stored.items():
        if entries[name].nbytes > tensor.storage.items * ITEM_BYTES[tensor.dtype]:
            raise CheckpointError(
                f"{path.name}: {name} claims the shape {shape_text(tensor.shape)}, but holds fewer numbers. {RESAVE}"
            )
    return tuple(keys), entries


def _kind(value: Any) -> str:
    """The user's word for what a pickle describes."""
    words = {StoredTensor: "tensor", pickles.Storage: "storage", pickles.Global: "class"}
    return words.get(type(value), type(value).__name__)


# ---- what the tensors are -----------------------------------------------------------------------------------------


def _check(path: Path, inspected: Inspected) -> None:
    if not inspected.tensors:
        raise CheckpointError(f"{path.name} holds no tensor. {RESAVE}")
    _check_names_and_shapes(path, inspected.tensors)
    total = sum(entry.nbytes for entry in inspected.tensors.values())
    if total > 2 * inspected.nbytes:  # many views of one storage multiply when they are copied
        raise CheckpointError(
            f"{path.name} holds tensors that share their numbers and would unpack to {total >> 20} MiB. {RESAVE}"
        )


def _check_names_and_shapes(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    if len(tensors) > containers.MAX_TENSORS:
        raise CheckpointError(
            f"{path.name} holds {len(tensors)} tensors; at most {containers.MAX_TENSORS} are accepted. {RESAVE}"
        )
    for name, entry in tensors.items():
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path.name} holds a tensor whose name is not letters, digits, dots, dashes and underscores. {RESAVE}"
            )
        if len(entry.shape) > containers.MAX_DIMENSIONS:
            raise CheckpointError(
                f"{path.name}: {name} has {len(entry.shape)} dimensions, which no layer has. {RESAVE}"
            )
        if any(not 0 < size <= MAX_DIMENSION for size in entry.shape):
            raise CheckpointError(
                f"{path.name}: {name} has the impossible shape {shape_text(entry.shape)[:60]}. {RESAVE}"
            )
