"""The sensitivity table: what it measures, that it goes on, and its page."""

import json
from dataclasses import replace

import pytest
import search_network

from compress.errors import RequestError, RunError, RuntimeUnavailableError, StorageError
from compress.pruning import Group
from compress.search import sensitivity
from compress.search.outcome import Outcome
from compress.search.pages import sensitivity_page

OUTCOME = Outcome(0.9, 2.0, 1000, 5000, 4000, 0.1, 1.9, 2.1, 100)


class Measured:
    """In place of OneShot: counts what is measured, and stops when told."""

    stops_after = 100

    def __init__(self, request, source, folder, *, scored_images, notify):
        self.groups = tuple(Group(names, 32, 16, "") for names in (("a", "a2"), ("b",)))
        self.dense, self.runtime = OUTCOME, type("R", (), {"name": "onnxruntime"})
        Measured.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def evaluate(self, candidate):
        if len(Measured.asked) == Measured.stops_after:
            raise KeyboardInterrupt
        Measured.asked.append(candidate)
        removed = sum(ratio for name, ratio in candidate.ratios if name in ("a", "b"))
        if candidate.layer_bits and dict(candidate.layer_bits).get("b"):
            raise RequestError("layer_bits", "b", "another layer")
        return replace(OUTCOME, accuracy=0.9 - 0.4 * removed, latency_ms=2 - removed)


@pytest.fixture
def request_of(tmp_path):
    return search_network.request(tmp_path)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(sensitivity, "OneShot", Measured)
    monkeypatch.setattr(Measured, "stops_after", 100)


def measure(request_of, folder, **options):
    return sensitivity.measure(request_of, folder, workload=object(), ratios=(0.25, 0.5), bits=(4,), **options)


def test_each_cell_changes_one_group_and_is_compared_with_the_unpruned_model(request_of, tmp_path):
    table = measure(request_of, tmp_path / "out")
    assert [(c["layers"], c["kind"], c["value"]) for c in table["cells"]] == [
        (["a", "a2"], "ratio", 0.25),
        (["a", "a2"], "ratio", 0.5),
        (["a", "a2"], "bits", 4),
        (["b"], "ratio", 0.25),
        (["b"], "ratio", 0.5),
        (["b"], "bits", 4),
    ]
    assert table["cells"][1]["points_lost"] == pytest.approx(20) and table["cells"][1]["percent_faster"] == 25
    assert [candidate.ratios for candidate in Measured.asked[1:3]] == [
        (("a", 0.25), ("a2", 0.25), ("b", 0.0)),
        (("a", 0.5), ("a2", 0.5), ("b", 0.0)),
    ]
    refused = table["cells"][5]
    assert refused["points_lost"] is None and refused["refused"].startswith("layer_bits: got 'b'")
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == table


def test_a_finished_cell_is_never_measured_again(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Measured, "stops_after", 3)
    with pytest.raises(KeyboardInterrupt):
        measure(request_of, tmp_path / "out")
    monkeypatch.setattr(Measured, "stops_after", 100)
    table = measure(request_of, tmp_path / "out")
    assert len(Measured.asked) == 7 - 3 and len(table["cells"]) == 6
    measure(request_of, tmp_path / "out")
    assert Measured.asked == []


@pytest.mark.parametrize("error", [StorageError, RuntimeUnavailableError])
def test_what_is_no_cells_doing_ends_the_measurement(error, request_of, tmp_path, monkeypatch):
    def fails(self, candidate):
        if any(ratio for _, ratio in candidate.ratios):
            raise error("Not now.")
        return OUTCOME

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Measured, "evaluate", fails)
        measure(request_of, tmp_path / "out")
    assert measure(request_of, tmp_path / "out")["cells"][0]["refused"] is None


def test_the_page_needs_no_network_and_has_the_numbers_as_tables(request_of, tmp_path):
    page = sensitivity_page(measure(request_of, tmp_path / "out"))
    assert "<td>20.0</td>" in page and "<td>25.0</td>" in page and "<td>—</td>" in page
    assert "custom: what each group of layers bears" in page
    assert "<script src" not in page and "<link" not in page


def test_what_cannot_be_measured_is_refused(request_of, tmp_path):
    with pytest.raises(RequestError, match="ratios: got 1.5, expected fractions strictly between 0 and 1"):
        sensitivity.measure(request_of, tmp_path / "out", ratios=(1.5,))
    floats = request_of.model_copy(update={"quantizer": "none"})
    with pytest.raises(RequestError, match="bits: got .4,., expected nothing, because nothing is quantized"):
        sensitivity.measure(floats, tmp_path / "out", bits=(4,))
    with pytest.raises(RequestError, match="bits: got 40, expected whole numbers from 2 to 8, or 32"):
        sensitivity.measure(request_of, tmp_path / "out", bits=(4, 40))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(RunError, match=r"is not empty \(it holds thesis.txt\)"):
        sensitivity.measure(request_of, tmp_path / "full")
