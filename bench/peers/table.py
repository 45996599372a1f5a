"""docs/benchmarks.md: every row that was tried, what it reached on each runtime, and which points are dominated."""

from __future__ import annotations

from typing import Any

from bench.peers.front import Point, dominators, front
from bench.peers.rows import ROWS, Row
from compress.request import Request

Facts = dict[str, Any]
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
REFITTED = Request.model_fields["reconstruction_images"].default
ROW_OF = {row.name: row for row in ROWS}
HEAD = (
    "| row | runtime | runs in | accuracy | file | {small} px | {large} px | images | seconds | lines |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
HOW = """\
Everyone gets the same dense weights, the same training images, the same {budget:,} of them for all training after pruning
(counted with repetitions; *images* is what was used), the same 256 images to calibrate on, and where training is part of a
row the same recipe: distillation from the dense model, AdamW at 0.001 for what was pruned and at 0.00003 on the grid, one
cycle, batches of 64, a sixth of the budget on the grid where both are trained. Settings that a peer documents for
this CPU are used (`bench/peers/scripts/`); a row that does otherwise says so. One seed, nothing was chosen by test images.
Where Espalier prunes, it refits what stays to the dense model on {refitted:,} more training images, without their labels; they are
not in *images*.

*Accuracy* is of {tested:,} test images through the deployed file on that runtime, with static shapes; *{small} px* and *{large} px* are
the median of one image on one thread, all rows in turn in one process, with their gain over the fastest real fp32 of the dense
model; a ~ marks noisy ones. Each runtime loads each file with the settings that Espalier loads its own with and computes in what it
chooses (*runs in*). At {large} px it is the same structure from the same weights, without training. *Seconds* are those of the
script from its start to its file, imports and training included; those of Espalier leave out its own measuring and reporting,
which no other script does, and not the comparisons of its other stages. *Lines* are the code that a user writes: the script in
`bench/peers/scripts/` and what it imports from there, without comments.
"""


def page(document: Facts) -> str:
    """The whole page from what `__main__` measured (docs/benchmarks.json)."""
    parts = ["# Espalier and its peers", "", document["made_on"], ""]
    for model in document["models"]:
        parts += [f"## {model['model']}", "", *_model(model), ""]
    first = document["models"][0]
    sizes = {"small": first["small"], "large": first["large"]}
    told = {"budget": first["budget"], "tested": first["n_test"], "refitted": REFITTED}
    parts += ["## How it is measured", "", HOW.format(**told, **sizes)]
    parts += ["## Environments", "", *_environments(document["environments"])]
    return "\n".join(parts).rstrip() + "\n"


def points(model: Facts, size: str) -> list[Point]:
    """Every row but the dense model on each runtime; `size` is `small` or `large`."""
    return [
        Point(entry["row"], entry["runtime"], entry["accuracy"], entry[f"{size}_ms"])
        for entry in model["deployed"]
        if entry.get("accuracy") is not None and entry.get(f"{size}_ms") and not ROW_OF[entry["row"]].reference
    ]


def verdicts(model: Facts, size: str) -> dict[str, list[Point]]:
    """Espalier's rows with the peers' points that dominate them."""
    every = points(model, size)
    ours = [point for point in every if ROW_OF[point.row].ours]
    return dominators(ours, [point for point in every if not ROW_OF[point.row].ours])


# ---- one model ----------------------------------------------------------------------------------------------------


def _model(model: Facts) -> list[str]:
    results = {result["row"]: result for result in model["results"]}
    fastest = {size: _fastest_float(model, size) for size in ("small", "large")}
    lines = [HEAD.format(small=model["small"], large=model["large"])]
    for entry in model["deployed"]:
        lines.append(_line(entry, results[entry["row"]], fastest))
    lines += [
        f"| {_title(ROW_OF[name])} | | | **failed**: {_in_a_cell(result['error'])} | | | | | | {result['lines']} |"
        for name, result in results.items()
        if "error" in result
    ]
    for size in ("small", "large"):
        lines += ["", *_front(model, size)]
    return lines


def _line(entry: Facts, result: Facts, fastest: dict[str, float | None]) -> str:
    row = ROW_OF[entry["row"]]
    cells = [_title(row), TITLES[entry["runtime"]]]
    if "error" in entry:
        cells += ["", f"**refused**: {_in_a_cell(entry['error'])}", "", "", ""]
    else:
        low, high = entry["ci95"]
        cells += [
            _precision(entry),
            f"{100 * entry['accuracy']:.2f} % ± {50 * (high - low):.2f}",
            f"{entry['file_bytes'] / 1e6:.2f} MB",
            *(_latency(entry, size, fastest[size]) for size in ("small", "large")),
        ]
    cells += [f"{result['images']:,}", f"{result['seconds']:.0f}", str(result["lines"])]
    return f"| {' | '.join(cells)} |"


def _title(row: Row) -> str:
    return f"**{row.title}**" if row.ours else row.title


def _precision(entry: Facts) -> str:
    """What most layers run in, and how many of them when it is not all."""
    kernels = entry["kernels"]
    total = sum(kernels.values())
    if not total or kernels.get(entry["precision"]) == total:
        return entry["precision"]
    return f"{entry['precision']} ({kernels.get(entry['precision'], 0)} of {total})"


def _latency(entry: Facts, size: str, fastest: float | None) -> str:
    ms = entry.get(f"{size}_ms")
    if not ms:
        return _in_a_cell(entry.get(f"{size}_error", "not measured"))
    gain = f" ({fastest / ms:.2f}x)" if fastest else ""
    return f"{'~' if entry[f'{size}_noisy'] else ''}{ms:.3f} ms{gain}"


def _fastest_float(model: Facts, size: str) -> float | None:
    """Of the dense model in real fp32."""
    found = [
        entry[f"{size}_ms"]
        for entry in model["deployed"]
        if ROW_OF[entry["row"]].reference and entry.get("precision") == "fp32" and entry.get(f"{size}_ms")
    ]
    return min(found, default=None)


def _front(model: Facts, size: str) -> list[str]:
    pixels = model[size]
    standing = ", ".join(
        f"{_title(ROW_OF[point.row])} ({TITLES[point.runtime]})" for point in front(points(model, size))
    )
    lines = [f"Front at {pixels} px, the fastest first: {standing or 'no points'}."]
    for name, rivals in verdicts(model, size).items():
        if rivals:
            told = "; ".join(
                f"{ROW_OF[point.row].title} on {TITLES[point.runtime]} ({100 * point.accuracy:.2f} %, {point.ms:.3f} ms)"
                for point in rivals
            )
            lines.append(f"- {_title(ROW_OF[name])} is **dominated** at {pixels} px by {told}.")
    if len(lines) == 1:
        lines.append(f"- At {pixels} px no peer's point dominates a row of Espalier's.")
    return lines


# ---- environments -------------------------------------------------------------------------------------------------


def _environments(environments: dict[str, Facts]) -> list[str]:
    lines = ["| environment | versions | size without torch |", "|---|---|---|"]
    for name, facts in environments.items():
        if "error" in facts:
            lines.append(f"| {name} | **could not be installed**: {_in_a_cell(facts['error'])} | |")
        else:
            held = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
            lines.append(f"| {name} | {held} | {facts['megabytes']:.0f} MB |")
    return lines


def _in_a_cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
