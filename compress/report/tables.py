"""The numbers behind each chart as a table of formatted words, read from a report and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report import Measurement, Report, Variant

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
"""Headers and rows, all formatted."""


def tables(report: Report) -> dict[str, Table]:
    """The numbers of each chart under the chart's key, and `summary`: the baseline beside each variant."""
    return {
        "summary": _summary_table(report),
        "size": _size_table(report),
        "latency": _latency_table(report),
        "accuracy": _accuracy_table(report),
        "sqnr": _sqnr_table(report),
        "mixed": _mixed_table(report),
        "channels": _channels_table(report),
        "training": _training_table(report),
    }


def smallest_file(variant: Variant) -> int | None:
    """Bytes of the variant's smallest deployable file."""
    return min(variant.file_bytes.values(), default=None)


def fastest(
    report: Report, variant: str, *, batch_size: int = 1, precision: str | None = None, runtime: str | None = None
) -> Measurement | None:
    """The quickest measurement of a variant, of one precision or through one runtime where given."""
    rows = [
        m
        for m in report.measurements
        if m.variant == variant
        and m.batch_size == batch_size
        and precision in (None, m.precision)
        and runtime in (None, m.runtime)
    ]
    return min(rows, key=lambda m: m.p50_ms, default=None)


def _summary_table(report: Report) -> Table:
    dense = report.variants[0]
    reference = fastest(report, dense.name, precision="fp32")
    rows: list[tuple[str, ...]] = []
    for variant in report.variants:
        is_last = variant is report.variants[-1]
        through, precision = (report.verdict.runtime, None) if is_last else (None, "fp32")
        quickest = fastest(report, variant.name, precision=precision, runtime=through)
        file = smallest_file(variant)
        rows.append(
            (
                variant.name,
                _count(variant.parameters),
                _count(variant.macs),
                _megabytes(file),
                _times(smallest_file(dense), file),
                _percent(variant.accuracy, variant.accuracy_ci95),
                "—" if quickest is None else f"{quickest.p50_ms:.2f} ms",
                "—" if quickest is None else f"{quickest.runtime}, {quickest.precision}",
                _times(reference.p50_ms if reference else None, quickest.p50_ms if quickest else None),
            )
        )
    answer = report.data.score_name.capitalize()
    return ("Variant", "Parameters", "MACs", "File", "Smaller", answer, "Batch 1, p50", "Through", "Faster"), rows


def _size_table(report: Report) -> Table:
    files = sorted({name for variant in report.variants for name in variant.file_bytes})
    rows = [
        (v.name, f"{v.parameters:,}", f"{v.macs:,}", *(_megabytes(v.file_bytes.get(name)) for name in files))
        for v in report.variants
    ]
    return ("Variant", "Parameters", "MACs", *files), rows


def _latency_table(report: Report) -> Table:
    headers = (
        "Variant",
        "Runtime",
        "Asked",
        "Really",
        "Integer layers",
        "Batch",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "Images/s",
        "Samples",
        "Remarks",
    )
    return headers, [
        (
            m.variant,
            m.runtime,
            m.precision_requested,
            m.precision,
            "—" if m.integer_layers is None else f"{m.integer_layers} of {m.candidate_layers}",
            str(m.batch_size),
            f"{m.p50_ms:.3f}",
            f"{m.p90_ms:.3f}",
            f"{m.p99_ms:.3f}",
            f"{m.throughput_per_s:.0f}",
            str(len(m.samples_ms)),
            "; ".join((*(("noisy",) if m.noisy else ()), *m.notes)),
        )
        for m in sorted(report.measurements, key=lambda m: (m.batch_size, m.p50_ms))
    ]


def _accuracy_table(report: Report) -> Table:
    headers = ("Hop", "Through", "Accuracy", "95 % interval", "Compared with", "Agrees", "Lost", "Gained", "Images")
    return headers, [
        (
            hop.name,
            hop.through,
            f"{100 * hop.accuracy:.2f} %",
            f"{100 * hop.accuracy_ci95[0]:.2f} to {100 * hop.accuracy_ci95[1]:.2f} %",
            hop.previous or "—",
            "—" if hop.agreement_with_previous is None else f"{100 * hop.agreement_with_previous:.2f} %",
            "—" if hop.lost is None else f"{hop.lost:,}",
            "—" if hop.gained is None else f"{hop.gained:,}",
            f"{hop.n:,}",
        )
        for hop in report.ledger
    ]


def _sqnr_table(report: Report) -> Table:
    files = sorted({file for layer in report.layers for file in layer.file_sqnr_db})
    rows = [
        (
            layer.name,
            str(layer.weight_bits),
            *(_decibels(value) for value in (layer.sqnr_db, layer.output_sqnr_db)),
            *(_decibels(layer.file_sqnr_db.get(file)) for file in files),
        )
        for layer in report.layers
    ]
    return ("Layer", "Weight bits", "Weights, dB", "Output, fake-quantized, dB", *(f"{f}, dB" for f in files)), rows


def _channels_table(report: Report) -> Table:
    sizes = ("Layer", "Type", "Channels", "Kept", "MACs before", "MACs after")
    return (*sizes, "Pruned, off by", "Refitted", "Weight bits", "SQNR dB", "Why"), [
        (
            layer.name,
            layer.type,
            str(layer.channels_before),
            str(layer.channels_after),
            f"{layer.macs_before:,}",
            f"{layer.macs_after:,}",
            _share(layer.pruned_error),
            _share(layer.refitted_error),
            str(layer.weight_bits),
            _decibels(layer.sqnr_db),
            layer.reason,
        )
        for layer in report.layers
    ]


def _share(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.2g} %"


def _mixed_table(report: Report) -> Table:
    return ("Layers with more bits", "Mean bits per weight", "Held-out accuracy", "Newly widened"), [
        (
            str(len(step.widened)),
            f"{step.weight_bits:.2f}",
            f"{100 * step.accuracy:.2f} %",
            ", ".join(step.widened[len(before) :]) or "—",
        )
        for step, before in zip(
            report.mixed_precision, ((), *(s.widened for s in report.mixed_precision)), strict=False
        )
    ]


def _training_table(report: Report) -> Table:
    return ("Stage", "Epoch", "Loss", "Held-out accuracy", "Seconds"), [
        (
            e.stage,
            str(e.epoch),
            f"{e.train_loss:.4f}",
            "—" if e.accuracy is None else f"{100 * e.accuracy:.2f} %",
            f"{e.seconds:.1f}",
        )
        for e in report.curves
    ]


# ---- words -----------------------------------------------------------------------------------------------------------


def _count(value: int) -> str:
    return f"{value / 1e6:.2f} M" if value < 1e9 else f"{value / 1e9:.2f} G"


def _megabytes(size: int | None) -> str:
    return "—" if size is None else f"{size / 1e6:.2f} MB"


def _times(before: float | None, after: float | None) -> str:
    return "—" if not before or not after else f"{before / after:.1f}x"


def _percent(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "—"
    return f"{100 * value:.2f} %" + (f" (±{50 * (interval[1] - interval[0]):.1f})" if interval else "")


def _decibels(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"
