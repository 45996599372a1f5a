"""With --json, every command reports an error as JSON with its fields; what a person reads stays on standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from compress.cli import main as shell
from compress.errors import CheckpointError, CompressError, EngineError, RequestError

RUN_ID = "0" * 32


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    with pytest.raises(SystemExit) as ended:
        shell.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize(
    ("words", "code", "kind", "fields"),
    [
        (
            ("run", "--sparsity", "0"),
            2,
            "RequestError",
            {"field": "sparsity", "got": "0", "allowed": "a fraction strictly between 0 and 1"},
        ),
        (("check", "--request", "absent.json"), 2, "RequestError", {"field": "request", "got": "absent.json"}),
        (("verify", "absent"), 1, "RunError", {}),
        (("adopt", "absent"), 1, "RunError", {}),
        (("classify", "absent", "image.png"), 1, "RunError", {}),
        (("publish", "absent", "owner/name"), 1, None, {}),
        (("estimate", "resnet19"), 2, "RequestError", {"field": "model", "got": "resnet19"}),
        (("jobs", "show", RUN_ID), 1, "RunError", {}),
        (("jobs", "cancel", RUN_ID), 1, "RunError", {}),
        (("jobs", "resume", RUN_ID), 1, "RunError", {}),
        (("jobs", "keep", RUN_ID), 1, "RunError", {}),
        (("jobs", "recover"), 1, "StorageError", {}),
        (("sensitivity", "--out", "s", "--ratios", "x"), 2, "RequestError", {"field": "ratios", "got": "x"}),
        (("run", "--no-such-option"), 2, "UsageError", {}),
        (("estimate", "resnet18", "--classes", "many"), 2, "UsageError", {}),
    ],
)
def test_an_error_is_json_with_its_fields(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    code: int,
    kind: str | None,
    fields: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "data"))
    status, out, err = call(capsys, monkeypatch, *words, "--json")
    error = json.loads(out)["error"]
    assert (status, set(json.loads(out))) == (code, {"error"})
    assert kind in (None, error["type"]) and fields.items() <= error.items()
    assert error["message"] and error["message"].splitlines()[0] in err


def test_without_json_nothing_is_on_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, monkeypatch, "run", "--sparsity", "0")[1] == ""


def test_a_bug_is_json_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.cli.jobs._queue", lambda: 1 / 0)
    status, out, err = call(capsys, monkeypatch, "jobs", "list", "--json")
    assert (status, json.loads(out)["error"]["type"]) == (70, "InternalError") and "ZeroDivisionError" in err


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words."""
    found = {}
    for name, command in group.commands.items():
        found |= commands(command, (*path, name)) if hasattr(command, "commands") else {(*path, name): command}
    return found


def test_every_command_has_json() -> None:
    known = commands(typer.main.get_command(shell.cli))
    assert len(known) >= 20
    lacking = [
        " ".join(path)
        for path, command in known.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert lacking == []


def test_the_fields_of_errors_are_json_values() -> None:
    layer = CompressError("no")
    layer.layer = "layer1.0.conv1"
    assert layer.as_dict() == {"type": "CompressError", "message": "no", "layer": "layer1.0.conv1"}
    assert CheckpointError("bad").as_dict() == {"type": "CheckpointError", "message": "bad"}
    refused = RequestError("std", (float("nan"), 0.5), "numbers").as_dict()
    assert (refused["field"], refused["got"], refused["allowed"]) == ("std", "(nan, 0.5)", "numbers")
    assert RequestError("sparsity", 1.5, "x").as_dict()["got"] == 1.5
    assert len(RequestError("model", "x" * 5000, "y").as_dict()["got"]) == 300
    assert EngineError("openvino", "It failed.", detail="secret").as_dict()["runtime"] == "openvino"
    assert "secret" not in json.dumps(EngineError("openvino", "It failed.", detail="secret").as_dict())
