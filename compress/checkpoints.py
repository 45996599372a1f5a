"""An untrusted file becomes named tensors, or one sentence why not.

The order matters: size, container, pickle instructions, checksums, and only then torch's own loader, in its safe mode
and without mapping the file into memory (mapped, it returns the compressed bytes of a deflated entry as weights). What
comes out is checked again before anybody computes with it.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from compress import containers
from compress.errors import CheckpointError, RequestError
from compress.models import Preprocessing

MAX_FILE_BYTES = 2 * 2**30
MAX_ENTRIES = 10_000
MAX_DIMENSION = 2**24
MAX_CLASS_NAME = 200

RESAVE = (
    "Where you made it, run `torch.save(model.state_dict(), 'weights.pth')`, "
    "or `safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`, and give that file."
)
NESTED_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema")
"""Keys under which training scripts keep the weights, the first one present is taken."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
"""What DataParallel, torch.compile, Lightning and similar wrappers put before every name."""

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_ENTRY_NAME = re.compile(
    r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and what the file itself tells about their use (safetensors metadata); None where it does not."""

    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None


def read(path: Path, *, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The weights in a .safetensors file or a zip-format .pth/.pt state dict.

    Nested dictionaries are opened (`state_dict`, `model`, ...), prefixes that every name carries are removed
    (`module.`, `model.`, ...), half, bfloat16 and double become float32, integers stay as they are. Numbers and
    strings beside the tensors, such as an epoch, are left out.

    Args:
        names: tensor names of the caller's own module; prefixes are then removed only if it makes the names equal.

    Raises:
        CheckpointError: the file is unsafe, damaged or no checkpoint; the sentence says what to do.
    """
    return dict(read_with_facts(path, names=names).tensors)


def read_with_facts(path: Path, *, names: Collection[str] | None = None) -> Checkpoint:
    """`read`, with the preprocessing and class names that a safetensors file carries in its metadata."""
    start = _first_bytes(path)
    metadata: dict[str, str] = {}
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip:
        _check_zip(path)
    elif path.suffix.lower() == ".safetensors":
        metadata = _check_safetensors(path)
    else:
        raise CheckpointError(_not_a_checkpoint(path, start))
    tensors = {name: _checked(path, name, tensor) for name, tensor in _unwrap(path, _load(path, is_zip)).items()}
    _check_total(path, tensors)
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    _check_values(path, floats)
    return Checkpoint(_without_prefixes(floats, names), *_facts(path, metadata))


def _first_bytes(path: Path) -> bytes:
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
    return start


def _not_a_checkpoint(path: Path, start: bytes) -> str:
    if start[257:262] == b"ustar" or start[:1] == b"\x80":
        return f"{path.name} is in the old pickle or tar format, which cannot be checked safely. {RESAVE}"
    return f"{path.name} is neither a .safetensors file nor a PyTorch .pth/.pt state dict. {RESAVE}"


def _check_safetensors(path: Path) -> dict[str, str]:
    try:
        return containers.read_safetensors_header(path)
    except containers.Refused as reason:
        raise CheckpointError(
            f"{path.name} is not a usable safetensors file: {reason}. Save or upload it again."
        ) from reason


def _check_zip(path: Path) -> None:
    """Directory, entry names, pickle instructions and checksums of a zip-format checkpoint."""
    try:
        entries = containers.read_directory(path, MAX_ENTRIES)
        root = _check_names(path, [entry.filename for entry in entries])
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries
        ):
            raise containers.Refused("it was compressed after torch.save wrote it")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise containers.Refused("its entries claim more bytes than the file has")
        with zipfile.ZipFile(path) as file:
            if f"{root}byteorder" in file.namelist() and file.read(f"{root}byteorder") != b"little":
                raise containers.Refused("it was written on a big-endian machine")
            if file.getinfo(f"{root}data.pkl").file_size > containers.MAX_PICKLE_BYTES:
                raise containers.Refused("its index of tensors is larger than 1 MiB")
            containers.check_pickle(file.read(f"{root}data.pkl"))
    except containers.Refused as reason:
        raise CheckpointError(f"{path.name} is not a usable checkpoint: {reason}. {RESAVE}") from reason
    except containers.ForeignGlobal as foreign:
        raise CheckpointError(_about_foreign(path, foreign)) from foreign
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged (checksum of its index): copy or upload it again.") from error
    damaged = containers.checksum_failure(path)
    if damaged is not None:
        entry = containers.printable(damaged.rpartition("/")[2])
        raise CheckpointError(f"{path.name} is damaged (checksum of entry {entry}): copy or upload it again.")


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


