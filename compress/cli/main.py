"""The command line: `python -m compress run --model resnet18 --data fashion-mnist`.

The options of `run` and `check` are the fields of `Request`, with the fields' docstrings as help.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from compress.cli import text
from compress.cli.jobs import FAILED, ClusterAddress, ClusterCpus, ClusterGpus, engine_cli, jobs_cli
from compress.cli.options import Json, RequestFile, request_from, with_request_options
from compress.cli.search import register as register_search
from compress.errors import CompressError, RequestError

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make an image classifier smaller and faster, and prove what that cost.",
)
cli.add_typer(jobs_cli, name="jobs")
cli.add_typer(engine_cli, name="engine")

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
CANCELLED, MISUSED, INTERNAL = 143, 2, 70
"""Exit statuses: cancelled by a signal, wrong usage (as Click), a bug (EX_SOFTWARE)."""


class Cancelled(BaseException):
    """SIGTERM; not an `Exception`, so that no error handler swallows it."""


def run(
    values: dict[str, Any],
    request: RequestFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; new or empty.", show_default="runs/<time>-<model>"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out at its first unfinished stage.")
    ] = False,
    forecast: Annotated[
        Path | None,
        typer.Option(
            "--forecast", help="forecast.json of `forecast`, which the report compares with.", show_default=False
        ),
    ] = None,
    cluster: ClusterAddress = None,
    cluster_cpus: ClusterCpus = 1,
    cluster_gpus: ClusterGpus = 0.0,
    as_json: Json = False,
) -> None:
    """Compress a model: prune, shrink, fine-tune, quantize, export, build engines, measure, report."""
    settings = request_from(values, request)
    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.model}"
    if cluster is None:
        from compress import pipeline

        report = pipeline.run(settings, out=folder, resume=resume, forecast=forecast, notify=_show_progress)
    else:
        from compress.jobs.ray import Cluster, run_on
        from compress.report import Report

        if forecast:
            raise RequestError("forecast", str(forecast), "nothing together with --cluster")
        where = Cluster(cluster, cluster_cpus, cluster_gpus)
        run_on(where, settings, out=folder, resume=resume, notify=_show_progress)
        report = Report.from_file(folder / "report.json")
    if as_json:
        typer.echo(report.to_json(), nl=False)
        return
    from compress.report.tables import tables

    typer.echo(f"\n{report.verdict.text}\n")
    typer.echo(text.table(*tables(report)["summary"]))
    if report.forecast:
        typer.echo(f"\n{report.forecast.text}")
    typer.echo(
        f"\nReport     {folder / 'report.html'}\nFiles      {folder / 'artifacts'}"
        f"\nVerify     python -m compress verify {folder}"
    )


def check(values: dict[str, Any], request: RequestFile = None, as_json: Json = False) -> None:
    """Check a request without running it: what would be pruned, quantized and built, and what prevents it."""
    from compress import pipeline

    result = pipeline.check(request_from(values, request))
    typer.echo(json.dumps(result, indent=1) if as_json else text.check(result))
    if not result["possible"]:
        raise typer.Exit(FAILED)


cli.command()(with_request_options(run))
cli.command()(with_request_options(check))


@cli.command()
def models(as_json: Json = False) -> None:
    """List the available torchvision classifiers."""
    from compress.models import architectures

    rows = [
        {
            "name": name,
            "parameters": architectures.published(name).parameters,
            "input_size": architectures.published(name).preprocessing.input_size,
        }
        for name in architectures.names()
    ]
    _print(rows, as_json)


@cli.command()
def pruners(as_json: Json = False) -> None:
    """List the pruning methods."""
    from compress.methods.pruners import PRUNERS, SEARCHES

    rows = [
        {"name": p.name, "what": p.summary, "needs": p.needs_data, "cost": p.cost, "paper": p.paper}
        for p in PRUNERS.values()
    ]
    rows += [
        {"name": s.name, "what": s.summary, "needs": s.command, "cost": "a search", "paper": s.paper}
        for s in SEARCHES.values()
    ]
    _print(rows, as_json)


@cli.command()
def quantizers(as_json: Json = False) -> None:
    """List the quantization methods."""
    from compress.methods.quantizers import QUANTIZERS

    _print(
        [
            {
                "name": q.name,
                "what": q.summary,
                "trains": "yes" if q.trains else "no",
                "weight bits": _numbers(q.weight_bits),
                "activation bits": _numbers(q.activation_bits),
                "integers on": ", ".join(q.integer_runtimes),
                "note": q.note,
                "paper": q.paper,
            }
            for q in QUANTIZERS.values()
        ],
        as_json,
    )


def _numbers(bits: tuple[int, ...]) -> str:
    return f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else str(bits[0])


@cli.command()
def runtimes(as_json: Json = False) -> None:
    """List the runtimes, and what is missing on this machine."""
    from compress.engines import RUNTIMES

    _print(
        [
            {"name": r.name, "state": r.missing() or ("runs here" if r.runs_here else "builds here, cannot run here")}
            for r in RUNTIMES.values()
        ],
        as_json,
    )


@cli.command()
def verify(folder: RunFolder, as_json: Json = False) -> None:
    """Verify every file hash and every recorded comparison of a finished run."""
    from compress import pipeline

    problems = pipeline.verify(folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "verified": not problems, "problems": problems}))
    else:
        typer.echo("\n".join(problems) or f"{folder} verifies: every file hash and every comparison.")
    if problems:
        raise typer.Exit(FAILED)


@cli.command()
def classify(
    folder: RunFolder,
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG, WebP or BMP file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Classify an image with the original and the compressed model of a finished run."""
    from compress import classify as classifier

    result = classifier.classify(folder, image)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for title, model in zip(("original", "compressed"), result["models"], strict=True):
        shares = ", ".join(f"{row['class']} {100 * row['share']:.1f} %" for row in model["top"][:3])
        typer.echo(f"{title:<11} {shares}; {model['ms']:.2f} ms ({model['file']}, {model['runtime']})")


