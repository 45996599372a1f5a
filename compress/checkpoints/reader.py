"""An untrusted file becomes named tensors, or one sentence why not.

    inspection   size, container, index, checksums, names, formats, shapes: the file's own word, nothing is loaded
    loader       torch's loader in its safe mode, in a process that can do nothing else; every number is looked at
    here         what comes back is our own safetensors file, the only one that is read from then on

There is no other way in and no second try: what does not pass is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from compress import files, signing
from compress.checkpoints import containers
from compress.checkpoints import metadata as checkpoint_metadata
from compress.checkpoints.inspection import Inspected, inspect
from compress.checkpoints.loader import Loader
from compress.errors import CheckpointError, StorageError
from compress.preprocessing import Preprocessing

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
"""What DataParallel, torch.compile, Lightning and similar wrappers put before every name."""
ACCEPTED, RECORD = "accepted.safetensors", "accepted.json"
RECORD_KIND = "accepted checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and what the file itself tells about their use (safetensors metadata); None where it does not."""

    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None


def read(path: Path, *, names: Collection[str] | None = None, loader: Loader | None = None) -> dict[str, Tensor]:
    """The weights in a .safetensors file or a zip-format .pth/.pt state dict.

    Nested dictionaries are opened (`state_dict`, `model`, ...), prefixes that every name carries are removed
    (`module.`, `model.`, ...), half, bfloat16 and double become float32, integers stay as they are. Numbers and
    strings beside the tensors, such as an epoch, are left out.

    Args:
        names: tensor names of the caller's own module; prefixes are then removed only if it makes the names equal.
        loader: one that is running, where many files are read.

    Raises:
        CheckpointError: the file is unsafe, damaged or no checkpoint; the sentence says what to do.
    """
    return dict(read_with_facts(path, names=names, loader=loader).tensors)


def read_with_facts(path: Path, *, names: Collection[str] | None = None, loader: Loader | None = None) -> Checkpoint:
    """`read`, with the preprocessing and class names that a safetensors file carries in its metadata."""
    inspected = inspect(path)
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        accepted = Path(folder) / ACCEPTED
        _accept(path, inspected, accepted, loader)
        return read_own(accepted, names=names)


def read_once(path: Path, folder: Path) -> Checkpoint:
    """`read_with_facts`, once: what was accepted stays in `folder`, and asked again only that is opened.

    Raises:
        CheckpointError: as `read`.
        StorageError: `folder` cannot be written.
    """
    accepted, record = folder / ACCEPTED, folder / RECORD
    if not _is_recorded(accepted, record):
        inspected = inspect(path)
        with files.atomic(accepted) as partial:
            _accept(path, inspected, partial, None)
        files.write_text(record, signing.sealed(RECORD_KIND, {"sha256": files.sha256(accepted)}, record))
    return read_own(accepted)


def forget(folder: Path) -> None:
    """A run that begins anew reads its checkpoint anew."""
    (folder / RECORD).unlink(missing_ok=True)


def read_own(path: Path, *, names: Collection[str] | None = None) -> Checkpoint:
    """A safetensors file that this tool wrote. Raises `CheckpointError` when it is damaged."""
    try:
        header = containers.read_safetensors_header(path)
        tensors = load_safetensors(path.read_bytes())
    except (containers.Refused, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: give the checkpoint again.") from error
    told = checkpoint_metadata.read(path.name, header.metadata)
    return Checkpoint(_without_prefixes(tensors, names), told.preprocessing, told.class_names)


def _accept(path: Path, inspected: Inspected, target: Path, loader: Loader | None) -> None:
    """Writes the checked tensors of `path` to `target`, a safetensors file of our own."""
    metadata = checkpoint_metadata.read(path.name, inspected.metadata).as_metadata()
    if loader is not None:
        loader.unpack(path, inspected, target, metadata)
        return
    with Loader() as short_lived:
        short_lived.unpack(path, inspected, target, metadata)


def _is_recorded(accepted: Path, record: Path) -> bool:
    try:
        return bool(signing.opened(RECORD_KIND, record)["sha256"] == files.sha256(accepted))
    except (OSError, StorageError, KeyError):
        return False


def _without_prefixes(tensors: Mapping[str, Tensor], names: Collection[str] | None) -> dict[str, Tensor]:
    """Remove prefixes that every name carries; towards the caller's names when those are given."""
    stripped = dict(tensors)
    while names is None or set(stripped) != set(names):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in stripped)), None)
        if prefix is None or any(name == prefix for name in stripped):
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped if names is None or set(stripped) == set(names) else dict(tensors)
