"""From the facts that the stages left to the report, the verdict and the papers that go with them."""

from __future__ import annotations

import datetime
from typing import Any

from compress import __version__, machine
from compress.files import write_text
from compress.report import (
    Data,
    Engine,
    Epoch,
    Handoff,
    Layer,
    Measurement,
    MixedStep,
    Report,
    Stage,
    Variant,
    Verdict,
    Worth,
    card,
    forecast,
)
from compress.request.snippets import without_folders
from compress.runs import STAGES, Run
from compress.stages import ledger
from compress.workload import Workload

Facts = dict[str, Any]
LAST_STAGE = {"baseline": "baseline", "pruned": "finetune", "half": "finetune", "quantized": "quantize"}
"""The last stage that may have changed a variant's weights."""
PARENT = {"baseline": None, "pruned": "baseline", "half": "pruned", "quantized": "pruned"}


def write_report(work: Run, workload: Workload) -> Facts:
    """report.json, report.html and the model card; all numbers of the latter two are read from the first."""
    report = collect(work, workload)
    write_text(work.folder / "report.json", report.to_json())
    write_text(work.folder / "report.html", card.html_report(report))
    write_text(work.folder / "README.md", card.model_card(report))
    files = ["report.json", "report.html", "README.md"]
    if report.forecast:
        files.append(forecast.FILE)
    return {
        "files": files,
        "parents": {
            **work.facts("export")["parents"],
            **work.facts("build")["parents"],
            **dict.fromkeys(files, "the run"),
        },
    }


def collect(work: Run, workload: Workload) -> Report:
    """Everything the stages recorded, in the report's form."""
    facts = {name: work.facts(name) for name in STAGES if name != "report"}
    measurements = tuple(Measurement(**row) for row in facts["measure"]["measurements"])
    variants = _variants(facts, measurements, workload)
    hops = ledger.collect(work.folder, facts)
    reached = verdict(variants, measurements, facts["measure"]["runtime"], workload.dataset.kind)
    return Report(
        espalier_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        request=without_folders(work.request.model_dump(mode="json")),
        checkpoint=workload.weights,
        architecture=workload.name,
        environment=machine.describe(work.request.threads),
        seed=work.request.seed,
        data=_data(workload),
        variants=variants,
        handoffs=tuple(Handoff(**row) for stage in facts.values() for row in stage.get("handoffs", ())),
        ledger=hops,
        loss=ledger.loss(hops, ledger.blame(facts)),
        cross_checks=ledger.cross_checks(work.folder, facts["measure"]["ledger"]),
        worth=tuple(Worth(**row) for row in facts["measure"]["worth"]),
        mixed_precision=tuple(
            MixedStep(widened=row["widened"], accuracy=row["score"], weight_bits=row["weight_bits"])
            for row in (facts["quantize"]["mixed"] or {}).get("steps", ())
        ),
        measurements=measurements,
        engines=tuple(Engine(**row) for row in facts["build"]["engines"]),
        stages=tuple(
            Stage(name=name, seconds=f["seconds"], peak_rss_bytes=f["peak_rss_bytes"], skipped=f.get("skipped"))
            for name, f in facts.items()
        ),
        layers=_layers(facts, work),
        curves=tuple(Epoch(stage=name, **row) for name in ("finetune", "quantize") for row in facts[name]["curve"]),
        notes=_notes(facts, workload),
        verdict=reached,
        forecast=forecast.came_true(work.folder, reached, min(variants[-1].file_bytes.values())),
    )


def verdict(
    variants: tuple[Variant, ...], measurements: tuple[Measurement, ...], runtime: str | None, kind: str
) -> Verdict:
    """What was gained and lost, in one sentence; the gain is against the fastest real fp32 of the dense model.

    Args:
        runtime: the one that the result is for; None when it cannot run here.
    """
    dense, last = variants[0], variants[-1]
    dense_bytes, last_bytes = min(dense.file_bytes.values()), min(last.file_bytes.values())
    single = [m for m in measurements if m.batch_size == 1]
    reference = min((m for m in single if m.variant == dense.name and m.precision == "fp32"), key=lambda m: m.p50_ms)
    result = min(
        (m for m in single if m.variant == last.name and m.runtime == runtime), key=lambda m: m.p50_ms, default=None
    )
    speedup = reference.p50_ms / result.p50_ms if result else None
    parts = [f"{dense_bytes / last_bytes:.1f}x smaller ({dense_bytes / 1e6:.1f} to {last_bytes / 1e6:.1f} MB)"]
    if result and speedup:
        word = (
            f"{speedup:.1f}x faster"
            if speedup >= 1.05
            else "no faster"
            if speedup > 0.95
            else f"{1 / speedup:.1f}x SLOWER"
        )
        parts.append(
            f"{word} ({reference.p50_ms:.2f} to {result.p50_ms:.2f} ms per image, {result.runtime} {result.precision})"
        )
    drop = None
    if last.accuracy is not None and dense.accuracy is not None:
        drop = 100 * (dense.accuracy - last.accuracy)
        parts.append(_accuracy_words(dense, last, drop, kind))
    text = f"{', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else parts[0] + "."
    if result is None:
        text += " The engine asked for was built, not run: there is no device for it here."
    return Verdict(
        text=text,
        runtime=runtime,
        speedup_vs_fastest_fp32=speedup,
        size_ratio=dense_bytes / last_bytes,
        accuracy_drop_points=drop,
    )


