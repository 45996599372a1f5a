"""Checkpoints for tests, honest and hostile, written the way attackers and training scripts write them."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

Writer = Callable[[Path], None]


class RunsCommand:
    """Unpickled, it creates the file `marker`; `callee` is what the pickle names."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluates(RunsCommand):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


def small_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).state_dict()


def edit_zip(
    source: Path, target: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Copy a zip, each entry's bytes through `change`; None leaves the entry out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)


def _edited(change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Writer:
    def write(path: Path) -> None:
        honest = path.with_name("honest.pth")
        torch.save(small_state(), honest)
        edit_zip(honest, path, change, compression)

    return write


def _with_entry(name: str, data: bytes) -> Writer:
    def write(path: Path) -> None:
        torch.save(small_state(), path)
        with zipfile.ZipFile(path) as file:
            root = file.namelist()[0].partition("/")[0]
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name.replace("ROOT", root), data)

    return write


def _saved(make: Callable[[], object], **options: object) -> Writer:
    return lambda path: torch.save(make(), path, **options)


def _bytes(make: Callable[[], bytes]) -> Writer:
    return lambda path: path.write_bytes(make())


def _cut(keep: Callable[[bytes], bytes]) -> Writer:
    def write(path: Path) -> None:
        torch.save(small_state(), path)
        path.write_bytes(keep(path.read_bytes()))

    return write


def _flip_payload(data: bytes) -> bytes:
    """One bit of the first weight: the structure stays intact, only a checksum notices."""
    weights = small_state()["0.weight"].numpy().tobytes()
    at = data.index(weights)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def _exported(path: Path) -> None:
    target = path.with_suffix(".pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), target)
    target.rename(path)


def _old_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))
    return buffer.getvalue()


def _bytearray_bomb() -> bytes:
    """A pickle of 30 bytes that makes the interpreter allocate 10 GB; torch's safe loader runs it."""
    return b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85R."


def _many_overlapping(path: Path) -> None:
    torch.save(small_state(), path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, end + 16)[0]
    first = struct.unpack_from("<I", data, start + 42)[0]
    second = start + 46 + sum(struct.unpack_from("<HHH", data, start + 28))
    struct.pack_into("<I", data, second + 42, first)
    path.write_bytes(bytes(data))