def _about_foreign(path: Path, foreign: containers.ForeignGlobal) -> str:
    what = containers.printable(f"{foreign.module}.{foreign.name}")
    top = foreign.module.partition(".")[0]
    if foreign.module.startswith(("torch.nn.", "torchvision.")) or top == "__main__":
        return f"{path.name} holds a whole model object ({what}) instead of its weights. {RESAVE}"
    if top in (
        "posix",
        "nt",
        "os",
        "subprocess",
        "builtins",
        "__builtin__",
        "sys",
        "commands",
        "importlib",
        "runpy",
        "pty",
        "socket",
        "shutil",
    ):
        return (
            f"{path.name} asks to run a program when it is opened ({what}): do not use this file, and ask its author "
            "for a safetensors file."
        )
    return f"{path.name} holds a Python object that is not a tensor ({what}). {RESAVE}"


def _load(path: Path, is_zip: bool) -> Any:
    """Run the loaders on a file whose container has passed; all parsing of foreign bytes by torch happens here.

    One function, taking a path and giving tensors, so that it can move into a process with a memory limit.
    """
    try:
        if is_zip:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        return load_safetensors(path.read_bytes())
    except Exception as error:  # the loaders raise a dozen types on damaged input, each means the same to the user
        raise CheckpointError(f"{path.name} is damaged: its tensors cannot be read. {RESAVE}") from error


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The innermost dictionary of tensors."""
    for _ in range(4):
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path.name} holds a {type(loaded).__name__} instead of named tensors. {RESAVE}")
        nested = next((key for key in NESTED_KEYS if isinstance(loaded.get(key), dict)), None)
        if nested is None:
            break
        loaded = loaded[nested]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor) and name != "n_averaged"}
    unknown = [value for value in loaded.values() if not isinstance(value, Tensor | int | float | str | None)]
    if not tensors or unknown:
        kind = type(unknown[0]).__name__ if unknown else "no tensor"
        raise CheckpointError(
            f"{path.name} holds {kind} where weights are expected; they are looked for at the top and under "
            f"{', '.join(NESTED_KEYS)}. {RESAVE}"
        )
    if len(tensors) > containers.MAX_TENSORS:
        raise CheckpointError(
            f"{path.name} holds {len(tensors)} tensors; at most {containers.MAX_TENSORS} are accepted. {RESAVE}"
        )
    return tensors


def _checked(path: Path, name: Any, tensor: Tensor) -> Tensor:
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise CheckpointError(
            f"{path.name} holds a tensor whose name is not letters, digits, dots and underscores. {RESAVE}"
        )
    if tensor.dtype not in _FLOATS + _INTEGERS or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path.name}: {name} has the number format {kind} ({tensor.layout}); save it as float32. {RESAVE}"
        )
    if any(not 0 < size <= MAX_DIMENSION for size in tensor.shape):
        raise CheckpointError(f"{path.name}: {name} has the impossible shape {_shape(tensor)}. {RESAVE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path.name}: {name} claims the shape {_shape(tensor)}, but holds fewer numbers. {RESAVE}"
        )
    return tensor


def _check_total(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Many views of one storage would multiply when they are copied."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > 2 * path.stat().st_size:
        raise CheckpointError(
            f"{path.name} holds tensors that share their numbers and would unpack to {total >> 20} MiB. {RESAVE}"
        )


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{path.name}: {name} holds {bad} NaN or Inf values: use a checkpoint from before training diverged."
            )
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise CheckpointError(f"{path.name}: {name} holds negative variances: the file is damaged, save it again.")


def _without_prefixes(tensors: Mapping[str, Tensor], names: Collection[str] | None) -> dict[str, Tensor]:
    """Remove prefixes that every name carries; towards the caller's names when those are given."""
    stripped = dict(tensors)
    while names is None or set(stripped) != set(names):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in stripped)), None)
        if prefix is None or any(name == prefix for name in stripped):
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped if names is None or set(stripped) == set(names) else dict(tensors)


def _facts(path: Path, metadata: Mapping[str, str]) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """Preprocessing and class names from safetensors metadata; other people's metadata without them is fine."""
    try:
        recipe = json.loads(metadata["preprocessing"]) if "preprocessing" in metadata else None
        names = json.loads(metadata["class_names"]) if "class_names" in metadata else None
        preprocessing = None if recipe is None else Preprocessing.from_dict(recipe)
        if names is not None and not all(isinstance(name, str) and 0 < len(name) <= MAX_CLASS_NAME for name in names):
            raise ValueError("class names")
    except (ValueError, TypeError, KeyError, RecursionError, RequestError) as error:
        raise CheckpointError(
            f"{path.name}: its metadata `preprocessing` or `class_names` is not the JSON that this tool writes: save "
            "the file without metadata."
        ) from error
    return preprocessing, None if names is None else tuple(names)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)
