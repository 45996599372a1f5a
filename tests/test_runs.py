"""A run's folder: stages once, resume, manifest last, damage found."""

import errno
import json

import pytest

from compress import files, runs
from compress.errors import RunError, StorageError
from compress.request import Request
from compress.runs import Skipped, StageResult


def open_run(folder, resume=False, request=None):
    return runs.open_run(folder, request or Request(), lambda event: None, resume=resume)


class Counted(StageResult):
    value: str


def write_stage(run, name, calls, text="x"):
    def work(run) -> Counted:
        calls.append(name)
        (run.folder / f"{name}.bin").write_text(text)
        return Counted(files=(f"{name}.bin",), value=name)

    work.__name__ = name
    return run.stage(work)


def test_a_finished_stage_is_not_done_again(tmp_path):
    calls = []
    run = open_run(tmp_path / "run")
    write_stage(run, "baseline", calls)
    again = open_run(tmp_path / "run", resume=True)
    assert write_stage(again, "baseline", calls).value == "baseline"
    assert calls == ["baseline"]


def test_a_damaged_stage_and_all_later_ones_are_done_again(tmp_path):
    calls = []
    run = open_run(tmp_path / "run")
    for name in ("baseline", "prune", "finetune"):
        write_stage(run, name, calls)
    (tmp_path / "run" / "prune.bin").write_text("flipped")
    again = open_run(tmp_path / "run", resume=True)
    for name in ("baseline", "prune", "finetune"):
        write_stage(again, name, calls)
    assert calls == ["baseline", "prune", "finetune", "prune", "finetune"]


def test_a_failed_stage_leaves_no_record(tmp_path):
    run = open_run(tmp_path / "run")

    def baseline(run) -> StageResult:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.stage(baseline)
    assert not (tmp_path / "run" / "stages" / "baseline.json").exists()


def test_stages_keep_their_order(tmp_path):
    run, calls = open_run(tmp_path / "run"), []
    write_stage(run, "prune", calls)
    with pytest.raises(ValueError, match="The stage baseline comes before prune, which is done already"):
        write_stage(run, "baseline", calls)
    assert calls == ["prune"]


def test_a_skipped_stage_is_read_as_such(tmp_path):
    def prune(run) -> Counted | Skipped:
        return Skipped(skipped="not pruned, as asked")

    open_run(tmp_path / "run").stage(prune)
    again = open_run(tmp_path / "run", resume=True).stage(prune)
    assert isinstance(again, Skipped) and again.skipped == "not pruned, as asked"


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"is not empty \(it holds thesis.txt\). Choose a new or empty folder"):
        open_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


def test_resume_refuses_another_request(tmp_path):
    open_run(tmp_path / "run")
    with pytest.raises(RunError, match="another request"):
        open_run(tmp_path / "run", resume=True, request=Request(sparsity=0.25))
    with pytest.raises(RunError, match="holds no run to resume"):
        open_run(tmp_path / "nothing", resume=True)


def finished_run(folder):
    run = open_run(folder)
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model.onnx").write_bytes(b"weights")
    run.finish({"artifacts/model.onnx": "baseline"})
    return run


def test_the_manifest_lists_every_file_with_hash_and_parent(tmp_path):
    finished_run(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())["files"]
    assert set(manifest) == {"request.json", "artifacts/model.onnx"}
    assert manifest["artifacts/model.onnx"] == {
        "sha256": files.sha256(tmp_path / "run" / "artifacts" / "model.onnx"),
        "bytes": 7,
        "parent": "baseline",
    }
    assert runs.verify(tmp_path / "run") == []


def test_one_flipped_byte_a_missing_and_a_foreign_file_are_found(tmp_path):
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "artifacts" / "model.onnx").write_bytes(b"weightz")
    (tmp_path / "run" / "artifacts" / "extra.bin").write_bytes(b"?")
    (tmp_path / "run" / "request.json").unlink()
    problems = "\n".join(runs.verify(tmp_path / "run"))
    assert "artifacts/model.onnx was changed after the run" in problems
    assert "artifacts/extra.bin is not listed" in problems
    assert "request.json is missing" in problems


def test_an_unfinished_run_does_not_verify(tmp_path):
    open_run(tmp_path / "run")
    with pytest.raises(RunError, match="holds no finished run"):
        runs.verify(tmp_path / "run")


def test_a_new_attempt_takes_the_manifest_away_first(tmp_path):
    finished_run(tmp_path / "run")
    open_run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    def fill_up():
        with files.atomic(tmp_path / "model.onnx") as partial:
            partial.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        StorageError, match=r"The disk is full: model.onnx could not be written.*Free some space and resume"
    ):
        fill_up()
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_which_nothing_was_achieved_leaves_no_folder(tmp_path):
    run = open_run(tmp_path / "run")
    run.end(RunError("no"))
    assert not (tmp_path / "run").exists()
    kept = tmp_path / "queued"
    kept.mkdir()
    open_run(kept).end(RunError("the reason"))
    assert '"error": "the reason"' in (kept / "events.jsonl").read_text()
