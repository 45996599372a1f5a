"""What an untrusted checkpoint holds, told from its bytes without loading it: named tensors, or one sentence why not.

Size, container, index and checksums are looked at in this order, cheapest first, with the standard library alone. What
passes is a list of tensors with plausible names, formats and shapes whose numbers are all in the file.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import naming
from compress.checkpoints import containers, pickles, refusals
from compress.checkpoints.containers import ITEM_BYTES, TensorEntry
from compress.checkpoints.pickles import StoredTensor
from compress.checkpoints.refusals import RESAVE
from compress.errors import CheckpointError

MAX_FILE_BYTES = 2 * 2**30
MAX_ENTRIES = 10_000
MAX_DIMENSION = 2**24

NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema")
"""Keys under which training scripts keep the weights, the first one present is taken."""
MAX_NESTING = 4

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")  # torchvision's regnets have dashes
_ENTRY_NAME = re.compile(
    r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_BESIDE_TENSORS = (StoredTensor, int, float, str, type(None))
_SAFETENSORS = ("misnamed safetensors", "unknown")
"""What the start of a file named .safetensors may look like."""


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
    if start.startswith(b"PK"):
        keys, tensors = _unwrapped(path, _index_of_zip(path))
        inspected = Inspected(keys, tensors, {}, size, True)
    elif path.suffix.lower() == ".safetensors" and refusals.told_by(start, ".safetensors")[0] in _SAFETENSORS:
        header = _safetensors_header(path)
        inspected = Inspected((), header.tensors, header.metadata, size, False)
    else:
        raise _refusal(path, *refusals.told_by(start, path.suffix.lower()))
    _check(path, inspected)
    return inspected


def shape_text(shape: tuple[int, ...]) -> str:
    return naming.shown(" x ".join(map(str, shape))) or "a single number"


def _look(path: Path) -> tuple[int, bytes]:
    """Size and first bytes."""
    try:
        if path.is_dir():
            raise _refusal(path, "folder")
        if not path.is_file():
            raise CheckpointError(f"There is no checkpoint file {path}: check the path.")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if size == 0:
        raise _refusal(path, "empty")
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path.name} has {size / 2**30:.1f} GiB; at most 2 GiB are accepted: save the weights alone, in float16."
        )
    return size, start


def _refusal(path: Path, kind: str, what: str = "") -> CheckpointError:
    return CheckpointError(refusals.sentence(path.name, kind, what))


def _safetensors_header(path: Path) -> containers.SafetensorsHeader:
    try:
        return containers.read_safetensors_header(path)
    except containers.UnknownFormat as name:
        kind = refusals.number_format(str(name))
        if kind is not None:
            raise _refusal(path, kind, str(name)) from name
        raise CheckpointError(
            f"{path.name} holds tensors in the number format {name}, which no layer computes with here. Where you made it, turn "
            "them into float32 or int64 and save the state dict anew."
        ) from name
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
            raise containers.Compressed
        index = _interpreted(path, root)
    except containers.Compressed as reason:
        raise _refusal(path, "compressed") from reason
    except pickles.OtherProtocol as version:
        raise _refusal(path, "protocol", str(version)) from version
    except containers.Refused as reason:
        raise CheckpointError(f"{path.name} is not a usable checkpoint: {reason}. {RESAVE}") from reason
    except pickles.ForeignGlobal as foreign:
        kind, name = refusals.named(f"{foreign.module}.{foreign.name}", foreign.others)
        raise _refusal(path, kind, containers.printable(name)) from foreign
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
    if "data.pkl" not in inside or inside & {"constants.pkl", "archive_format"}:
        if kind := refusals.in_zip(inside):
            raise _refusal(path, *kind)
    if len(inside) != len(names):
        raise containers.Refused("it holds two entries of one name")
    if root in ("/", "../", "./") or not all(name.startswith(root) for name in names):
        raise containers.Refused("its entries are not in one folder")
    if "data.pkl" not in inside or not all(_ENTRY_NAME.fullmatch(name) for name in inside):
        raise containers.Refused("it is a zip file, but not one that torch.save writes")
    return root


def _unwrapped(path: Path, described: Any) -> tuple[tuple[str, ...], dict[str, TensorEntry]]:
    """The innermost dictionary of tensors, and the keys that lead to it."""
    keys: list[str] = []
    for _ in range(MAX_NESTING + 1):
        if not isinstance(described, dict):
            raise _refusal(path, "no names", _kind(described))
        nested = next((key for key in NESTED_KEYS if isinstance(described.get(key), dict)), None)
        if nested is None:
            break
        keys.append(nested)
        described = described[nested]
    else:
        raise CheckpointError(f"{path.name} keeps its weights more than {MAX_NESTING} dictionaries deep. {RESAVE}")
    stored = {
        name: value for name, value in described.items() if isinstance(value, StoredTensor) and name != "n_averaged"
    }
    _refuse_others(path, described, bool(stored))
    entries = {name: TensorEntry(value.dtype, value.shape) for name, value in stored.items()}
    _check_names_and_shapes(path, entries)
    for name, tensor in stored.items():
        if entries[name].nbytes > tensor.storage.items * ITEM_BYTES[tensor.dtype]:
            what = f"{name} has the shape {shape_text(tensor.shape)}, and {tensor.storage.items:,} numbers"
            raise _refusal(path, "shared", what)
    return tuple(keys), entries


def _refuse_others(path: Path, described: Mapping[Any, Any], has_tensors: bool) -> None:
    """Raises CheckpointError where there are no tensors, or more than numbers and text among them."""
    others = [(key, value) for key, value in described.items() if not isinstance(value, _BESIDE_TENSORS)]
    if has_tensors and others:
        key, value = others[0]
        raise _refusal(path, "mixed", f"{_kind(value)} ({naming.shown(str(key))})")
    if not has_tensors:
        inner = [naming.shown(str(key)) for key, value in others[:3] if isinstance(value, dict)]
        raise _refusal(path, "several", ", ".join(inner)) if inner else _refusal(path, "nothing")


def _kind(value: Any) -> str:
    """The user's word for what a pickle describes."""
    words: dict[type, str] = {
        StoredTensor: "a bare tensor",
        pickles.Storage: "a bare storage",
        pickles.Global: "a class",
        dict: "a dictionary",
        OrderedDict: "a dictionary",
        list: "a list",
        tuple: "a tuple",
        str: "a text",
        type(None): "nothing",
    }
    return words.get(type(value), "a number")


