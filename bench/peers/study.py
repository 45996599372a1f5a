"""One model through all rows: what each leaves, then what the files reach on the runtimes."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy import DENSE_EPOCHS, RECIPE, dense_checkpoint
from bench.peers import environments, measure
from bench.peers.driver import Conditions, compress_row, finished, user_lines
from bench.peers.environments import PeerError
from bench.peers.rows import OURS, ROWS, Row
from compress import machine
from compress.data import dataset as data_dataset
from compress.files import atomic
from compress.workload import DEMO_CHECKPOINT, DEMO_DATA, DEMO_MODEL

Facts = dict[str, Any]

LARGE = 224
"""Pixels of the larger images, for latency alone."""
FULL_TRAINING = 60_000
"""`DENSE_EPOCHS` are passes over that many images."""
TOLD = ("torch-pruning", "onnxruntime", "nncf", "openvino", "neural_compressor_pt", "nvidia-modelopt", "onnx")
"""Packages whose versions the page tells."""


@dataclass(frozen=True)
class Environment:
    """Where the rows of a peer run."""

    python: Path | None
    """None when it could not be made."""
    facts: Facts
    """What the page tells: versions and size, or the error."""

    @classmethod
    def prepared(cls, name: str, home: Path) -> Environment:
        if name == OURS:
            return cls(Path(sys.executable), {})
        try:
            python = environments.prepare(name, home)
        except PeerError as error:
            return cls(None, {"error": str(error)})
        held = {key.lower(): version for key, version in environments.versions(name, home).items()}
        told = {package: held[package] for package in TOLD if package in held}
        return cls(python, {"versions": told, "megabytes": environments.megabytes(name, home)})


def folder_of(out: Path, model: str, source: str, budget: int, dataset: data_dataset.Dataset) -> Path:
    """Where all that belongs to one model is kept.

    The dense weights and the training images are found again there, so its name has a digest of all that decides them.
    """
    how = (_resolved(source), RECIPE, _dense_epochs(model, dataset), inspect.getsource(dense_checkpoint))
    digest = hashlib.sha256(repr(how).encode())
    digest.update(_training_pixels(dataset).tobytes())
    digest.update(dataset.train.labels.numpy().tobytes())
    return (out / f"{model}-{budget}-{digest.hexdigest()[:8]}").resolve()


def conditions_of(model: str, source: str, budget: int, dataset: data_dataset.Dataset, folder: Path) -> Conditions:
    """The dense weights (trained once, with labels) and the training images, as files that every environment can read.

    Args:
        folder: the one that `folder_of` names.
    """
    bundled = (model, source) == (DEMO_MODEL, DEMO_DATA)
    epochs = _dense_epochs(model, dataset)
    weights = DEMO_CHECKPOINT if bundled else dense_checkpoint(model, dataset.train, folder, epochs=epochs)
    images = folder / "training-images.npz"
    if not images.exists():
        with atomic(images) as partial:
            np.savez(partial, pixels=_training_pixels(dataset), labels=dataset.train.labels.numpy())
    return Conditions(
        model=model,
        weights=weights.resolve(),
        images=images.resolve(),
        data=_resolved(source),
        mean=RECIPE.mean[0],
        std=RECIPE.std[0],
        input_size=RECIPE.input_size,
        budget=budget,
        int8_dot_product=machine.has_int8_dot_product(),
    )


def _resolved(source: str) -> str:
    return source if source == DEMO_DATA else str(Path(source).resolve())


def _dense_epochs(model: str, dataset: data_dataset.Dataset) -> float:
    return DENSE_EPOCHS.get(model, 2.0) * FULL_TRAINING / len(dataset.train)


def _training_pixels(dataset: data_dataset.Dataset) -> np.ndarray:
    """uint8 [N, C, size, size]"""
    return dataset.train.take(torch.arange(len(dataset.train))).numpy()


def results(
    conditions: Conditions,
    folder: Path,
    made: Mapping[str, Environment],
    only: Collection[str],
    *,
    retry: bool = False,
    rows: Collection[Row] = ROWS,
) -> list[Facts]:
    """Of the rows `only`, and of others that are finished already; each with its structure's files at 224 pixels.

    Args:
        retry: those of `only` that failed are made again.
    """
    enlarged = replace(conditions, budget=0, input_size=LARGE)
    found = []
    for row in rows:
        place = folder / row.name
        if row.name not in only and finished(row, conditions, place) is None:
            continue
        again = retry and row.name in only
        result = _result(row, conditions, place, made.get(row.environment), again)
        if "error" not in result:
            large = _result(row, enlarged, place / "large", made.get(row.environment), again)
            result = result | {"large_files": large.get("files"), "large_error": large.get("error")}
        found.append(result)
    return found


def _result(row: Row, conditions: Conditions, folder: Path, made: Environment | None, retry: bool) -> Facts:
    """As it was left, or made now; without an environment a failure, which is not kept."""
    kept = finished(row, conditions, folder)
    if kept is not None and not (retry and "error" in kept):
        return kept
    if made is None or made.python is None:
        reason = f"not installed: {made.facts['error']}" if made else "not made: its environment was not asked for"
        return {"row": row.name, "error": reason, "lines": user_lines(row.script)}
    print(f"{conditions.model} at {conditions.input_size} px: {row.name}", flush=True)
    return compress_row(row, conditions, folder, made.python)


def deployed(found: Collection[Facts], folder: Path, test: data_dataset.Split, rows: Collection[Row] = ROWS) -> list[Facts]:
    """Each file on each runtime: latency at both sizes, all rows in turn, and accuracy at the smaller."""
    references = {row.name for row in rows if row.reference}
    files: dict[str, list[measure.Deployed]] = {"small": [], "large": []}
    for result in found:
        name, place = result["row"], folder / result["row"]
        for size, where, listed in (
            ("small", place, result.get("files")),
            ("large", place / "large", result.get("large_files")),
        ):
            files[size] += measure.deployed_files(name, where, listed or {}, reference=name in references)
    raced = {
        "small": measure.latencies(files["small"], test.preprocessing.input_size),
        "large": measure.latencies(files["large"], LARGE),
    }
    absent = {
        result["row"]: result.get("large_error") or "its script left no file for that runtime" for result in found
    }
    return [_entry(one, raced, absent[one.row], test) for one in files["small"]]


def _entry(
    one: measure.Deployed, raced: Mapping[str, Mapping[measure.Key, Facts]], absent: str, test: data_dataset.Split
) -> Facts:
    """`absent` is why there is no larger file, where there is none."""
    entry: Facts = {"row": one.row, "runtime": one.runtime, "asked": one.precision, "file_bytes": one.file_bytes}
    for size, timings in raced.items():
        timing = timings.get(one.key, {"error": absent})
        entry |= {
            f"{size}_ms": timing.get("p50_ms"),
            f"{size}_noisy": timing.get("noisy"),
            f"{size}_error": timing.get("error"),
        }
    small = raced["small"][one.key]
    if "error" in small:
        return entry | {"error": small["error"]}
    entry |= {key: small[key] for key in ("precision", "kernels", "notes")}
    try:
        return entry | measure.accuracy(one, test, torch.get_num_threads())
    except Exception as error:  # noqa: BLE001 - foreign files
        return entry | {"error": measure.refusal(error)}