def safetensors_bytes(header: dict[str, object] | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _with(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
    return lambda: {**small_state(), name: change(small_state()[name])}


def _poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[:2] = value
        return changed

    return change


def hostile(marker: Path) -> dict[str, tuple[str, Writer, str]]:
    """Name -> (file name, writer, words that the refusal must contain). Those that run something create `marker`."""
    state = small_state
    return {
        "command in a zip": ("a.pth", _saved(lambda: {"w": RunsCommand(marker)}), "asks to run a program"),
        "eval in a zip": ("a.pth", _saved(lambda: {"w": Evaluates(marker)}), "asks to run a program"),
        "command in the old format": (
            "a.pth",
            _saved(lambda: {"w": RunsCommand(marker)}, _use_new_zipfile_serialization=False),
            "old pickle or tar",
        ),
        "command in a plain pickle": (
            "a.pth",
            _bytes(lambda: pickle.dumps({"w": RunsCommand(marker)})),
            "old pickle or tar",
        ),
        "old tar format": ("a.pt", _bytes(_old_tar), "old pickle or tar"),
        "10 GB byte array": (
            "a.pth",
            _edited(lambda name, data: _bytearray_bomb() if name.endswith("data.pkl") else data),
            "not a tensor (builtins.bytearray)",
        ),
        "second index": (
            "a.pth",
            _with_entry("ROOT/data.pkl", pickle.dumps({"w": RunsCommand(marker)}, 2)),
            "two entries of one name",
        ),
        "name out of the archive": ("a.pth", _with_entry("../../evil", b"x"), "not in one folder"),
        "unexpected entry": ("a.pth", _with_entry("ROOT/evil.so", b"x"), "not one that torch.save writes"),
        "whole module": ("a.pth", _saved(lambda: torchvision.models.squeezenet1_1()), "whole model object"),
        "TorchScript": ("a.pt", _torchscript, "TorchScript program"),
        "torch.export": ("a.pth", _exported, "torch.export"),
        "numpy number": (
            "a.pth",
            _saved(lambda: {"state_dict": state(), "best": np.float64(0.5)}),
            "not a tensor (numpy",
        ),
        "argparse namespace": (
            "a.pth",
            _saved(lambda: {"model": state(), "args": argparse.Namespace(lr=1)}),
            "not a tensor (argparse.Namespace)",
        ),
        "flipped bit": ("a.pth", _cut(_flip_payload), "checksum of entry"),
        "second half missing": ("a.pth", _cut(lambda data: data[: len(data) // 2]), "zip directory is missing"),
        "overlapping entries": ("a.pth", _many_overlapping, "entries overlap"),
        "compressed again": ("a.pth", _edited(lambda name, data: data, zipfile.ZIP_DEFLATED), "was compressed after"),
        "storage cut short": (
            "a.pth",
            _edited(lambda name, data: data[:8] if name.endswith("data/0") else data),
            "tensors cannot be read",
        ),
        "storage missing": (
            "a.pth",
            _edited(lambda name, data: None if name.endswith("data/0") else data),
            "tensors cannot be read",
        ),
        "empty file": ("a.pth", _bytes(lambda: b""), "is empty"),
        "web page": ("a.pth", _bytes(lambda: b"<html>404</html>"), "is a web page"),
        "text": ("a.pth", _bytes(lambda: b"hello"), "neither a .safetensors file nor"),
        "zip of something else": (
            "a.pth",
            lambda path: zipfile.ZipFile(path, "w").writestr("x/notes.txt", "x"),
            "not one that torch.save writes",
        ),
        "expanded tensor": (
            "a.pth",
            _saved(lambda: {"w": torch.zeros(1).expand(10**6, 10**6)}),
            "1000000 x 1000000, and 1 numbers",
        ),
        "many views of one storage": (
            "a.pth",
            _saved(lambda: {f"w{i}": base for base in [torch.zeros(10**6)] for i in range(9)}),
            "share their numbers",
        ),
        "no dimension": (
            "a.pth",
            _saved(lambda: {"w": torch.zeros(0, 2**40)}),
            "w of the shape 0 x 1099511627776, and each dimension",
        ),
        "sparse tensor": (
            "a.pth",
            _saved(lambda: {"w": torch.eye(3).to_sparse()}),
            "holds sparse tensors (torch._utils._rebuild_sparse_tensor)",
        ),
        "complex numbers": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("C64", [1], 0, 8)}, b"\0" * 8)),
            "holds complex tensors (C64)",
        ),
        "NaN": ("a.pth", _saved(_with("3.weight", _poisoned(float("nan")))), "3.weight holds 2 NaN or Inf values"),
        "infinity": ("a.pth", _saved(_with("3.bias", _poisoned(float("inf")))), "3.bias holds 2 NaN or Inf values"),
        "too large for float32": (
            "a.pth",
            _saved(lambda: {"w": torch.tensor([1e300], dtype=torch.float64)}),
            "w holds 1 NaN or Inf",
        ),
        "negative variance": ("a.pth", _saved(_with("1.running_var", lambda tensor: -tensor)), "negative variances"),
        "path as a name": ("a.pth", _saved(lambda: {"../../etc/passwd": torch.zeros(1)}), "name is not letters"),
        "number as a name": ("a.pth", _saved(lambda: {7: torch.zeros(1)}), "name is not letters"),
        "a list": ("a.pth", _saved(lambda: [torch.zeros(1)]), "holds a list instead of named tensors"),
        "nothing": ("a.pth", _saved(dict), "no tensor"),
        "only numbers": ("a.pth", _saved(lambda: {"epoch": 3}), "no tensor"),
        "endless nesting": ("a.pth", _saved(_self_reference), "more than 4 dictionaries deep"),
        "safetensors, giant header": (
            "a.safetensors",
            _bytes(lambda: struct.pack("<Q", 2**63) + b"{}"),
            "header is missing, cut off, or larger",
        ),
        "safetensors, cut off": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("F32", [4], 0, 16)}, b"\0" * 8)),
            "cut off",
        ),
        "safetensors, too much": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("F32", [1], 0, 4)}, b"\0" * 8)),
            "other bytes follow",
        ),
        "safetensors, overlap": (
            "a.safetensors",
            _bytes(
                lambda: safetensors_bytes({"v": _tensor("F32", [2], 0, 8), "w": _tensor("F32", [2], 4, 12)}, b"\0" * 12)
            ),
            "overlap or leave holes",
        ),
        "safetensors, wrong size": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("F32", [2**62, 4], 0, 8)}, b"\0" * 8)),
            "does not match its shape",
        ),
        "safetensors, negative shape": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("F32", [-1, -2], 0, 8)}, b"\0" * 8)),
            "does not match its shape",
        ),
        "safetensors, duplicate name": (
            "a.safetensors",
            _bytes(
                lambda: safetensors_bytes(
                    b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                    b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                    b"\0",
                )
            ),
            "header is damaged",
        ),
        "safetensors, deep header": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes(b"[" * 100_000, b"")),
            "header is damaged",
        ),
        "safetensors, empty shape trick": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({"w": _tensor("F32", [0, 2**40], 0, 0)}, b"")),
            "w of the shape 0 x 1099511627776",
        ),
        "safetensors, too many": (
            "a.safetensors",
            _bytes(lambda: safetensors_bytes({f"w{i}": _tensor("U8", [0], 0, 0) for i in range(5001)}, b"")),
            "more than 5000 tensors",
        ),
        "safetensors, foreign metadata": (
            "a.safetensors",
            _bytes(
                lambda: safetensors_bytes(
                    {"__metadata__": {"preprocessing": "no json"}, "w": _tensor("U8", [1], 0, 1)}, b"\0"
                )
            ),
            "is not the JSON that this tool writes",
        ),
    }


def _self_reference() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["model"] = loop
    return loop