def _accuracy_words(dense: Variant, last: Variant, drop: float, kind: str) -> str:
    if kind != "labelled":
        return f"{100 * (last.accuracy or 0):.1f} % of its answers agree with the original's on {last.n_test:,} images"
    change = (
        f"{drop:.1f} points of accuracy lost"
        if drop >= 0.05
        else f"{-drop:.1f} points of accuracy gained"
        if drop <= -0.05
        else "no accuracy lost"
    )
    before, after = 100 * (dense.accuracy or 0), 100 * (last.accuracy or 0)
    return f"{change} ({before:.1f} to {after:.1f} %, {last.n_test:,} test images)"


def _variants(facts: Facts, measurements: tuple[Measurement, ...], workload: Workload) -> tuple[Variant, ...]:
    """Accuracy is that of the deployed file, through the runtime that the result is for where it ran, else torch's."""
    chosen = facts["measure"]["runtime"]
    sizes = {"baseline": facts["baseline"]}
    rows = []
    for name, files in facts["export"]["variants"].items():
        size = sizes.get(name, facts["finetune"])
        scored = sorted(
            (m for m in measurements if m.variant == name and m.accuracy is not None), key=lambda m: m.runtime != chosen
        )
        deployed = scored[0] if scored else None
        hop = ledger.hop_after(facts, LAST_STAGE[name])
        rows.append(
            Variant(
                name=name,
                parent=PARENT[name] if PARENT[name] in (None, *facts["export"]["variants"]) else "baseline",
                parameters=size["parameters"],
                macs=size["macs"],
                file_bytes=files,
                accuracy=deployed.accuracy if deployed else hop["accuracy"],
                accuracy_ci95=deployed.accuracy_ci95 if deployed else tuple(hop["accuracy_ci95"]),
                accuracy_through=deployed.runtime if deployed else hop["through"],
                n_test=hop["n"],
            )
        )
    return tuple(rows)


def _layers(facts: Facts, work: Run) -> tuple[Layer, ...]:
    after = {layer["name"]: layer for layer in facts["finetune"]["layers"]}
    groups = {
        name: (f"group {number}", group["reason"])
        for number, group in enumerate(facts["prune"]["groups"], 1)
        for name in group["layers"]
    }
    stays = {row["layer"]: row["reason"] for row in facts["prune"]["left_out"]}
    quantized = facts["quantize"]["sqnr_db"]
    refits = {row["layer"]: row for row in facts["prune"]["refits"]}
    noise, files = facts["quantize"]["noise"]["layers"], facts["export"]["noise"]
    rows = []
    for layer in facts["baseline"]["layers"]:
        name = layer["name"]
        group, reason = groups.get(name, (None, stays.get(name, "nothing was pruned")))
        bits = facts["quantize"]["bits"].get(name, 16 if work.request.half_precision else 32)
        rows.append(
            Layer(
                name=name,
                type=layer["type"],
                channels_before=layer["channels"],
                channels_after=after[name]["channels"],
                macs_before=layer["macs"],
                macs_after=after[name]["macs"],
                weight_bits=bits,
                sqnr_db=quantized.get(name),
                output_sqnr_db=noise.get(name),
                file_sqnr_db={file: row["layers"][name] for file, row in files.items() if name in row["layers"]},
                group=group,
                reason=reason,
                pruned_error=refits.get(name, {}).get("error_before"),
                refitted_error=refits.get(name, {}).get("error_after"),
            )
        )
    return tuple(rows)


def _data(workload: Workload) -> Data:
    dataset, recipe = workload.dataset, workload.preprocessing
    return Data(
        source=dataset.source,
        kind=dataset.kind,
        n_train=len(dataset.train),
        n_test=len(dataset.test),
        class_names=workload.class_names,
        input_size=recipe.input_size,
        mean=recipe.mean,
        std=recipe.std,
        notes=dataset.notes,
    )


def _notes(facts: Facts, workload: Workload) -> tuple[str, ...]:
    short = facts["prune"].get("shortfall")
    notes = [*([short] if short else []), *workload.notes]
    notes += [f"Stage {name}: {f['skipped']}." for name, f in facts.items() if f.get("skipped")]
    notes += [facts[name]["note"] for name in ("prune", "quantize") if facts[name].get("note")]
    notes += [facts[name]["memory_note"] for name in ("finetune", "quantize") if facts[name].get("memory_note")]
    if workload.dataset.kind == "none":
        notes.append(
            "No images were given: nothing was trained, ranges come from synthetic images, and agreement with the original "
            "is on those."
        )
    if workload.dataset.kind == "unlabelled":
        notes.append(
            "The images have no labels: the model was trained to answer like the original, and agreement with it stands for "
            "accuracy."
        )
    if label := facts["quantize"].get("label"):
        if label != "int8":
            notes.append(f"Quantized to {label}.")
    notes += [
        f"{row['layer']} stays in floating point: {row['reason']}." for row in facts["quantize"].get("left_float", ())
    ]
    return tuple(notes + list(facts["measure"]["notes"]))
