"""What this installation signed, and everything that must not pass for it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

import compress
from compress import runs, signing
from compress.errors import StorageError
from compress.request import Request


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys" / "signing.key"
    monkeypatch.setenv(signing.KEY_VARIABLE, str(path))
    return path


def written(path: Path, kind: str = "manifest.json") -> Path:
    path.write_text(signing.sealed(kind, {"files": {"a.onnx": {"sha256": "ff", "seconds": 0.1 + 0.2}}}))
    return path


def test_what_was_sealed_opens_and_the_key_is_for_its_owner_alone(tmp_path: Path, key: Path) -> None:
    document = signing.opened("manifest.json", written(tmp_path / "manifest.json"))
    assert document == {"files": {"a.onnx": {"sha256": "ff", "seconds": 0.30000000000000004}}}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert [entry.name for entry in key.parent.iterdir()] == ["signing.key"]
    assert len(key.read_bytes()) == 32 and key.read_bytes().hex() not in (tmp_path / "manifest.json").read_text()


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, key: Path) -> None:
    path = written(tmp_path / "manifest.json")
    document, before = signing.opened("manifest.json", path), path.read_bytes()
    for position in range(len(before)):
        for bit in (1, 32):
            changed = bytearray(before)
            changed[position] ^= bit
            path.write_bytes(changed)
            try:
                assert signing.opened("manifest.json", path) == document, f"byte {position} changed the content unseen"
            except StorageError:
                continue


def test_one_kind_does_not_pass_for_another(tmp_path: Path, key: Path) -> None:
    with pytest.raises(StorageError, match="is damaged \\(its signature does not fit\\). The run has to be repeated"):
        signing.opened("stage build", written(tmp_path / "manifest.json"))


def test_the_key_of_another_machine_and_no_signature_are_foreign(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "manifest.json")
    monkeypatch.setenv(signing.KEY_VARIABLE, str(tmp_path / "other.key"))
    with pytest.raises(signing.ForeignError, match="was not signed by this installation.*`python -m compress adopt`"):
        signing.opened("manifest.json", path)
    path.write_text(json.dumps({"files": {}}))
    with pytest.raises(signing.ForeignError, match="was not signed by this installation"):
        signing.opened("manifest.json", path)


def test_a_damaged_key_is_told_and_left_alone(tmp_path: Path, key: Path) -> None:
    key.parent.mkdir()
    key.write_bytes(b"short")
    with pytest.raises(StorageError, match="signing.key is damaged: it has 5 bytes, not 32. Put back a copy"):
        signing.prepare()
    assert key.read_bytes() == b"short"


def test_two_that_make_a_key_at_once_use_the_same(tmp_path: Path, key: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(signing.sealed("x", {}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1
    assert [entry.name for entry in key.parent.iterdir()] == ["signing.key"]


def test_the_key_is_in_the_users_configuration_where_nothing_else_is_said() -> None:
    assert signing.key_path({"XDG_CONFIG_HOME": "/c"}) == Path("/c/espalier/signing.key")
    assert signing.key_path({}) == Path("~/.config/espalier/signing.key").expanduser()
    assert signing.key_path({signing.KEY_VARIABLE: "/data/signing.key"}) == Path("/data/signing.key")


def report(run: runs.Run) -> runs.StageResult:
    return runs.StageResult()


def finished(folder: Path) -> Path:
    run = runs.open_run(folder, Request(), lambda event: None)
    (folder / "artifacts").mkdir()
    for name in ("model.safetensors", "model.json", "pruned.engine"):
        (folder / "artifacts" / name).write_bytes(b"{}")
    run.stage(report)
    run.finish({})
    return folder


def test_a_manifest_written_by_somebody_who_has_not_the_key_does_not_count(tmp_path: Path, key: Path) -> None:
    folder = finished(tmp_path / "run")
    assert runs.verify(folder) == []
    (folder / "artifacts" / "pruned.engine").write_bytes(b"evil")
    facts = json.loads((folder / "manifest.json").read_text())
    facts["files"]["artifacts/pruned.engine"]["sha256"] = runs.sha256(folder / "artifacts" / "pruned.engine")
    (folder / "manifest.json").write_text(json.dumps(facts))
    for ask in (
        lambda: runs.manifest_sha256(folder / "artifacts" / "pruned.engine"),
        lambda: runs.add_to_manifest([folder / "request.json"], folder / "artifacts" / "pruned.engine"),
        lambda: runs.verify(folder),
    ):
        with pytest.raises(StorageError, match="manifest.json is damaged \\(its signature does not fit\\)"):
            ask()


def test_a_run_of_another_machine_is_told_and_can_be_adopted(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path / "run")
    monkeypatch.setenv(signing.KEY_VARIABLE, str(tmp_path / "other.key"))
    (problem,) = runs.verify(folder)
    assert "was not signed by this installation" in problem
    with pytest.raises(signing.ForeignError):
        runs.manifest_sha256(folder / "artifacts" / "pruned.engine")
    engine = folder / "artifacts" / "pruned.engine"
    engine.write_bytes(b"evil")
    with pytest.raises(StorageError, match="pruned.engine was changed after the run.*was not adopted"):
        runs.adopt(folder)
    engine.write_bytes(b"{}")
    runs.adopt(folder)
    assert runs.verify(folder) == [] and runs.manifest_sha256(engine)


def test_the_content_of_one_run_does_not_pass_for_another(tmp_path: Path, key: Path) -> None:
    """By somebody who can write into the folders of a queue, and has not the key."""
    mine, foreign, elsewhere = (finished(tmp_path / name) for name in ("a" * 32, "b" * 32, "named-by-hand"))
    assert runs.manifest(mine) and runs.verify(mine) == []
    for source in (foreign, elsewhere):
        for name in ("manifest.json", "stages/report.json"):
            (mine / name).write_bytes((source / name).read_bytes())
        with pytest.raises(
            StorageError, match="was written for another run, so the files around it are not of this one"
        ):
            runs.manifest(mine)
        assert runs._finished("report", mine, (runs.StageResult,)) is None, "the stage is done again"
        with pytest.raises(StorageError, match="for another run"):
            runs.manifest_sha256(mine / "artifacts" / "pruned.engine")
    shutil.rmtree(mine)
    mine.symlink_to(foreign)
    with pytest.raises(StorageError, match="for another run"):
        runs.manifest(mine)


def test_a_run_may_be_renamed_and_copied_out_of_a_queue_and_old_ones_name_no_run(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "first").rename(tmp_path / "renamed")
    finished(tmp_path / ("c" * 32)).rename(tmp_path / "kept")
    assert runs.verify(tmp_path / "renamed") == runs.verify(tmp_path / "kept") == []
    (tmp_path / "kept").rename(tmp_path / ("d" * 32))
    with pytest.raises(StorageError, match="for another run"):
        runs.verify(tmp_path / ("d" * 32))
    runs.adopt(tmp_path / ("d" * 32))
    assert runs.verify(tmp_path / ("d" * 32)) == []
    monkeypatch.setattr(signing, "RUN", "unnamed")  # as versions before this one wrote it
    old = finished(tmp_path / ("e" * 32))
    monkeypatch.undo()
    monkeypatch.setenv(signing.KEY_VARIABLE, str(key))
    document = json.loads((old / "manifest.json").read_text())
    assert "run" not in document and runs.manifest(old)


def test_a_stage_record_that_was_tampered_with_is_done_again(tmp_path: Path, key: Path) -> None:
    calls: list[str] = []

    def baseline(run: runs.Run) -> runs.StageResult:
        calls.append("baseline")
        return runs.StageResult(seconds=0.5, skipped="a value to change")

    def attempt(resume: bool) -> None:
        runs.open_run(tmp_path / "run", Request(), lambda event: None, resume=resume).stage(baseline)

    attempt(False)
    record = tmp_path / "run" / "stages" / "baseline.json"
    for text in (record.read_text().replace("a value", "another"), "{", "[]", json.dumps({"facts": {}, "sha256": {}})):
        record.write_text(text)
        attempt(True)
    assert calls == ["baseline"] * 5


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_changed_model_is_not_loaded(tmp_path: Path, key: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(tmp_path / "run")
    (folder / "artifacts" / name).write_bytes(b"{ ")
    with pytest.raises(StorageError, match=f"{name} was changed after the run.*: restore it"):
        compress.load(folder)
    monkeypatch.setenv(signing.KEY_VARIABLE, str(tmp_path / "other.key"))
    with pytest.raises(StorageError, match=f"{name} was changed after the run"):
        compress.load(folder)


def test_the_key_never_lies_in_a_run(tmp_path: Path, key: Path) -> None:
    folder = finished(tmp_path / "run")
    secret = key.read_bytes()
    for path in folder.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes() and secret.hex() not in path.read_text(errors="replace")
    assert os.path.commonpath([key.resolve(), folder.resolve()]) != str(folder.resolve())
