"""The commands that explore before a full run: `sensitivity`, `forecast` and `search`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import text
from compress.cli.jobs import FAILED
from compress.cli.options import Json, RequestFile, request_from, with_request_options
from compress.errors import RequestError

Out = Annotated[
    Path,
    typer.Option("--out", help="Folder for the results; the same folder continues the work.", show_default=False),
]


def register(cli: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (sensitivity, forecast, search):
        cli.command()(with_request_options(command))


def sensitivity(
    values: dict[str, Any],
    out: Out,
    request: RequestFile = None,
    ratios: Annotated[str, typer.Option(help="Fractions of channels to remove.")] = "0.25,0.5,0.75",
    bits: Annotated[str, typer.Option(help="Weight bits to try, such as 4,3. Default: none.")] = "",
    as_json: Json = False,
) -> None:
    """Measure the sensitivity of each group of layers: accuracy and latency over sparsities and bits, without training."""
    from compress.search import sensitivity as table

    result = table.measure(
        request_from(values, request),
        out,
        ratios=numbers("ratios", ratios, float),
        bits=numbers("bits", bits, int),
        notify=show,
    )
    if as_json:
        typer.echo(json.dumps(result))
        return
    rows = [
        (
            cell["layers"][0],
            cell["kind"],
            f"{cell['value']:g}",
            decimal(cell["points_lost"]),
            decimal(cell["percent_faster"]),
        )
        for cell in result["cells"]
    ]
    typer.echo(text.table(("Group", "What", "Value", "Points lost", "Time saved, %"), rows))
    typer.echo(f"\nHeat map  {out / table.PAGE}\nNumbers   {out / table.FILE}")


def forecast(
    values: dict[str, Any],
    out: Out,
    request: RequestFile = None,
    ratios: Annotated[str, typer.Option(help="Fractions of each layer's channels.")] = "0.25,0.375,0.5,0.625,0.75",
    as_json: Json = False,
) -> None:
    """Predict accuracy, measured speedup and size over sparsity, with uncertainty, before any training."""
    from compress.report.forecast import FILE
    from compress.search import front

    result = front.measure(request_from(values, request), out, ratios=numbers("ratios", ratios, float), notify=show)
    if as_json:
        typer.echo(result.model_dump_json())
        return
    rows = [
        (
            f"{100 * p.sparsity:g} %",
            f"{p.points_lost:.1f} ({p.points_lost_low:.1f} to {p.points_lost_high:.1f})",
            f"{p.speedup:.1f}x ({p.speedup_low:.1f} to {p.speedup_high:.1f})",
            f"{p.file_bytes / 1e6:.2f} MB",
        )
        for p in result.points
    ]
    typer.echo(text.table(("Sparsity", "Points lost, untrained", f"Faster, {result.runtime}", "File"), rows))
    typer.echo(
        f"\nChart     {out / front.PAGE}\nNumbers   {out / FILE}\n"
        f"Compare   python -m compress run --forecast {out / FILE} ..."
    )


STRATEGIES_HELP = "Search strategy: tpe, uniform, random, simulated-annealing, auto-compress or amc."


def search(
    values: dict[str, Any],
    out: Out,
    request: RequestFile = None,
    max_accuracy_drop: Annotated[float, typer.Option(help="Accuracy points that the trained model may lose.")] = 1.0,
    min_speedup: Annotated[float | None, typer.Option(help="Minimum speedup over the original's fastest fp32.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Maximum latency of one image on the runtime.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Maximum size of the deployed file.")] = None,
    strategy: Annotated[str, typer.Option(help=STRATEGIES_HELP)] = "tpe",
    trials: Annotated[int, typer.Option(help="Maximum number of candidates to measure.")] = 40,
    tries: Annotated[int, typer.Option(help="Maximum number of candidates to train.")] = 3,
    max_minutes: Annotated[float | None, typer.Option(help="Time limit of the trials: no further one starts.")] = None,
    pruners: Annotated[str, typer.Option(help="Pruners to choose among, such as l2-norm,fpgm.")] = "",
    quantizers: Annotated[str, typer.Option(help="Quantizers to choose among, such as lsq,none.")] = "",
    as_json: Json = False,
) -> None:
    """Search for a model that meets a latency or size target with little loss: measured trials, then training runs."""
    from compress.search import target_search
    from compress.search.target import Target

    target = Target(max_accuracy_drop, min_speedup, max_latency_ms, max_size_mb)
    settings = target_search.Settings(target, strategy, trials, tries, max_minutes, names(pruners), names(quantizers))
    result = target_search.search(request_from(values, request), settings, out, notify=show)
    typer.echo(json.dumps(result) if as_json else f"{result['text']}\n\nChart    {out / target_search.PAGE}")
    if result["winner"] is None:
        raise typer.Exit(FAILED)


def names(text_list: str) -> tuple[str, ...]:
    """`a,b` as names."""
    return tuple(text_list.replace(",", " ").split())


def numbers(field: str, text_list: str, kind: type[float]) -> tuple[Any, ...]:
    """`0.25,0.5` as numbers of a kind. Raises `RequestError`."""
    try:
        return tuple(kind(item) for item in names(text_list))
    except ValueError:
        raise RequestError(field, text_list, "numbers separated by commas, such as 0.25,0.5 or 8,4") from None


def decimal(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


def show(line: str) -> None:
    """Prints a line of progress to standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
