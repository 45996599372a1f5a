"""The process that opens checkpoints: `python -m compress.checkpoints.sandboxed`, started by `compress.checkpoints.loader` and nobody else.

It reads orders, one JSON object a line, and carries each out in a child forked for it, which confines itself before
the first byte of the file is looked at and ends with it. The answer is one line: how the child ended. What the child
found lies in the file that the order names, and is checked again by whoever gave the order.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from compress.checkpoints.seccomp import confine, die_with_parent

WRITTEN, FOUND, UNREADABLE, NO_ROOM, NOT_CONFINED = 0, 3, 4, 5, 6
"""How a child ends: the file holds safetensors; it holds a finding; neither."""
NOT_FINITE, NEGATIVE = "not finite", "negative"


@dataclass(frozen=True)
class Finding(Exception):
    """Something in the numbers that the user has to know."""

    what: str
    tensor: str
    count: int


@dataclass(frozen=True)
class Order:
    """One file to unpack; `compress.checkpoints.loader` says what each of these is for."""

    source: str
    target: str
    is_zip: bool
    keys: list[str]
    tensors: Mapping[str, tuple[str, list[int]]]
    """Name -> number format and shape, as the file described them."""
    metadata: Mapping[str, str]
    memory_bytes: int
    cpu_s: int
    file_bytes: int


def main() -> None:
    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    _warm_up()
    for line in sys.stdin.buffer:
        order, parent = Order(**json.loads(line)), os.getpid()
        pid = os.fork()
        if pid == 0:
            _carry_out(order, parent)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{json.dumps({'status': status})}\n")
        sys.stdout.flush()


def _warm_up() -> None:
    """What the loaders import when first used has to be there before a child can open files no more."""
    codecs.lookup("cp437")  # of names in zip files that do not say UTF-8
    example = {"w": torch.zeros(2)}
    buffer = io.BytesIO()
    torch.save(example, buffer)
    unpack(buffer, True, [], {"w": ("float32", [2])}, {})
    unpack(io.BytesIO(save_safetensors(example)), False, [], {"w": ("float32", [2])}, {})


def _carry_out(order: Order, parent: int) -> None:
    """Never returns."""
    status = UNREADABLE
    try:
        status = _confined(order, parent)
    finally:
        os._exit(status)


def _confined(order: Order, parent: int) -> int:
    die_with_parent(parent)
    with open(order.source, "rb", buffering=0) as source:
        target = os.open(order.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.close(0)
        os.close(1)
        try:
            confine(memory_bytes=order.memory_bytes, cpu_s=order.cpu_s, file_bytes=order.file_bytes)
        except OSError:
            return NOT_CONFINED
        try:
            content = unpack(source, order.is_zip, order.keys, order.tensors, order.metadata)
        except Finding as finding:
            found = {"what": finding.what, "tensor": finding.tensor, "count": finding.count}
            return _write(target, json.dumps(found).encode(), FOUND)
        return _write(target, content, WRITTEN)


def _write(descriptor: int, content: bytes, status: int) -> int:
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        return NO_ROOM if error.errno in (errno.ENOSPC, errno.EDQUOT) else UNREADABLE
    return status


def unpack(
    source: BinaryIO,
    is_zip: bool,
    keys: list[str],
    tensors: Mapping[str, tuple[str, list[int]]],
    metadata: Mapping[str, str],
) -> bytes:
    """The named tensors as a safetensors file; half, bfloat16 and double become float32, integers stay.

    Raises:
        Finding: a tensor holds NaN or Inf, or variances below zero.
        Exception: whatever the loaders raise on damaged bytes.
    """
    loaded: Any = _load(source, is_zip)
    for key in keys:
        loaded = loaded[key]
    accepted = {}
    for name, (dtype, shape) in tensors.items():
        tensor = loaded[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError("not a tensor of numbers")
        if str(tensor.dtype) != f"torch.{dtype}" or list(tensor.shape) != list(shape):
            raise ValueError("not the tensor that the file described")
        accepted[name] = _checked(name, tensor.detach())
    return save_safetensors(accepted, dict(metadata) or None)


def _load(source: BinaryIO, is_zip: bool) -> Any:
    """torch's loader gets an archive of our own making: it and Python cannot disagree about what an entry is."""
    if not is_zip:
        return load_safetensors(source.read())
    archive = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(f"archive/{entry.filename.partition('/')[2]}", old.read(entry))
    archive.seek(0)
    return torch.load(archive, map_location="cpu", weights_only=True, mmap=False)


def _checked(name: str, tensor: Tensor) -> Tensor:
    """A copy with its own memory."""
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    copied = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    bad = int((~torch.isfinite(copied)).sum())
    if bad:
        raise Finding(NOT_FINITE, name, bad)
    if name.endswith("running_var") and bool((copied < 0).any()):
        raise Finding(NEGATIVE, name, int((copied < 0).sum()))
    return copied


if __name__ == "__main__":
    main()
