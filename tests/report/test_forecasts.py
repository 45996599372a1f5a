"""What a forecast says of a run, and what the report says came true."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import search_network

import compress
from compress.errors import RequestError, RunError
from compress.pruning import Group
from compress.report import Verdict
from compress.report.forecast import FILE, Front, Point, came_true, difference, keep
from compress.request import Request
from compress.search import front as fronts
from compress.search.outcome import Outcome

DENSE = Outcome(0.9, 10.0, 4000, 9000, 16000, 0.1, 9.0, 11.0, 1000)


def point(sparsity, lost, speedup, size):
    return Point(
        sparsity=sparsity, accuracy=0.9 - lost / 100, points_lost=lost, points_lost_low=lost - 1, points_lost_high=lost + 1,
        latency_ms=10 / speedup, speedup=speedup, speedup_low=speedup - 0.5, speedup_high=speedup + 0.5, file_bytes=size,
        parameters=1000, macs=5000,
    )  # fmt: skip


def front(**changes):
    request = Request(**({"model": "resnet18"} | changes)).model_dump(mode="json")
    points = (point(0.25, 1.0, 2.0, 8_000_000), point(0.75, 5.0, 6.0, 2_000_000))
    return Front(
        request=request, runtime="openvino", n_images=1000, dense_accuracy=0.9, dense_latency_ms=10.0, points=points
    )


def reached(points_lost=0.5, speedup=4.2, runtime="openvino"):
    return Verdict(
        text="", runtime=runtime, speedup_vs_fastest_fp32=speedup, size_ratio=4.0, accuracy_drop_points=points_lost
    )


def test_between_two_measured_sparsities_everything_is_linear():
    expected = front().at(Request(model="resnet18", sparsity=0.5, finetune_epochs=9))
    assert (expected.points_lost, expected.speedup, expected.file_bytes) == (3.0, 4.0, 5_000_000)
    assert (expected.points_lost_low, expected.points_lost_high) == (2.0, 4.0)
    assert front().at(Request(model="resnet18", sparsity=0.25)).points_lost == 1.0
    assert front().at(Request(model="resnet18", sparsity=0.75)).points_lost == 5.0


def test_a_forecast_of_something_else_is_refused_by_name():
    with pytest.raises(RequestError) as refused:
        front().at(Request(model="resnet18", weight_bits=4))
    assert str(refused.value) == "weight_bits: got 4, expected 8, as in the forecast, or no forecast."
    with pytest.raises(RequestError) as refused:
        front().at(Request(model="resnet18", sparsity=0.8))
    assert str(refused.value) == (
        "sparsity: got 0.8, expected a value from 0.25 to 0.75, which the forecast covers, or no forecast."
    )


@pytest.mark.parametrize("content", [None, "{}", "no json", b"\xff\xfe"])
def test_what_is_no_forecast_is_refused_with_where_to_get_one(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as refused:
        Front.from_file(path)
    assert str(refused.value) == (
        f"{path} is not a forecast. Give the {FILE} that `python -m compress forecast --out DIR` leaves in DIR."
    )


def test_the_interval_of_a_difference_is_newcombes():
    """His example (1998, table II, a): 56 of 70 against 48 of 80 gives 0.2, 0.0524 to 0.3339."""
    from compress.tasks import share

    first, second = share(56, 70), share(48, 80)
    found = difference((first.value, first.low, first.high), (second.value, second.low, second.high))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_the_report_says_what_came_true(tmp_path):
    assert came_true(tmp_path, reached(), 1) is None
    keep(front().at(Request(model="resnet18")), tmp_path)
    told = came_true(tmp_path, reached(), 5_100_000)
    assert told.text == (
        "Forecast before training: 3.0 points lost (2.0 to 4.0) on 1,000 held-out images, 4.0x faster (3.5 to 4.5) on "
        "openvino, 5.00 MB. After training: 0.5 points lost (less than forecast), 4.2x faster (as forecast), 5.10 MB."
    )
    other = came_true(tmp_path, reached(points_lost=None, speedup=5.0, runtime="onnxruntime"), 5_100_000)
    assert other.text.endswith("After training: 5.0x faster on onnxruntime (more than forecast), 5.10 MB.")
    not_run = came_true(tmp_path, reached(points_lost=4.5, speedup=None, runtime=None), 5_100_000)
    assert not_run.text.endswith("After training: 4.5 points lost (more than forecast), 5.10 MB.")


# ---- measuring -------------------------------------------------------------------------------------------------------


class Measured:
    """In place of OneShot: counts what is made, and stops when told."""

    stops_after = 100

    def __init__(self, request, source, folder, *, notify):
        self.groups = (Group(("a",), 32, 16, ""), Group(("b",), 64, 32, ""))
        self.dense, self.runtime = DENSE, type("R", (), {"name": "onnxruntime"})
        Measured.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def evaluate(self, candidate):
        if len(Measured.asked) == Measured.stops_after:
            raise KeyboardInterrupt
        Measured.asked.append(candidate)
        ratio = max(dict(candidate.ratios).values())
        return replace(DENSE, accuracy=0.9 - 0.1 * ratio, latency_ms=10 - 8 * ratio)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(fronts, "OneShot", Measured)
    monkeypatch.setattr(fronts, "open_workload", lambda request, model: object())
    return Measured


def test_every_group_loses_the_same_share_and_each_point_is_made_once(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(Measured, "stops_after", 1)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        fronts.measure(Request(), out, ratios=(0.5, 0.25))
    assert [one.ratios for one in Measured.asked] == [(("a", 0.25), ("b", 0.25))]
    assert not (out / fronts.PAGE).exists()
    monkeypatch.setattr(Measured, "stops_after", 100)
    found = fronts.measure(Request(), out, ratios=(0.5, 0.25))
    assert [one.ratios for one in Measured.asked] == [(("a", 0.5), ("b", 0.5))]
    assert [p.sparsity for p in found.points] == [0.25, 0.5] and found == Front.from_file(out / FILE)
    first = found.points[0]
    assert first.points_lost == pytest.approx(2.5) and first.points_lost_low < 2.5 < first.points_lost_high
    assert first.speedup == 10 / 8 and (first.speedup_low, first.speedup_high) == (10 / 11, 10 / 9)
    page = (out / fronts.PAGE).read_text()
    assert "50 % sparsity is 1.7x faster on onnxruntime and loses 5.0 points" in page and "2.5" in page


@pytest.mark.parametrize("ratios", [(), (0.0,), (0.5, 1.0), (float("nan"),)])
def test_ratios_out_of_range_are_refused_before_anything_is_made(tmp_path, ratios):
    with pytest.raises(RequestError, match="ratios: .* fractions strictly between 0 and 1, at least one"):
        fronts.measure(Request(), tmp_path / "out", ratios=ratios)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RunError, match="is not empty .it holds mine.txt."):
        fronts.measure(Request(), tmp_path)


# ---- from the forecast to the report ---------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.usefixtures("short_run")
def test_a_forecast_run_tells_in_its_report_what_came_true(tmp_path):
    folder = search_network.images(tmp_path / "images")
    request, model = search_network.request(folder), search_network.trained(folder)
    looked = fronts.measure(request, tmp_path / "looks", model=model, ratios=(0.5, 0.75))
    asked = request.model_copy(update={"sparsity": 0.5, "qat_epochs": 0})
    report = compress.run(asked, model=model, out=tmp_path / "run", forecast=tmp_path / "looks" / FILE)
    assert report.forecast.expected.points_lost == looked.points[0].points_lost
    assert report.forecast.came.speedup == report.verdict.speedup_vs_fastest_fp32
    assert report.forecast.came.file_bytes == min(report.variants[-1].file_bytes.values())
    assert abs(report.forecast.came.file_bytes / report.forecast.expected.file_bytes - 1) < 0.2
    assert report.forecast.text in (tmp_path / "run" / "report.html").read_text()
    listed = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert FILE in json.dumps(listed)


def test_a_forecast_that_does_not_fit_stops_the_run_before_its_folder_is_made(tmp_path):
    path = tmp_path / FILE
    path.write_text(front(weight_bits=4).model_dump_json())
    with pytest.raises(RequestError, match="weight_bits"):
        compress.run(Request(model="resnet18"), out=tmp_path / "run", forecast=Path(path))
    assert not (tmp_path / "run").exists()
