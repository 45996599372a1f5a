"""The parts of the torture table that continuous integration carries out, and proof that its rows can fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from places import PYTHONPATH
from torture import failing_writes, kills
from torture.cancels import CANCEL
from torture.full_disk import DISK
from torture.kills import KILLS, Point
from torture.rows import Row
from torture.runs_in_a_row import RUNS

from compress import processes
from compress.jobs import Queue, folders

pytestmark = pytest.mark.integration

MANIFEST_FIRST = """
import sys
sys.path[:0] = {paths!r}
import staged_run
from compress.runs import MANIFEST, Run
from compress.runs.manifest import write_manifest
real = Run._execute
def execute(run, name, result_types, work):
    if not (run.folder / MANIFEST).exists():
        write_manifest(run.folder, {{}})
    return real(run, name, result_types, work)
Run._execute = execute
staged_run.main()
"""


@pytest.mark.parametrize("row", [KILLS, DISK, CANCEL, RUNS], ids=lambda row: row.name)
def test_a_row_holds(row: Row, tmp_path: Path) -> None:
    assert row.run(tmp_path, False).failures == ()


def test_a_manifest_that_is_written_first_is_caught(tmp_path: Path) -> None:
    """Killed in the middle of a stage, such a run counts as done."""
    (tmp_path / "points").mkdir()
    code = MANIFEST_FIRST.format(paths=PYTHONPATH.split(os.pathsep))

    def command(folder: Path, resume: bool) -> list[str]:
        words = [sys.executable, "-P", "-c", code, str(folder), str(folder / "request.json")]
        return [*words, "--resume"] if resume else words

    with Queue(tmp_path, command=command) as queue:
        wrong = kills.try_out(queue, None, Point("run", "prune", "middle")).wrong
    assert "not reported as interrupted, but done: None" in wrong, wrong


def test_zombies_and_handles_that_are_left_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[int] = []
    monkeypatch.setattr(processes, "reap", lambda group: leaked.append(os.open(os.devnull, os.O_RDONLY)))
    monkeypatch.setattr(kills, "PATIENCE_S", 3.0)
    monkeypatch.setattr("torture.runs_in_a_row.PART", 12)
    failures = RUNS.run(tmp_path, False).failures
    for handle in leaked:
        os.close(handle)
    assert any("zombies" in line for line in failures) and any("handles" in line for line in failures), failures


def test_a_fault_is_put_into_the_call_that_is_meant(tmp_path: Path) -> None:
    def work() -> bool:
        (tmp_path / "a").write_text("a")  # 1: made, 2: written
        (tmp_path.parent / "elsewhere").write_text("b")
        try:
            (tmp_path / "c").write_text("c")  # 3, 4, and 5 when Python tries once more while closing
        except OSError as error:
            return error.errno == 28
        return False

    ended = failing_writes.carry_out(work, tmp_path, failing_writes.Fault(4, 28, lasting=False))
    assert ended == failing_writes.Ended(0, 5) and (tmp_path / "a").read_text() == "a"
    ended = failing_writes.carry_out(work, tmp_path, failing_writes.Fault(4, 28, lasting=True))
    assert ended == failing_writes.Ended(0, 5) and (tmp_path / "c").read_text() == ""
    assert failing_writes.carry_out(work, tmp_path, failing_writes.Fault(0, 28, lasting=True)).status == 1


def test_a_folder_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "request.json").touch()
    (tmp_path / "uploads").mkdir()
    assert not folders.has_begun(tmp_path)
    (tmp_path / "stages").mkdir()
    assert folders.has_begun(tmp_path)
