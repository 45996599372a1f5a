"""The options of `run`, `check` and the search commands: one for each field of `Request`, and --request for a whole file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.errors import RequestError
from compress.request import Request

REPEATABLE = ("exclude", "layer_sparsity", "layer_bits", "engine_targets")
"""Options that may be repeated."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.")]
RequestFile = Annotated[
    Path | None,
    typer.Option(
        "--request", help="Read all settings from a JSON file, such as request.json of a run.", show_default=False
    ),
]


def with_request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the parameter `values` of a command by one option for each field of `Request`."""
    signature = inspect.signature(command, eval_str=True)
    options = []
    for name, field in Request.model_fields.items():
        kind: Any = bool if isinstance(field.default, bool) else list[str] if name in REPEATABLE else str
        flag = "--" + name.replace("_", "-")
        declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        default = False if field.default in (None, (), {}) else str(field.default)
        option = typer.Option(declared, help=field.description, show_default=default)
        annotation = Annotated[kind | None, option]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "values"]

    def wrapper(**arguments: Any) -> Any:
        values = {name: arguments.pop(name) for name in Request.model_fields}
        return command(values=values, **arguments)

    wrapper.__signature__ = signature.replace(parameters=[*options, *own])  # type: ignore[attr-defined]  # typer reads it
    wrapper.__annotations__ = {p.name: p.annotation for p in (*options, *own)}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def request_from(values: dict[str, Any], file: Path | None) -> Request:
    """The request of the options, or of the file of --request. Raises `RequestError`, also when both are used."""
    settings = {name: value for name, value in values.items() if value is not None and value != []}
    for name in ("mean", "std"):
        if name in settings:
            settings[name] = settings[name].replace(",", " ").split()
    for name in ("config_list", "quantization_config_list"):
        if not settings.get(name, "[").lstrip().startswith("["):
            settings[name] = _config_list(name, Path(settings[name]))
    if file is None:
        return Request(**settings)
    if settings:
        name, value = next(iter(settings.items()))
        raise RequestError(name, value, "nothing beside --request: the file holds the whole request")
    return Request.from_file(file)


def _config_list(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(name, str(path), f"a readable JSON file, or JSON itself ({error})") from None
