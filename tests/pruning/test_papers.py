"""Charts, card, HTML report and verdict: all read one report, and say what it says."""

import plotly.graph_objects as go
import pytest
from example_report import example_report

from compress.report import Report, card, charts
from compress.report.tables import tables
from compress.search import pages
from compress.stages.report import verdict

KEYS = {"size", "latency", "mixed", "accuracy", "sqnr", "channels", "training"}


@pytest.fixture(scope="module")
def report() -> Report:
    return example_report()


def test_every_chart_has_a_table_of_its_numbers(report):
    assert set(charts.figures(report)) == KEYS
    found = tables(report)
    assert set(found) == KEYS | {"summary"}
    for headers, rows in found.values():
        assert rows and all(len(row) == len(headers) for row in rows)


def test_charts_follow_the_page_and_show_every_variant(report):
    light, dark = charts.figures(report), charts.figures(report, dark=True)
    for key in KEYS:
        assert light[key].layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert light[key].layout.font.color != dark[key].layout.font.color
    bars = light["size"].data[0]
    assert list(bars.x) == [variant.name for variant in report.variants]
    assert list(bars.y) == [variant.parameters / 1e6 for variant in report.variants]


def test_json_round_trip_is_exact(report, tmp_path):
    (tmp_path / "report.json").write_text(report.to_json())
    assert Report.from_file(tmp_path / "report.json") == report


def test_names_are_escaped_in_the_html_report(report):
    hostile = report.model_copy(update={"architecture": "<img src=x onerror=alert(1)>"})
    text = card.html_report(hostile)
    assert "<img src=x" not in text and "&lt;img src=x" in text


HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def everywhere(value, added):
    """The same JSON, with `added` behind every text and name."""
    if isinstance(value, dict):
        return {f"{key}{added}" if "." in key else key: everywhere(item, added) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, added) for item in value]
    return f"{value}{added}" if isinstance(value, str) else value


def hostile_report(report):
    values = everywhere(report.model_dump(mode="json") | {"request": {}}, HOSTILE)
    asked = report.request | {
        "data": f"{HOSTILE}.zip",
        "checkpoint": f"{HOSTILE}.pth",
        "layer_sparsity": {HOSTILE: 0.5},
    }
    return Report.model_validate(values | {"request": asked})


def test_no_text_of_a_report_becomes_part_of_its_page(report):
    text = card.html_report(hostile_report(report))
    assert text.count("&lt;img src=x") > 50, "it is there as text"
    assert "<img src=x" not in text and "<script>alert" not in text


def test_no_text_of_a_report_becomes_part_of_its_card(report):
    text = card.model_card(hostile_report(report))
    outside = "".join(text.split("```")[::2])
    assert outside.count("&lt;img src=x") > 20 and "<img" not in outside and "<script" not in outside
    note = report.model_copy(update={"notes": ("see [this](https://example.org) `x`",)})
    assert "- see &#91;this](https://example.org) &#96;x&#96;" in card.model_card(note)
    fence = report.model_copy(update={"request": report.request | {"data": "a```\n<img src=x>"}})
    assert card.model_card(fence).count("```") == card.model_card(report).count("```")


def test_no_text_of_a_search_becomes_part_of_its_page():
    table = ((f"Group{HOSTILE}",), [(HOSTILE,)])
    figure = charts.dress(go.Figure(go.Bar(x=[HOSTILE], y=[1], text=HOSTILE), layout_title=HOSTILE), False)
    text = pages.page(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE, lambda dark: figure, table)])
    assert text.count("&lt;img src=x") >= 8 and "<img src=x" not in text and "<script>alert" not in text


def test_the_command_makes_the_same_request(report):
    request = {
        **report.request,
        "sparsity": 0.25,
        "exclude": ["layer1", "fc"],
        "augment": True,
        "mean": [0.1, 0.2, 0.3],
    }
    words = card.shell_command(request)
    assert words.startswith("python -m compress run --model resnet18 --data fashion-mnist")
    for part in ("--sparsity 0.25", "--exclude layer1 --exclude fc", "--augment", "--mean 0.1,0.2,0.3"):
        assert part in words


def test_the_verdict_is_against_the_fastest_fp32_and_of_the_chosen_runtime(report):
    dense = [m for m in report.measurements if m.variant == "baseline" and m.batch_size == 1 and m.precision == "fp32"]
    last = report.variants[-1].name
    runtime = next(m.runtime for m in report.measurements if m.variant == last and m.batch_size == 1)
    found = verdict(report.variants, report.measurements, runtime, "labelled")
    own = min(m.p50_ms for m in report.measurements if m.variant == last and m.batch_size == 1 and m.runtime == runtime)
    assert found.speedup_vs_fastest_fp32 == pytest.approx(min(m.p50_ms for m in dense) / own)
    assert found.runtime == runtime and "smaller" in found.text and "test images" in found.text


def test_a_slower_result_and_an_engine_that_did_not_run_are_said_plainly(report):
    last = report.variants[-1].name
    slow = tuple(m.model_copy(update={"p50_ms": 1000.0}) if m.variant == last else m for m in report.measurements)
    runtime = next(m.runtime for m in report.measurements if m.variant == last)
    assert "SLOWER" in verdict(report.variants, slow, runtime, "labelled").text
    not_run = verdict(report.variants, report.measurements, None, "labelled")
    assert not_run.speedup_vs_fastest_fp32 is None and "built, not run" in not_run.text
