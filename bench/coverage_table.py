"""docs/coverage.md from the rows of docs/coverage.json."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from compress.equality import AGREEMENT, FLOAT_TOLERANCE, QUANTIZED_RULE, RMS
from compress.pruning.equivalence import TOLERANCE

Row = dict[str, Any]

STAGES = ("equal", "reloaded", "exported", "quantized")
_PATH = re.compile(r"\b\w+(\.\w+)+\b")
_NAMED = 3
"""Layers named in a cell; of more, the number."""
_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt-rtx": "TensorRT for RTX"}


def passes(row: Row) -> dict[str, bool]:
    """Whether a row is equal to its masked model, reloads, exports, and is quantized to files that answer alike."""
    if "error" in row:
        return dict.fromkeys(STAGES, False)
    quantized = row.get("quantized", {})
    return {
        "equal": row["relative_difference"] <= TOLERANCE,
        "reloaded": row["reload_difference"] == 0,
        "exported": row["onnx_relative_difference"] <= FLOAT_TOLERANCE,
        "quantized": "files" in quantized and all(_agrees(file) for file in quantized["files"].values()),
    }


def table(rows: list[Row], versions: dict[str, str], command: str) -> str:
    """The page as Markdown: the total, a line for each row in each of two tables, and how it was made."""
    passed = [passes(row) for row in rows]
    total = ", ".join(f"{sum(one[key] for one in passed)} {key}" for key in STAGES)
    return "\n".join(
        [
            "# Coverage",
            "",
            f"**{len(rows)} rows: {total}.**",
            "",
            *_pruned(rows),
            "",
            *_quantized([row for row in rows if "quantized" in row]),
            "",
            f"Made by `{command}` with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
            "",
        ]
    )


# ---- pruned -------------------------------------------------------------------------------------------------------


def _pruned(rows: list[Row]) -> list[str]:
    return [
        "Each of torchvision's classifiers with random weights, half of the channels removed. *Difference*: the largest "
        f"of the shrunk model's answers to the masked model's, relative to their scale (at most {TOLERANCE:g}). "
        "*Reload*: equal bit for bit in a process that cannot import nni. *ONNX*: relative difference of the exported "
        f"file to torch by ONNX Runtime (at most {FLOAT_TOLERANCE:g}). *Peak*: memory of the process up to the shrunk "
        "model.",
        "",
        "| model | difference | parameters kept | MACs kept | reload | ONNX | seconds | peak | layers that are not pruned |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
    ]


def line(row: Row) -> str:
    """A row of the first table."""
    if "error" in row:
        return f"| {row['model']} | **failed** |  |  |  |  |  |  | {_in_a_cell(row['error'])} |"
    cells = [
        _name(row),
        f"{row['relative_difference']:.1e}",
        f"{row['parameters_kept']:.1%} of {row['parameters'] / 1e6:.1f} M",
        f"{row['macs_kept']:.1%}",
        "equal" if row["reload_difference"] == 0 else f"**{row['reload_difference']:.1e}**",
        f"{row['onnx_relative_difference']:.1e}",
        f"{row['seconds']:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        _stays(row),
    ]
    return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
    return f"{row['model']} ({row['reduced']})" if row["reduced"] else row["model"]


def _stays(row: Row) -> str:
    """How many layers are not pruned, and the two commonest reasons without the names of single layers."""
    shortened = (_PATH.sub("a layer", reason.rpartition(", which ")[2]) for _, reason in row["left_out"])
    reasons = Counter(reason.partition(":")[0].partition(" (")[0] for reason in shortened)
    told = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(2))
    return f"{len(row['left_out'])} of {row['layers']}: {told}"


# ---- quantized ----------------------------------------------------------------------------------------------------


def _quantized(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    images = next((row["quantized"]["images"] for row in rows if "images" in row["quantized"]), 0)
    return [
        "## Quantized",
        "",
        "The pruned models, taught ten patterns for 100 steps and quantized to 8 bits by calibration alone. *Files*: "
        f"equal top-1 answers of the exported file, through ONNX Runtime, and the fake-quantized model on {images} new "
        "images, with the root mean square of the logits' difference relative to the largest; a file passes with "
        f"{QUANTIZED_RULE}. The other columns: layers that run on integers, of all convolutions and fully connected "
        "layers, as the runtime itself says; for OpenVINO, which rounds in other places, also its agreement. *Right*: "
        "answers of the float and of the fake-quantized model that are right." + _narrowed(rows),
        "",
        "| model | right | TensorRT file | ONNX Runtime file | "
        + " | ".join(_TITLES.values())
        + " | stays in floating point |",
        "|---|---|---|---|---|---|---|---|",
        *(quantized_line(row) for row in rows),
        "",
        *_legend(rows),
    ]


def quantized_line(row: Row) -> str:
    """A row of the second table."""
    found = row["quantized"]
    if "error" in found:
        return f"| {_name(row)} | **failed** |  |  |  |  |  | {_in_a_cell(found['error'])} |"
    kernels = {"onnxruntime": found["files"]["onnxruntime"], **found["runtimes"]}
    cells = [
        _name(row),
        " → ".join(f"{found['right'][key]:.1%}" for key in ("float", "fake_quantized")),
        *(_agreement(found["files"][flavour]) for flavour in ("tensorrt", "onnxruntime")),
        _kernels({key: kernels["onnxruntime"][key] for key in ("integer", "candidates")}),
        *(_kernels(kernels[name]) for name in ("openvino", "tensorrt-rtx")),
        _floats(found, kernels),
    ]
    return f"| {' | '.join(cells)} |"


def _agrees(file: Row) -> bool:
    return file["top1"] >= AGREEMENT or file["relative_rms"] <= RMS


def _agreement(file: Row) -> str:
    text = f"{file['top1']:.1%}, {file['relative_rms']:.1%}"
    return text if _agrees(file) else f"**{text}**"


def _kernels(facts: Row) -> str:
    if "error" in facts:
        return f"**refused**: {_in_a_cell(facts['error'])}"
    share = f"{facts['integer']}/{facts['candidates']}"
    return f"{share} ({_agreement(facts)})" if "top1" in facts else share


def _floats(found: Row, kernels: dict[str, Row]) -> str:
    """Parts that stay float by design, then the layers that a runtime left float though the file has integers."""
    parts = [f"{count} {kind}" for kind, _, count in found["left_float"]]
    for runtime, facts in kernels.items():
        if names := facts.get("float"):
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{_TITLES[runtime]}: {', '.join(names[:_NAMED])}{more}")
    return "; ".join(parts) or "nothing"


def _legend(rows: list[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for kind, reason, _ in row["quantized"].get("left_float", ()):
            kinds = reasons.setdefault(reason, [])
            kinds += [kind] if kind not in kinds else []
    return [f"- {', '.join(sorted(kinds))}: {reason}." for reason, kinds in reasons.items()]


def _narrowed(rows: list[Row]) -> str:
    narrowed = any("notes" in row["quantized"].get("runtimes", {}).get("openvino", {}) for row in rows)
    if not narrowed:
        return ""
    return " This was measured on a CPU without int8 dot product, where OpenVINO gets 7-bit weights for signed inputs."


def _in_a_cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
