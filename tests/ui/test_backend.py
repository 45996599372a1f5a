"""What the server asks of `python -m compress` leaves no process, not even an ended one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import processes
from compress.errors import RunError
from compress.ui import backend

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def first_process() -> Iterator[None]:
    """This process inherits orphans, as the first one of a container does."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch, last_word: str) -> Path:
    """Puts a program in the place of Python that starts one of its own; returns where both of their ids will be."""
    ids, program = folder / "ids", folder / "program"
    program.write_text(
        f"#!/bin/sh\nsleep 600 < /dev/null > /dev/null 2>&1 &\necho $$ $! > {ids}\necho '[1]'\n{last_word}\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    return ids


def test_an_answer_leaves_no_process_and_no_zombie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_process: None
) -> None:
    ids = answers(tmp_path, monkeypatch, "")
    assert backend.call("check", limit_s=30) == [1]
    assert [processes.identify(int(word)) for word in ids.read_text().split()] == [None, None]


def test_a_question_that_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_process: None
) -> None:
    ids = answers(tmp_path, monkeypatch, "sleep 600")
    with pytest.raises(RunError, match="`compress check` took longer than 1 s and was stopped. Try again when no run"):
        backend.call("check", limit_s=1)
    assert [processes.identify(int(word)) for word in ids.read_text().split()] == [None, None]
