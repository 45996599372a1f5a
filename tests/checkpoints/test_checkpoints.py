"""Untrusted checkpoints: every hostile file is refused with its own sentence, every honest one read exactly."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import RunsCommand, hostile, small_state
from safetensors.torch import save_file
from torture.honest import KINDS, difference
from torture.hostile import NO_LOADER

from compress.checkpoints import inspection, pickles, reader, sandboxed
from compress.checkpoints.containers import TensorEntry
from compress.checkpoints.loader import Loader
from compress.errors import CheckpointError
from compress.preprocessing import Preprocessing

pytestmark = pytest.mark.integration

HOSTILE = sorted(hostile(Path("marker")))
NEED_NUMBERS = {"NaN", "infinity", "too large for float32", "negative variance"}
"""What no description of a file tells; all others are refused before a process is started for them."""


@pytest.fixture(scope="module")
def loader():
    with Loader() as running:
        yield running


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_reason_and_nothing_runs(name, tmp_path, loader):
    marker = tmp_path / "it-ran"
    file_name, write, words = hostile(marker)[name]
    path = tmp_path / file_name
    write(path)

    with pytest.raises(CheckpointError) as refusal:
        reader.read(path, loader=loader if name in NEED_NUMBERS else NO_LOADER)

    message = str(refusal.value)
    assert words in message
    assert message.startswith(file_name)
    assert "weights_only" not in message, "torch's own text tells people to switch the safety off"
    assert message.rstrip().endswith((".", "'weights.pth')"))
    assert not marker.exists()


def test_the_command_payload_does_run_in_the_unsafe_loader(tmp_path):
    """The control: without the gate the same file executes, so the tests above can fail."""
    marker, path = tmp_path / "it-ran", tmp_path / "a.pth"
    torch.save({"w": RunsCommand(marker)}, path)
    script = f"import pickle, zipfile; z = zipfile.ZipFile({str(path)!r}); pickle.loads(z.read(z.namelist()[0]))"

    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

    assert marker.exists()


def test_a_loader_failure_is_never_answered_by_a_second_load(tmp_path, monkeypatch):
    calls = []

    def failing(*arguments, **options):
        calls.append(options)
        raise ValueError("Weights only load failed, retry with weights_only=False")

    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    monkeypatch.setattr(torch, "load", failing)

    with path.open("rb") as file, pytest.raises(ValueError, match="Weights only load failed"):
        sandboxed.unpack(file, True, [], {}, {})
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": False}]


@pytest.mark.parametrize("name", KINDS)
def test_honest_files_of_every_kind_answer_as_if_loaded_by_hand(name, tmp_path, loader):
    assert difference(name, tmp_path, loader) is None


def test_what_the_loader_gives_back_is_compared_with_what_the_file_described(tmp_path, loader):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    inspected = inspection.inspect(path)
    other = {**inspected.tensors, "3.bias": TensorEntry("float32", (3,))}

    with pytest.raises(CheckpointError, match="its tensors cannot be read") as refusal:
        loader.unpack(path, replace(inspected, tensors=other), tmp_path / "out", {})

    assert refusal.value.__cause__.status == sandboxed.UNREADABLE
    loader.unpack(path, inspected, tmp_path / "out2", {})


def test_a_checkpoint_of_a_run_is_opened_once(tmp_path, monkeypatch):
    path, folder = tmp_path / "a.pth", tmp_path / "uploads"
    torch.save(small_state(), path)
    first = reader.read_once(path, folder)
    path.write_bytes(b"something else")

    again = reader.read_once(path, folder)

    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in small_state())
    kept = folder / reader.ACCEPTED
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="neither a .safetensors file nor"):
        reader.read_once(path, folder)
    reader.forget(folder)
    with pytest.raises(CheckpointError, match="neither a .safetensors file nor"):
        reader.read_once(path, folder)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_float_formats_become_float32_and_integers_stay(kind, suffix, tmp_path, loader):
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in small_state().items()}
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)

    read = reader.read(path, loader=loader)

    assert read["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(read[key], state[key].float()) for key in state if state[key].is_floating_point())
    assert all(value.dtype == torch.float32 for key, value in read.items() if "batches" not in key)


def test_a_prefix_that_belongs_to_the_callers_own_module_stays(tmp_path, loader):
    state = {f"model.{key}": value for key, value in small_state().items()}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "a.pth")

    assert set(reader.read(tmp_path / "a.pth", names=state, loader=loader)) == set(state)
    assert set(reader.read(tmp_path / "a.pth", names=["other"], loader=loader)) == {
        f"module.{key}" for key in state
    }


def test_facts_in_the_metadata_are_read(tmp_path, loader):
    path = tmp_path / "a.safetensors"
    metadata = {
        "preprocessing": '{"input_size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}',
        "class_names": '["cat", "dog"]',
    }
    save_file(small_state(), path, metadata=metadata)

    facts = reader.read_with_facts(path, loader=loader)

    assert facts.preprocessing == Preprocessing(32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert facts.class_names == ("cat", "dog")
    save_file(small_state(), path)
    assert reader.read_with_facts(path, loader=loader).class_names is None


def test_a_missing_file_and_one_that_is_too_large_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        reader.read(tmp_path / "none.pth")
    monkeypatch.setattr(inspection, "MAX_FILE_BYTES", 1000)
    torch.save(small_state(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="at most 2 GiB are accepted"):
        reader.read(tmp_path / "a.pth")


def test_a_directory_of_too_many_entries_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as file:
        for index in range(10_001):
            file.writestr(f"a/data/{index}", b"")
    monkeypatch.setattr(zipfile, "ZipFile", None)

    with pytest.raises(CheckpointError, match="more than 10000 entries"):
        reader.read(path)


def test_a_published_architecture_stays_far_below_the_limits(tmp_path, loader):
    import torchvision

    torch.save(torchvision.models.densenet121().state_dict(), tmp_path / "a.pth")
    assert len(reader.read(tmp_path / "a.pth", loader=loader)) == 727
    with zipfile.ZipFile(tmp_path / "a.pth") as file:
        index = file.read("a/data.pkl")
    assert len(index) < pickles.MAX_PICKLE_BYTES / 6
