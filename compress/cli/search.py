"""The shell commands that look before they train: `sensitivity`, `forecast` and `search`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import text
from compress.cli.jobs import FAILED, Json
from compress.errors import RequestError
from compress.request import Request

RequestFile = Annotated[
    Path | None,
    typer.Option(
        "--request", help="Read the base request from a JSON file, as request.json of a run.", show_default=False
    ),
]
Out = Annotated[
    Path, typer.Option("--out", help="Folder for what is found; the same folder goes on.", show_default=False)
]


def register(
    cli: typer.Typer,
    with_request_options: Callable[[Any], Any],
    request_of: Callable[[dict[str, Any], Path | None], Request],
) -> None:
    """Adds the commands to the shell; the two functions are those behind `run` and `check`."""

    def sensitivity(
        values: dict[str, Any],
        out: Out,
        request: RequestFile = None,
        ratios: Annotated[str, typer.Option(help="Shares of channels to remove.")] = "0.25,0.5,0.75",
        bits: Annotated[str, typer.Option(help="Bits of the weights, such as 4,3; none unless given.")] = "",
        as_json: Json = False,
    ) -> None:
        """What each group of layers bears: accuracy and measured latency over ratios and bits, without training."""
        from compress.search import sensitivity as table

        found = table.measure(
            request_of(values, request),
            out,
            ratios=numbers("ratios", ratios, float),
            bits=numbers("bits", bits, int),
            notify=show,
        )
        if as_json:
            typer.echo(json.dumps(found))
            return
        rows = [
            (
                cell["layers"][0],
                cell["kind"],
                f"{cell['value']:g}",
                word(cell["points_lost"]),
                word(cell["percent_faster"]),
            )
            for cell in found["cells"]
        ]
        typer.echo(text.table(("Group", "What", "Value", "Points lost", "Time saved, %"), rows))
        typer.echo(f"\nHeat map  {out / table.PAGE}\nNumbers   {out / table.FILE}")

    def forecast(
        values: dict[str, Any],
        out: Out,
        request: RequestFile = None,
        ratios: Annotated[str, typer.Option(help="Shares of each layer's channels.")] = "0.25,0.375,0.5,0.625,0.75",
        as_json: Json = False,
    ) -> None:
        """What can be expected before any training: accuracy, measured speed and size over sparsity, with uncertainty."""
        from compress.search import front

        found = front.measure(request_of(values, request), out, ratios=numbers("ratios", ratios, float), notify=show)
        if as_json:
            typer.echo(found.model_dump_json())
            return
        rows = [
            (
                f"{100 * p.sparsity:g} %",
                f"{p.points_lost:.1f} ({p.points_lost_low:.1f} to {p.points_lost_high:.1f})",
                f"{p.speedup:.1f}x ({p.speedup_low:.1f} to {p.speedup_high:.1f})",
                f"{p.file_bytes / 1e6:.2f} MB",
            )
            for p in found.points
        ]
        typer.echo(text.table(("Sparsity", "Points lost, untrained", f"Faster, {found.runtime}", "File"), rows))
        typer.echo(
            f"\nChart     {out / front.PAGE}\nNumbers   {out / front.FILE}\n"
            f"Compare   python -m compress run --forecast {out / front.FILE} ..."
        )

    def search(
        values: dict[str, Any],
        out: Out,
        request: RequestFile = None,
        max_accuracy_drop: Annotated[float, typer.Option(help="Points that the trained model may lose.")] = 1.0,
        min_speedup: Annotated[float | None, typer.Option(help="Over the fastest fp32 of the original.")] = None,
        max_latency_ms: Annotated[float | None, typer.Option(help="One image, on the runtime.")] = None,
        max_size_mb: Annotated[float | None, typer.Option(help="Of the deployed file.")] = None,
        strategy: Annotated[
            str,
            typer.Option(
                help="How candidates are chosen: tpe, uniform, random, simulated-annealing, auto-compress or amc."
            ),
        ] = "tpe",
        trials: Annotated[int, typer.Option(help="Candidates to measure, at most.")] = 40,
        tries: Annotated[int, typer.Option(help="Candidates to train, at most.")] = 3,
        max_minutes: Annotated[float | None, typer.Option(help="Of trials; no further one starts then.")] = None,
        pruners: Annotated[str, typer.Option(help="Choose among these pruners, too, such as l2-norm,fpgm.")] = "",
        quantizers: Annotated[str, typer.Option(help="Choose among these quantizers, too, such as lsq,none.")] = "",
        as_json: Json = False,
    ) -> None:
        """Find what is fast or small enough and loses little: measured candidates, then trained runs until one holds."""
        from compress.search import target_search
        from compress.search.target import Target

        target = Target(max_accuracy_drop, min_speedup, max_latency_ms, max_size_mb)
        settings = target_search.Settings(
            target, strategy, trials, tries, max_minutes, names(pruners), names(quantizers)
        )
        found = target_search.search(request_of(values, request), settings, out, notify=show)
        typer.echo(json.dumps(found) if as_json else f"{found['text']}\n\nChart    {out / target_search.PAGE}")
        if found["winner"] is None:
            raise typer.Exit(FAILED)

    cli.command()(with_request_options(sensitivity))
    cli.command()(with_request_options(forecast))
    cli.command()(with_request_options(search))


def names(given: str) -> tuple[str, ...]:
    return tuple(given.replace(",", " ").split())


def numbers(field: str, given: str, kind: type) -> tuple[Any, ...]:
    """`0.25,0.5` as numbers."""
    try:
        return tuple(kind(word) for word in given.replace(",", " ").split())
    except ValueError:
        raise RequestError(field, given, "numbers with commas between, such as 0.25,0.5 or 8,4") from None


def word(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


def show(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
