"""Over 500 checkpoints that run something when they are opened: payload x way of writing it x place in a file."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint_files import edit_zip, small_state
from places import PYTHONPATH

from compress.checkpoints import reader
from compress.errors import CheckpointError
from torture.payloads import FORMS, Call, payloads, prepare, write
from torture.rows import Outcome, Row

PLACES_EACH = 6
PART = 150
"""Files of which continuous integration proves that they run in the unsafe loader."""
LIMIT_S = 1.0
MAX_WORDS = 400
"""Characters of a refusal, the two commands of its remedy included."""


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    marker: Path


Place = Callable[[Path, bytes], None]
"""Writes a file in which these pickle instructions, which leave one value on the stack, are carried out."""


def cases(folder: Path) -> list[Case]:
    """The files, written; none of the markers is there."""
    prepare(folder)
    honest = folder / "honest.pth"
    torch.save(small_state(), honest)
    index = _index(honest)
    places = {name: place for name, place in _places(honest, index).items()}
    names, made = list(places), []
    for number, payload in enumerate(payloads(folder, folder / "marker")):
        for turn in range(PLACES_EACH):
            form, place = FORMS[(number + turn) % len(FORMS)], names[(number + 3 * turn) % len(names)]
            marker = folder / f"marker-{len(made)}"
            own = payloads(folder, marker)[number]
            path = folder / f"{'plain' if 'plain' in place else 'case'}-{len(made)}.{_suffix(place)}"
            places[place](path, write(own, form))
            made.append(Case(f"{_title(payload)}, {form.__name__}, {place}", path, marker))
    return made


def run(folder: Path, full: bool) -> Outcome:
    """The gate on every file, then the unsafe loader on every file, or on some of them."""
    made, failures, slowest = cases(folder), [], 0.0
    for case in made:
        started = time.perf_counter()
        wrong = refusal_of(case)
        seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        failures += [f"{case.name}: {wrong}"] if wrong else []
        failures += [f"{case.name}: refused after {seconds:.2f} s"] if seconds > LIMIT_S else []
    executed = [case for case in made if os.path.lexists(case.marker)]
    failures += [f"{case.name}: it ran" for case in executed]
    tried = made if full else made[:: len(made) // PART]
    silent = [case for case, fired in zip(tried, control(tried), strict=True) if not fired]
    failures += [f"{case.name}: it does not run in the unsafe loader either" for case in silent]
    return Outcome(
        f"{len(made)} files, {len(tried) - len(silent)} of {len(tried)} run in the unsafe loader; {len(executed)} ran here, "
        f"slowest refusal {1000 * slowest:.0f} ms",
        tuple(failures),
    )


def refusal_of(case: Case) -> str | None:
    """What is wrong with how the gate answered; None when it is as it should be."""
    try:
        reader.read(case.path, loader=NO_LOADER)
    except CheckpointError as error:
        text = str(error)
    except Exception as error:  # noqa: BLE001 - any other type is what is looked for
        return f"an unexpected {type(error).__name__}: {error}"
    else:
        return "accepted"
    if not text.startswith(case.path.name) or len(text) > MAX_WORDS or "weights_only" in text or "\n" in text:
        return f"not one sentence of ours: {text}"
    return None


def control(made: list[Case]) -> list[bool]:
    """Whether each file makes its marker in the unsafe loader."""
    orders = "".join(f"{json.dumps([str(case.path), str(case.marker)])}\n" for case in made)
    done = subprocess.run(
        [sys.executable, "-m", "torture.control"],
        input=orders,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) is not None for line in done.stdout.splitlines()]


class _NoLoader:
    """Hostile files are refused before a process is started for them."""

    def unpack(self, *_: object) -> None:
        raise AssertionError("it came as far as the loader")


NO_LOADER = _NoLoader()


def _title(payload: Call) -> str:
    while isinstance(payload.callee, Call):
        payload = payload.callee
    return f"{payload.callee.module}.{payload.callee.name}"


def _suffix(place: str) -> str:
    return "safetensors" if "safetensors" in place else "pth"


# ---- where in a file ----------------------------------------------------------------------------------------------


def _index(path: Path) -> bytes:
    """The instructions of a state dict, without the header and the end."""
    with zipfile.ZipFile(path) as file:
        data = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    assert data[:2] == b"\x80\x02" and data[-1:] == b"."
    return data[2:-1]


def _places(honest: Path, index: bytes) -> dict[str, Place]:
    word = {text: write(text, FORMS[0]) for text in ("w", "x", "_metadata", "storage", "cpu", "0")}
    ordered, storage = b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n"
    inside = {
        "beside the weights": lambda code: b"}(" + word["w"] + index + word["x"] + code + b"u",
        "before the weights, dropped": lambda code: code + b"0" + index,
        "after the weights, dropped": lambda code: index + code + b"0",
        "instead of weights": lambda code: code,
        "as a key": lambda code: b"}(" + code + index + b"u",
        "among a list": lambda code: b"}(" + word["w"] + b"](" + index + code + b"eu",
        "as the hooks of a tensor": lambda code: (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + word["storage"] + storage + word["0"] + word["cpu"] + b"KltQK\x00K\x01\x85K\x01\x85\x89" + code + b"tR"
        ),
        "as the metadata of a state dict": lambda code: ordered + b"}(" + word["_metadata"] + code + b"ub",
        "as an attribute of a state dict": lambda code: ordered + b"}(" + word["x"] + code + b"ub",
        "as the device of a storage": lambda code: b"(" + word["storage"] + storage + word["0"] + code + b"KltQ",
        "as the class of a storage": lambda code: b"(" + word["storage"] + code + word["0"] + word["cpu"] + b"KltQ",
    }  # fmt: skip
    zipped: dict[str, Place] = {name: _in_zip(honest, make) for name, make in inside.items()}
    return zipped | {
        "as a second index": _as_second_index(honest),
        "compressed": _in_zip(honest, inside["beside the weights"], zipfile.ZIP_DEFLATED),
        "named safetensors": _in_zip(honest, inside["beside the weights"]),
        "with another protocol mark": _in_zip(honest, lambda code: b"\x80\x00" + code),
        "old format": lambda path, code: path.write_bytes(_OLD_START + b"\x80\x02" + code + b"." + b"\x80\x02]."),
        "old format, in its first mark": lambda path, code: path.write_bytes(
            b"\x80\x02" + code + b"0" + _OLD_START[2:]
        ),
        "old tar format": _in_tar,
        "plain pickle": lambda path, code: path.write_bytes(b"\x80\x02" + code + b"."),
        "plain pickle without a header": lambda path, code: path.write_bytes(code + b"."),
        "plain pickle named safetensors": lambda path, code: path.write_bytes(b"\x80\x02" + code + b"."),
    }


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_OLD_START = (
    b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b".\x80\x02" + b"J" + struct.pack("<i", _PROTOCOL)
    + b".\x80\x02" + write({"little_endian": True}, FORMS[0]) + b"."
)  # fmt: skip
"""The three pickles before the object in files of torch before 1.6: a magic number, a version, the machine."""


def _in_zip(honest: Path, make: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Place:
    def place(path: Path, code: bytes) -> None:
        data = b"\x80\x02" + make(code) + b"."
        edit_zip(honest, path, lambda name, old: data if name.endswith("data.pkl") else old, compression)

    return place


def _as_second_index(honest: Path) -> Place:
    def place(path: Path, code: bytes) -> None:
        path.write_bytes(honest.read_bytes())
        with zipfile.ZipFile(path, "a") as file:
            with warnings.catch_warnings(action="ignore"):  # zipfile tells that the name is there already
                file.writestr(file.namelist()[0], b"\x80\x02" + code + b".")

    return place


def _in_tar(path: Path, code: bytes) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in (("storages", b"\x80\x02" + code + b"."), ("tensors", b"\x80\x02K\x00."), ("pickle", b"N.")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


HOSTILE = Row(
    "hostile",
    "checkpoints that run something when opened, >= 500, each proved to by the unsafe loader",
    "0 executed, each refused in < 1 s with one sentence of ours",
    run,
)