@cli.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A torchvision classifier.", show_default=False)],
    classes: Annotated[int, typer.Option(min=1, max=100_000, help="Number of classes.")] = 1000,
    input_size: Annotated[
        int | None,
        typer.Option(min=16, max=1024, help="Input size in pixels.", show_default="of the published weights"),
    ] = None,
    channel_multiple: Annotated[int, typer.Option(min=1, max=64, help="As for `run`.")] = 8,
    as_json: Json = False,
) -> None:
    """Count the parameters and MACs that remain after pruning at each sparsity, from the plan without any weights."""
    from compress.pruning import profiles

    profile = profiles.profile(model, classes, input_size, channel_multiple)
    if as_json:
        typer.echo(json.dumps(profile))
        return
    rows = [(f"{p} %", row) for p, row in profile["rows"].items() if int(p) % 5 == 0]
    counts = [(share, f"{row['parameters']:,}", f"{row['macs']:,}") for share, row in rows]
    original = ("0 %", f"{profile['parameters']:,}", f"{profile['macs']:,}")
    typer.echo(text.table(("Sparsity", "Parameters", "MACs"), [original, *counts]))


@cli.command()
def publish(
    folder: RunFolder,
    repository: Annotated[str, typer.Argument(help="owner/name; created if it does not exist.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request instead of committing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a finished run on the Hugging Face Hub, private unless --public; needs HF_TOKEN in the environment."""
    from compress import hub

    done = hub.publish(folder, repository, private=not public, pull_request=pull_request)
    visibility = "private" if done.private else "public"
    message = f"{done.files} files are in {done.repository} ({visibility}).\n{done.url}"
    typer.echo(json.dumps(dataclasses.asdict(done), indent=1) if as_json else message)


@cli.command()
def adopt(folder: RunFolder, as_json: Json = False) -> None:
    """Sign the manifest of a run from another machine. Do this only if you trust its source."""
    from compress import runs

    runs.adopt(folder)
    message = f"{folder} is adopted: its hashes match, and its manifest is signed by this installation."
    typer.echo(json.dumps({"folder": str(folder), "adopted": True}) if as_json else message)


register_search(cli)


def _show_progress(event: dict[str, Any]) -> None:
    if "stage" not in event:
        return
    left = f", {event['seconds_left']:.0f} s left" if event.get("seconds_left") else ""
    line = f"[{event['index']}/{event['of']}] {event['stage']:<9} {event['message']}{left}"
    ends = event["fraction"] in (0.0, 1.0) or not sys.stderr.isatty()
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="\n" if ends else "", file=sys.stderr, flush=True)
    elif event["fraction"] in (0.0, 1.0):
        print(line, file=sys.stderr, flush=True)


def _stop(signal_number: int, frame: object) -> NoReturn:
    raise Cancelled


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    typer.echo(json.dumps(rows, indent=1) if as_json else text.listing(rows))


def main() -> None:
    """Runs the command line. An error is one sentence on standard error and a non-zero exit status.

    With --json, standard output gets {"error": {"type", "message", fields...}} as well; see `CompressError.as_dict`.
    """
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("compress").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        sys.exit(cli(prog_name="python -m compress", standalone_mode=False))
    except TyperException as error:  # an unknown command or option, or a value of the wrong type
        if hasattr(error, "show"):
            error.show()  # with the usage of the command
        _end({"type": "UsageError", "message": error.format_message()}, None, error.exit_code)
    except CompressError as error:
        _end(error.as_dict(), f"Error: {error}", MISUSED if isinstance(error, RequestError) else FAILED)
    except (Cancelled, KeyboardInterrupt, typer.Abort):
        _end({"type": "Cancelled", "message": "Cancelled."}, "Cancelled.", CANCELLED)
    except Exception as error:  # noqa: BLE001 - the last resort: say what happened and keep the details for a bug report
        traceback.print_exc()
        message = (
            f"Espalier failed because of a bug (an unexpected {type(error).__name__}). Add the output before this line to a "
            "bug report."
        )
        _end({"type": "InternalError", "message": message}, f"Error: {message}", INTERNAL)


def _end(error: dict[str, Any], line: str | None, code: int) -> NoReturn:
    """Prints the error as JSON if --json was given, and `line` to standard error, and exits."""
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": error}))
    if line is not None:
        print(line, file=sys.stderr)
    sys.exit(code)
