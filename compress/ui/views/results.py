"""HTML of a finished run: the verdict, its files and how they are used, an image of the visitor's own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from compress.methods.runtimes import REFERENCE, RUNTIMES
from compress.report import Report
from compress.ui import views

LOSS_TO_NOTICE = 1.0
"""Points of accuracy; a larger loss is shown in the colour of trouble."""


def verdict(report: Report) -> str:
    facts, first, last = report.verdict, report.variants[0], report.variants[-1]
    answer = report.data.score_name
    speed, drop = facts.speedup_vs_fastest_fp32, facts.accuracy_drop_points
    slower = speed is not None and speed < 1
    change = "—" if drop is None else f"{-drop:+.1f}".replace("-", "−")
    stayed = f"{last.parameters / 1e6:.2f} of {first.parameters / 1e6:.2f} million"
    tiles = (
        _tile(views.factor(speed), "as fast" if slower else "faster", _through(facts.runtime), bad=slower),
        _tile(views.factor(facts.size_ratio), "smaller file", "to deploy"),
        _tile(
            change,
            f"points of {answer}",
            "on images never trained on" if drop is not None else "not measured",
            bad=drop is not None and drop > LOSS_TO_NOTICE,
        ),
        _tile(f"{100 * last.parameters / first.parameters:.0f} %", "of the parameters", stayed),
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        f'<section class="verdict"><p class="headline">{escape(facts.text)}</p>'
        f'<ul class="tiles">{"".join(tiles)}</ul><div class="soft">{notes}</div></section>'
    )


def findings(report: Report) -> str:
    """Where most was lost, whether int8 pays on each runtime, and runtimes that answer the same file differently."""
    apart = [check.text for check in report.cross_checks if not check.agrees]
    items = [report.loss.text, *(row.text for row in report.worth), *apart]
    return f'<ul class="soft">{"".join(f"<li>{escape(text)}</li>" for text in items)}</ul>'


def _tile(value: str, name: str, how: str, *, bad: bool = False) -> str:
    kind = ' class="bad"' if bad else ""
    return f"<li{kind}><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(how)}</small></li>"


def _through(runtime: str | None) -> str:
    return "not measured" if runtime is None else f"through {runtime}"


def machine(report: Report) -> str:
    """What the measured times depend on."""
    here, size = report.environment, report.data.input_size
    threads = f"{here.threads} thread{'s' if here.threads != 1 else ''}"
    where = f"{here.cpu}, {threads}, {here.gpu or 'no GPU'}, input {size} × {size}"
    return (
        f'<p class="soft">Measured on {escape(where)}. “Faster” is against the fastest real fp32 of the original model '
        "in the same run.</p>"
    )


def downloads(job_id: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """A link to everything, and a link, the size and the hash of each file: the report first, then what is deployed."""
    order = sorted(files, key=lambda name: (name != "report.html", not name.startswith("artifacts/"), name))
    rows = []
    for name in order:
        link = f'<a href="{escape(file_url(job_id, name))}" download>{escape(name.removeprefix("artifacts/"))}</a>'
        size, digest = views.file_size(int(files[name]["bytes"])), escape(str(files[name]["sha256"]))
        rows.append(f'<th scope="row">{link}</th><td>{size}</td><td><code>{digest}</code></td>')
    total = views.file_size(sum(int(facts["bytes"]) for facts in files.values()))
    everything = f'<a class="button" href="runs/{job_id}/files.zip" download>Everything as one zip ({total})</a>'
    listing = views.html_table(("File", "Size", "sha256"), rows, "Files of this run", kind="files")
    return f'<p class="everything">{everything}</p>{listing}'


def usage(job_id: str, report: Report, files: Mapping[str, Any]) -> str:
    """What to type to verify the zip, to classify an image with the deployed file, and to load the model in Python."""
    runtime = RUNTIMES[report.verdict.runtime or REFERENCE]
    folder = folder_name(job_id)
    shell = [f"unzip {folder}.zip", f"cd {folder}", "sha256sum -c SHA256SUMS"]
    if "artifacts/infer.py" in files:
        option = f" --runtime {runtime.infer_name}" if runtime.infer_name != REFERENCE else ""
        packages = " ".join(("numpy", "pillow", *runtime.packages))
        shell += [f"pip install {packages}", f"python artifacts/infer.py{option} photo.jpg"]
    python = f'import compress\n\nmodel = compress.load("{folder}")  # the pruned torch model, without NNI\n'
    parts = views.copied("In a shell", "\n".join(shell) + "\n") + views.copied("In Python", python)
    return views.folded("How to use these files", parts)


def folder_name(job_id: str) -> str:
    """Of the zip, and of the folder inside it."""
    return f"espalier-{job_id[:8]}"


def classification(found: Mapping[str, Any]) -> str:
    """An image of the visitor's through the original and the compressed model, side by side."""
    columns = "".join(_classification(*pair) for pair in zip(("Original", "Compressed"), found["models"], strict=True))
    same = found["models"][0]["top"][0]["class"] == found["models"][1]["top"][0]["class"]
    sentence = "Both give the same answer." if same else "They give different answers."
    seen = f'<img src="data:image/png;base64,{found["seen"]}" alt="The image as the models see it" width="160">'
    return (
        f'<div class="tried" role="status"><figure>{seen}<figcaption class="soft">What the models see: '
        f"{found['input_size']} × {found['input_size']} pixels</figcaption></figure>{columns}</div>"
        f'<p class="soft">{sentence} Times are medians of {found["repeats"]} goes just now, beside whatever else this '
        "machine does; the table above was measured with care.</p>"
    )


def _classification(title: str, model: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<li><span>{escape(str(row["class"]))}</span><span class="value">{100 * row["share"]:.1f} %</span>'
        f'<i class="track" aria-hidden="true"><i style="width:{100 * row["share"]:.1f}%"></i></i></li>'
        for row in model["top"]
    )
    how = f"{model['ms']:.2f} ms · {escape(model['file'])}, {escape(model['runtime'])} {escape(model['precision'])}"
    return f'<section><h3>{title}</h3><p class="soft">{how}</p><ol class="shares">{rows}</ol></section>'


def file_url(job_id: str, name: str) -> str:
    """Where a run's file is served, relative to the app's address."""
    return f"runs/{job_id}/files/{quote(name)}"
