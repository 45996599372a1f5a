"""A request as text to be copied: the shell command, the Python code and the `gradio_client` code that ask the same.

Fields at their default are left out, but for the model and the data, which say what it is about.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

from compress.request import Request

ALWAYS = ("model", "data")
FILES = ("checkpoint", "data", "class_map")
"""Fields that may name a file or folder."""


def shell_command(request: Mapping[str, Any]) -> str:
    """The `python -m compress run` line of a request in its JSON form."""
    words = ["python", "-m", "compress", "run"]
    for name, value in changed(request).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        elif isinstance(value, dict):
            for key, item in value.items():
                words += [option, f"{key}={item}"]
        elif name.endswith("config_list"):
            words += [option, json.dumps(value)]
        elif isinstance(value, list) and isinstance(value[0], str):
            for item in value:
                words += [option, item]
        elif isinstance(value, list):
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, str(value)]
    return shlex.join(words)


def without_folders(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its files by name alone, for those who see what came of it.

    Where they lie is nobody else's affair: the folder of an upload is named by the run's id, and whoever has that may look at
    the run and download its files.
    """
    named = {
        name: PurePath(value).name or name
        for name in FILES
        if isinstance(value := request.get(name), str) and "/" in value and not value.startswith("hf://")
    }
    return {**request, **named}


def python_code(request: Mapping[str, Any]) -> str:
    """A script that carries the request out with the package."""
    return (
        "import compress\n\n"
        f"request = compress.Request(\n{_arguments(changed(request))})\n"
        'report = compress.run(request, out="runs/again")\n'
        "print(report.verdict.text)\n"
    )


def client_code(request: Mapping[str, Any], address: str, uploads: Collection[str]) -> str:
    """A script that submits the request to a server of the web app, waits, and lists the files.

    Args:
        address: of the server.
        uploads: fields whose value is the name of a file to be sent along.
    """
    values = {
        f"{name}_file" if name in uploads else name: _Code(f"handle_file({value!r})") if name in uploads else value
        for name, value in changed(request).items()
    }
    imported = "Client, handle_file" if uploads else "Client"
    return (
        "import time\n\n"
        f"from gradio_client import {imported}\n\n"
        f"client = Client({address!r}, verbose=False)\n"
        f'job = client.predict(\n{_arguments(values)}    api_name="/submit",\n)\n'
        'while (status := client.predict(job["job_id"], api_name="/status"))["state"] in ("queued", "running"):\n'
        "    time.sleep(2)\n"
        'print(status["state"], status["error"] or "")\n'
        'for file in status["files"]:\n'
        '    print(file["name"], file["url"], file["sha256"])\n'
    )


def changed(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request in its JSON form that differ from their defaults, and those of `ALWAYS`."""
    defaults = Request().model_dump(mode="json")
    return {name: request[name] for name in Request.model_fields if name in ALWAYS or request[name] != defaults[name]}


class _Code(str):
    """Text that is written into a program as it stands."""

    def __repr__(self) -> str:
        return str(self)


def _arguments(values: Mapping[str, Any]) -> str:
    return "".join(f"    {name}={value!r},\n" for name, value in values.items())
