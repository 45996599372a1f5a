"""Espalier from a shell: `python -m compress run --model resnet18 --data fashion-mnist`.

The options of `run` and `check` are the fields of `Request`; their help is the fields' own description.
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
CANCELLED, MISUSED = 143, 2


class Cancelled(BaseException):
    """SIGTERM or Ctrl-C; not an error, so nothing that handles errors may swallow it."""


def run(
    values: dict[str, Any],
    request: RequestFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; new or empty.", show_default="runs/<time>-<model>"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out at its first unfinished stage.")
    ] = False,
    forecast: Annotated[
        Path | None,
        typer.Option(
            "--forecast", help="forecast.json of `forecast`; the report says what came true.", show_default=False
        ),
    ] = None,
    cluster: ClusterAddress = None,
    cluster_cpus: ClusterCpus = 1,
    cluster_gpus: ClusterGpus = 0.0,
    as_json: Json = False,
) -> None:
    """Compress a model: prune, shrink, fine-tune, quantize, export, build engines, measure, report."""
    asked = request_from(values, request)
    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{asked.model}"
    if cluster is None:
        from compress import pipeline

        report = pipeline.run(asked, out=folder, resume=resume, forecast=forecast, notify=_show_progress)
    else:
        from compress.jobs.ray import Cluster, run_on
        from compress.report import Report

        if forecast:
            raise RequestError("forecast", str(forecast), "nothing together with --cluster")
        where = Cluster(cluster, cluster_cpus, cluster_gpus)
        run_on(where, asked, out=folder, resume=resume, notify=_show_progress)
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
    """Before anything is spent: what would be pruned, quantized and built, and what stands in the way."""
    from compress import pipeline

    found = pipeline.check(request_from(values, request))
    typer.echo(json.dumps(found, indent=1) if as_json else text.check(found))
    if not found["possible"]:
        raise typer.Exit(FAILED)


cli.command()(with_request_options(run))
cli.command()(with_request_options(check))


@cli.command()
def models(as_json: Json = False) -> None:
    """The torchvision classifiers on offer."""
    from compress.models import catalog

    rows = [
        {
            "name": name,
            "parameters": catalog.published(name).parameters,
            "input_size": catalog.published(name).preprocessing.input_size,
        }
        for name in catalog.names()
    ]
    _print(rows, as_json)


@cli.command()
def pruners(as_json: Json = False) -> None:
    """How the channels to remove can be chosen."""
    from compress.pruning import PRUNERS, SEARCHES

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
    """How floating point becomes integers."""
    from compress.quantizers import QUANTIZERS

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
    """What can execute a file here, and what is missing for the rest."""
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
    """Check every hash and hand-off of a finished run again."""
    from compress import pipeline

    problems = pipeline.verify(folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "verified": not problems, "problems": problems}))
    else:
        typer.echo("\n".join(problems) or f"{folder} verifies: every file and every hand-off.")
    if problems:
        raise typer.Exit(FAILED)


@cli.command()
def classify(
    folder: RunFolder,
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG, WebP or BMP file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """One image through the original and the compressed model of a finished run."""
    from compress import classify as tryout

    found = tryout.classify(folder, image)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for title, model in zip(("original", "compressed"), found["models"], strict=True):
        shares = ", ".join(f"{row['class']} {100 * row['share']:.1f} %" for row in model["top"][:3])
        typer.echo(f"{title:<11} {shares}; {model['ms']:.2f} ms ({model['file']}, {model['runtime']})")


@cli.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A torchvision classifier.", show_default=False)],
    classes: Annotated[int, typer.Option(min=1, max=100_000, help="Outputs.")] = 1000,
    input_size: Annotated[
        int | None, typer.Option(min=16, max=1024, help="Pixels.", show_default="the published recipe's")
    ] = None,
    channel_multiple: Annotated[int, typer.Option(min=1, max=64, help="As in `run`.")] = 8,
    as_json: Json = False,
) -> None:
    """Parameters and MACs that pruning would leave at each sparsity, counted from the plan without any weights."""
    from compress.pruning import profiles

    found = profiles.profile(model, classes, input_size, channel_multiple)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [(f"{p} %", row) for p, row in found["rows"].items() if int(p) % 5 == 0]
    counts = [(share, f"{row['parameters']:,}", f"{row['macs']:,}") for share, row in rows]
    whole = ("0 %", f"{found['parameters']:,}", f"{found['macs']:,}")
    typer.echo(text.table(("Sparsity", "Parameters", "MACs"), [whole, *counts]))


@cli.command()
def publish(
    folder: RunFolder,
    repository: Annotated[str, typer.Argument(help="owner/name; made when there is none.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see a repository that is made here.")] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Propose the files, and change nothing in the repository.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put a finished run on the Hugging Face Hub, private unless --public; needs HF_TOKEN in the environment."""
    from compress import hub

    done = hub.publish(folder, repository, private=not public, pull_request=pull_request)
    seen = "private" if done.private else "public"
    told = f"{done.files} files are in {done.repository} ({seen}).\n{done.url}"
    typer.echo(json.dumps(dataclasses.asdict(done), indent=1) if as_json else told)


@cli.command()
def adopt(folder: RunFolder) -> None:
    """Sign the manifest of a run from another machine: only where you trust who gave it to you."""
    from compress import runs

    runs.adopt(folder)
    typer.echo(f"{folder} is adopted: its hashes hold, and its files count as made here.")


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
    """Runs the command line; every refusal is one sentence on standard error and a non-zero exit."""
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("compress").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        cli(prog_name="python -m compress")
    except RequestError as error:
        _end(f"Error: {error}", MISUSED)
    except CompressError as error:
        _end(f"Error: {error}", FAILED)
    except (Cancelled, KeyboardInterrupt):
        _end("Cancelled.", CANCELLED)
    except Exception as error:  # noqa: BLE001 - the last resort: say what happened and keep the details for a bug report
        traceback.print_exc()
        _end(
            f"Error: a mistake of Espalier ended this (an unexpected {type(error).__name__}). What was printed before this line "
            "belongs into a bug report.",
            70,
        )


def _end(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)
