"""Untrusted checkpoints: every hostile file is refused with its own sentence, every honest one read exactly."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import RunsCommand, hostile, small_state
from safetensors.torch import save_file

from compress import checkpoints, containers
from compress.errors import CheckpointError
from compress.images import Preprocessing

HOSTILE = sorted(hostile(Path("marker")))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_reason_and_nothing_runs(name, tmp_path):
    marker = tmp_path / "it-ran"
    file_name, write, words = hostile(marker)[name]
    path = tmp_path / file_name
    write(path)

    started = time.perf_counter()
    with pytest.raises(CheckpointError) as refusal:
        checkpoints.read(path)

    message = str(refusal.value)
    assert words in message
    assert message.startswith(file_name)
    assert "weights_only" not in message, "torch's own text tells people to switch the safety off"
    assert message.rstrip().endswith((".", "'weights.pth')"))
    assert not marker.exists()
    assert time.perf_counter() - started < 5


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

    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        checkpoints.read(path)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": False}]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {
            "model_state_dict": state,
            "optimizer_state_dict": torch.optim.SGD([torch.zeros(1)], lr=1).state_dict(),
        },
        lambda state: {"model": {"state_dict": state}, "note": "x"},
        lambda state: {
            "net": state,
            "ema": {key: value + 1 for key, value in state.items() if value.is_floating_point()},
        },
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {
            key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()
        },
        lambda state: {**state, "epoch": 3, "name": "x"},
        lambda state: {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_honest_files_give_their_exact_tensors(wrap, tmp_path):
    state = small_state()
    torch.save(wrap(state), tmp_path / "a.pth")

    read = checkpoints.read(tmp_path / "a.pth")

    assert set(read) == set(state)
    assert all(torch.equal(read[key], state[key]) and read[key].dtype == state[key].dtype for key in state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_float_formats_become_float32_and_integers_stay(kind, suffix, tmp_path):
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in small_state().items()}
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)

    read = checkpoints.read(path)

    assert read["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(read[key], state[key].float()) for key in state if state[key].is_floating_point())
    assert all(value.dtype == torch.float32 for key, value in read.items() if "batches" not in key)


def test_a_prefix_that_belongs_to_the_callers_own_module_stays(tmp_path):
    state = {f"model.{key}": value for key, value in small_state().items()}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "a.pth")

    assert set(checkpoints.read(tmp_path / "a.pth", names=state)) == set(state)
    assert set(checkpoints.read(tmp_path / "a.pth", names=["other"])) == {f"module.{key}" for key in state}


def test_facts_in_the_metadata_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {
        "preprocessing": '{"input_size": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}',
        "class_names": '["cat", "dog"]',
    }
    save_file(small_state(), path, metadata=metadata)

    facts = checkpoints.read_with_facts(path)

    assert facts.preprocessing == Preprocessing(32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert facts.class_names == ("cat", "dog")
    save_file(small_state(), path)
    assert checkpoints.read_with_facts(path).class_names is None


def test_a_missing_file_and_one_that_is_too_large_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        checkpoints.read(tmp_path / "none.pth")
    monkeypatch.setattr(checkpoints, "MAX_FILE_BYTES", 1000)
    torch.save(small_state(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="at most 2 GiB are accepted"):
        checkpoints.read(tmp_path / "a.pth")


def test_a_directory_of_too_many_entries_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as file:
        for index in range(10_001):
            file.writestr(f"a/data/{index}", b"")
    monkeypatch.setattr(zipfile, "ZipFile", None)

    with pytest.raises(CheckpointError, match="more than 10000 entries"):
        checkpoints.read(path)


def test_a_published_architecture_stays_far_below_the_limits(tmp_path):
    import torchvision

    torch.save(torchvision.models.densenet121().state_dict(), tmp_path / "a.pth")
    assert len(checkpoints.read(tmp_path / "a.pth")) == 727
    with zipfile.ZipFile(tmp_path / "a.pth") as file:
        index = file.read("a/data.pkl")
    assert len(index) < containers.MAX_PICKLE_BYTES / 6


def test_damaged_files_of_every_kind_end_in_the_one_error(tmp_path):
    """300 honest files with random bytes changed: refused by our own error, or read with finite numbers."""
    generator = torch.Generator().manual_seed(0)
    seeds = []
    for suffix, write in ((".pth", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"seed{suffix}"
        write(small_state(), path)
        seeds.append(path)
    outcomes = {"refused": 0, "read": 0}
    for round_number in range(300):
        seed = seeds[round_number % 2]
        data = bytearray(seed.read_bytes())
        for at in torch.randint(0, len(data), (1 + round_number % 8,), generator=generator).tolist():
            data[at] = int(torch.randint(0, 256, (1,), generator=generator))
        mutant = tmp_path / f"mutant{seed.suffix}"
        mutant.write_bytes(bytes(data))
        try:
            tensors = checkpoints.read(mutant)
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    assert outcomes["refused"] > 100
    assert sum(outcomes.values()) == 300