# ---- what the tensors are -----------------------------------------------------------------------------------------


def _check(path: Path, inspected: Inspected) -> None:
    if not inspected.tensors:
        raise _refusal(path, "nothing")
    _check_names_and_shapes(path, inspected.tensors)
    total = sum(entry.nbytes for entry in inspected.tensors.values())
    if total > 2 * inspected.nbytes:  # many views of one storage multiply when they are copied
        what = f"copied one by one they have {total:,} bytes, and the file has {inspected.nbytes:,}"
        raise _refusal(path, "shared", what)


def _check_names_and_shapes(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    if len(tensors) > containers.MAX_TENSORS:
        raise CheckpointError(
            f"{path.name} holds {len(tensors)} tensors; at most {containers.MAX_TENSORS} are accepted. Give the "
            "weights of one classifier, without an optimizer's or another model's."
        )
    for name, entry in tensors.items():
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path.name} holds a tensor whose name is not letters, digits, dots, dashes and underscores "
                f"({naming.shown(str(name))}). Rename it where you made the file, and save the state dict anew."
            )
        if len(entry.shape) > containers.MAX_DIMENSIONS:
            raise CheckpointError(
                f"{path.name}: {name} has {len(entry.shape)} dimensions, which no layer has. Leave it out of the state dict "
                "where you made the file, and save it anew."
            )
        if any(not 0 < size <= MAX_DIMENSION for size in entry.shape):
            raise _refusal(path, "shape", f"{name} of the shape {shape_text(entry.shape)}")
