"""The command groups `jobs` (runs in the web app's queue) and `engine` (TensorRT engines of finished runs)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import text
from compress.cli.options import Json
from compress.methods.runtimes import RUNTIMES

_AHEAD_OF_TIME = " or ".join(runtime.name for runtime in RUNTIMES.values() if runtime.ahead_of_time)
JobId = Annotated[str, typer.Argument(help="Id of a run, as `jobs list` prints it.", show_default=False)]
ClusterAddress = Annotated[
    str | None,
    typer.Option("--cluster", help="HOST:PORT of a Ray cluster that executes the run; see docs/cluster.md."),
]
ClusterCpus = Annotated[int, typer.Option(help="CPUs reserved for the run on a node of the cluster.")]
ClusterGpus = Annotated[float, typer.Option(help="GPUs reserved for the run: a fraction of one, or a whole number.")]
FAILED = 1
"""Exit status of an error, and of a command whose answer is no."""

jobs_cli = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Runs that were submitted to the web app's queue."
)
engine_cli = typer.Typer(no_args_is_help=True, add_completion=False, help="TensorRT engines of finished runs.")


@engine_cli.command("check")
def engine_check(
    file: Annotated[Path, typer.Argument(help="An engine, with its passport beside it.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check whether an engine can run on this machine, without loading it."""
    from compress.engines import rebuild

    problems = rebuild.check(file)
    if as_json:
        typer.echo(json.dumps({"engine": str(file), "can_run": not problems, "problems": problems}))
    else:
        typer.echo("\n".join([f"{file} cannot run here.", *problems] if problems else [f"{file} can run here."]))
    if problems:
        raise typer.Exit(FAILED)


@engine_cli.command("build")
def engine_build(
    file: Annotated[Path, typer.Argument(help="An ONNX file of a finished run.", show_default=False)],
    runtime: Annotated[str, typer.Option(help=f"{_AHEAD_OF_TIME}.")] = "tensorrt",
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Batch size to optimize for.")] = 8,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Maximum batch size.")] = 32,
    target: Annotated[
        list[str] | None, typer.Option(help="GPU architecture such as SM89; may be repeated. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an engine for this machine beside the ONNX file, and compare their outputs if it can run here."""
    from compress.engines import rebuild as engine_rebuild

    built = engine_rebuild.build(file, runtime, batch_size=batch_size, max_batch=max_batch, targets=tuple(target or ()))
    typer.echo(json.dumps(built.passport, indent=1) if as_json else f"{built.path}\n{built.text}")


@jobs_cli.command("list")
def jobs_list(as_json: Json = False) -> None:
    """List the latest runs, newest first."""
    rows = [status.as_dict() for status in _queue().list()]
    shown = ("job_id", "state", "title", "stage")
    if as_json or not rows:
        typer.echo(json.dumps(rows, indent=1) if as_json else "No runs yet.")
    else:
        typer.echo(text.table(shown, [tuple(str(row[key] or "") for key in shown) for row in rows]))


@jobs_cli.command("show")
def jobs_show(job_id: JobId, as_json: Json = False) -> None:
    """Show the status of a run."""
    _show_job(_queue().status(job_id).as_dict(), as_json)


@jobs_cli.command("cancel")
def jobs_cancel(job_id: JobId, as_json: Json = False) -> None:
    """Cancel a run; when this returns, none of its processes is alive."""
    _show_job(_queue().cancel(job_id).as_dict(), as_json)


@jobs_cli.command("resume")
def jobs_resume(job_id: JobId, as_json: Json = False) -> None:
    """Queue a failed or cancelled run again; finished stages are not repeated."""
    _show_job(_queue().resume(job_id).as_dict(), as_json)


@jobs_cli.command("keep")
def jobs_keep(
    job_id: JobId,
    release: Annotated[bool, typer.Option("--release", help="Let it expire again.")] = False,
    as_json: Json = False,
) -> None:
    """Exempt a run from retention, for example because you shared its link."""
    _queue().keep(job_id, not release)
    message = "This run may expire again." if release else "This run is kept."
    typer.echo(json.dumps({"job_id": job_id, "kept": not release}) if as_json else message)


@jobs_cli.command("recover")
def jobs_recover(as_json: Json = False) -> None:
    """Rebuild a damaged or missing run database from the folders of the runs."""
    from compress.jobs.recovery import recover

    count, aside = recover(_data_dir().resolve())
    kept = f" The damaged one is kept as {aside}." if aside else ""
    result = {"runs": count, "damaged": aside and str(aside)}
    typer.echo(json.dumps(result) if as_json else f"The rebuilt database lists {count} runs.{kept}")


def _queue() -> Any:
    from compress.jobs import Queue

    return Queue(_data_dir())


def _data_dir() -> Path:
    from compress.jobs import DATA_DIR

    return Path(os.environ.get("ESPALIER_DATA") or DATA_DIR).expanduser()


def _show_job(status: dict[str, Any], as_json: bool) -> None:
    typer.echo(
        json.dumps(status, indent=1) if as_json else "\n".join(f"{key:<13} {value}" for key, value in status.items())
    )
