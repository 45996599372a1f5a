"""Loads an inspected checkpoint in a process that can do nothing else, and takes back tensors in a format of our own.

    inspected file --> process without files, sockets, children; limited memory and time --> safetensors, checked again

The process starts in 1 to 3 s, which is why everything that can be told without it has been refused before
(compress.checkpoints.inspection).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from compress import processes
from compress.checkpoints import containers
from compress.checkpoints.containers import TensorEntry
from compress.checkpoints.inspection import Inspected
from compress.checkpoints.refusals import RESAVE
from compress.checkpoints.sandboxed import FOUND, NEGATIVE, NO_ROOM, NOT_CONFINED, NOT_FINITE, WRITTEN, Order
from compress.errors import CheckpointError, StorageError

START_S = 120
"""Importing torch, on a machine that is busy."""
SECONDS, SECONDS_PER_GIB = 20, 20
SPARE_BYTES = 512 * 2**20
MAX_FINDING_BYTES = 4096


class LoaderFailed(Exception):
    """How the process ended that should have unpacked a file: an exit status, a negative signal, None for a timeout."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Loader:
    """One process, and in it a confined child for every file; use it in a `with` block, from one thread."""

    def __init__(self) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603  (our own words, no shell)
            [sys.executable, "-P", "-m", "compress.checkpoints.sandboxed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=processes.child_environment() | one_thread | {"CUDA_VISIBLE_DEVICES": ""},
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def unpack(self, path: Path, inspected: Inspected, target: Path, metadata: Mapping[str, str]) -> None:
        """Writes the inspected tensors of `path` to `target`, a new safetensors file with `metadata`.

        Raises:
            CheckpointError: the numbers cannot be used, the file is damaged, or this machine cannot confine a process.
            StorageError: there is no room for `target`.
        """
        expected = {
            name: TensorEntry("float32" if "float" in entry.dtype else entry.dtype, entry.shape)
            for name, entry in inspected.tensors.items()
        }
        unpacked = sum(entry.nbytes for entry in expected.values())
        order = Order(
            source=str(path.resolve()),
            target=str(target.resolve()),
            is_zip=inspected.is_zip,
            keys=list(inspected.keys),
            tensors={name: (entry.dtype, list(entry.shape)) for name, entry in inspected.tensors.items()},
            metadata=metadata,
            memory_bytes=3 * inspected.nbytes + 3 * unpacked + SPARE_BYTES,
            cpu_s=SECONDS + SECONDS_PER_GIB * (unpacked >> 30),
            file_bytes=unpacked + containers.MAX_HEADER_BYTES + 8,
        )
        status = self._carry_out(order)
        if status != WRITTEN:
            raise self._refusal(path, target, status, expected)
        try:
            header = containers.read_safetensors_header(target)
        except containers.Refused as reason:
            raise _damaged(path) from reason
        if header.tensors != expected or header.metadata != metadata:
            raise _damaged(path)

    def _carry_out(self, order: Order) -> int | None:
        """The exit status of the child, or None when it had to be ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(START_S + 2 * order.cpu_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        return int(json.loads(answer)["status"]) if answer else None

    def _refusal(
        self, path: Path, target: Path, status: int | None, expected: Mapping[str, TensorEntry]
    ) -> CheckpointError | StorageError:
        if status == FOUND:
            return _about_finding(path, target, expected)
        if status == NO_ROOM:
            return StorageError(
                f"The disk is full: the weights of {path.name} could not be kept. Free some space and try again."
            )
        if status == NOT_CONFINED:
            return CheckpointError(
                f"{path.name} was not opened, because this machine does not let a process be confined (seccomp, Linux "
                "on x86-64 or arm64): run Espalier where it does."
            )
        if status is None:
            return CheckpointError(
                f"{path.name} could not be read: the process that opens checkpoints ended or took too long. Try again, "
                "and if it happens again, save the file anew."
            )
        refusal = _damaged(path)
        refusal.__cause__ = LoaderFailed(status)
        return refusal


def _about_finding(path: Path, target: Path, expected: Mapping[str, TensorEntry]) -> CheckpointError:
    """The sentence about a finding, which is foreign text until its words are compared with ours."""
    try:
        found = json.loads(target.read_bytes()[:MAX_FINDING_BYTES])
        what, name, count = found["what"], found["tensor"], int(found["count"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return _damaged(path)
    if name not in expected:
        return _damaged(path)
    if what == NOT_FINITE:
        return CheckpointError(
            f"{path.name}: {name} holds {count} NaN or Inf values: use a checkpoint from before training diverged."
        )
    if what == NEGATIVE:
        return CheckpointError(f"{path.name}: {name} holds negative variances: the file is damaged, save it again.")
    return _damaged(path)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged: its tensors cannot be read. {RESAVE}")
