"""Finished runs side by side: figures, settings that differ, the Pareto front and its chart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from example_report import example_report

from compress.report import comparison
from compress.report.comparison import Entry
from compress.report.comparison_charts import accuracy_against_latency
from compress.request import Request
from compress.ui.narrow import fit_narrow
from compress.ui.views import compare as view_compare


@pytest.fixture(scope="module")
def entry() -> Entry:
    return comparison.entry_of("a" * 32, "first <run>", example_report())


def made(entry: Entry, name: str, accuracy: float | None, p50_ms: float | None, **others: object) -> Entry:
    return replace(entry, job_id=name * 32, title=name, accuracy=accuracy, p50_ms=p50_ms, **others)


def test_an_entry_has_the_figures_of_the_deployed_file(entry: Entry) -> None:
    assert (entry.accuracy, entry.p50_ms, entry.through) == (0.907, 0.14, "openvino, int8")
    assert (entry.file_bytes, entry.parameters, entry.speedup) == (2_900_000, 2_797_610, 12.1)
    assert entry.kind == ("2,000 images of fashion-mnist at 32 × 32", "Example CPU, 1 thread")
    report = example_report()
    unlabelled = report.model_copy(update={"data": report.data.model_copy(update={"kind": "unlabelled"})})
    assert comparison.entry_of("b", "b", unlabelled).kind != entry.kind, "agreement is no accuracy"
    not_run = report.model_copy(update={"verdict": report.verdict.model_copy(update={"runtime": None})})
    assert comparison.entry_of("c", "c", not_run).p50_ms is None


def test_the_front_is_what_no_other_of_its_kind_beats(entry: Entry) -> None:
    runs = {
        "a": made(entry, "a", 0.90, 1.0),
        "b": made(entry, "b", 0.91, 2.0),
        "c": made(entry, "c", 0.90, 2.0),  # as accurate as a and slower; as fast as b and less accurate
        "d": made(entry, "d", 0.80, 0.5),
        "e": made(entry, "e", None, 0.1),
        "f": made(entry, "f", 0.99, None),
        "g": made(entry, "g", 0.90, 1.0),  # equal to a: neither beats the other
        "h": made(entry, "h", 0.99, 0.1, machine="another"),
    }
    assert "".join(found.title for found in comparison.front(list(runs.values()))) == "dagbh"
    assert comparison.front([]) == ()


def test_the_table_shows_figures_and_only_the_settings_that_differ(entry: Entry) -> None:
    other = replace(
        entry,
        job_id="b" * 32,
        title="second",
        accuracy=0.95,
        p50_ms=0.3,
        request=Request(sparsity=0.3, layer_bits={"fc": "32"}).model_dump(mode="json"),
    )
    headers, rows = comparison.table([entry, other])
    assert headers == ("Figure", "first <run>", "second")
    cells = {name: values for name, *values in rows}
    assert cells["Accuracy"] == ["90.7 % (89.5 to 91.9)", "95.0 % (89.5 to 91.9)"]
    assert cells["Batch 1, p50"] == ["0.14 ms", "0.30 ms"]
    assert cells["Sparsity"] == ["0.5", "0.3"]
    assert cells["Layer bits"] == ["—", "fc=32"]
    assert "Pruner" not in cells and "Seed" not in cells
    assert comparison.best_in("Accuracy", [entry, other]) == {other.job_id}
    assert comparison.best_in("Batch 1, p50", [entry, other]) == {entry.job_id}
    assert comparison.best_in("File", [entry, other]) == set(), "equal figures have no best"
    elsewhere = replace(other, machine="another")
    assert comparison.best_in("Batch 1, p50", [entry, elsewhere]) == set(), "times of two machines are not compared"


def test_the_view_escapes_marks_the_best_and_warns(entry: Entry) -> None:
    other = made(entry, "b", 0.95, 0.3, images="other images", machine="other machine")
    shown = view_compare.side_by_side([entry, other])
    assert "first &lt;run&gt;" in shown and "first <run>" not in shown
    assert "their accuracies cannot be compared" in shown and "their times cannot be compared" in shown
    assert 'class="best"' not in shown
    assert 'class="best"' in view_compare.side_by_side([entry, made(entry, "b", 0.95, 0.3)])
    assert "Tick two or more" in view_compare.side_by_side([])
    assert view_compare.points([entry, other]).count("<tr>") == 3


def test_the_chart_has_a_numbered_link_at_each_point_and_a_front_for_each_kind(entry: Entry) -> None:
    runs = [
        made(entry, "a", 0.90, 1.0),
        made(entry, "b", 0.91, 2.0),
        made(entry, "c", None, 2.0),
        made(entry, "d", 0.7, 3.0, machine="another"),
    ]
    figure = accuracy_against_latency(runs, {run.job_id: f"?job={run.job_id}" for run in runs})
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert [list(trace.x) for trace in points] == [[1.0, 2.0], [3.0]]
    lines = [list(trace.x) for trace in figure.data if trace.mode == "lines"]
    assert lines == [[1.0, 2.0]]
    assert [note.text for note in figure.layout.annotations] == [
        f'<a href="?job={name * 32}" target="_self" style="color:#1d5738">{number}</a>'
        for number, name in ((1, "a"), (2, "b"), (4, "d"))
    ]
    assert figure.layout.annotations[1].x == pytest.approx(math.log10(2.0))
    assert figure.layout.showlegend is True
    assert figure.data[1].error_y.array[0] == pytest.approx(100 * (0.919 - 0.90))
    assert len(fit_narrow(figure).layout.annotations) == 3
    assert accuracy_against_latency([runs[2]], {}) is None
