"""The target search: what it trains, what it claims, and that it goes on after kill -9. Measuring is stood in for."""

import json
import multiprocessing
import time
from dataclasses import replace

import pytest
import search_network
from example_report import example_report

from compress.errors import (
    DataError,
    HandoffError,
    PruningError,
    RequestError,
    RunError,
    RuntimeUnavailableError,
    StorageError,
)
from compress.pruning import Group
from compress.request import Request
from compress.search import pages, target_search, trials
from compress.search.candidate import Candidate
from compress.search.outcome import Outcome
from compress.search.target import Target
from compress.search.target_search import Settings
from compress.search.trials import Trials

DENSE = Outcome(0.9, 1.0, 1000, 5000, 4_000_000, 0.0, 0.9, 1.1, 100)
GROUPS = tuple(Group((name,), 64, 32, "") for name in ("a", "b"))
"""Of the first, each channel costs ten times as much accuracy as of the second."""


class Measured:
    """In place of OneShot: a model whose time goes with its channels."""

    delay_s = 0.0

    def __init__(self, request, source, folder, *, notify):
        self.groups, self.dense, self.runtime = GROUPS, DENSE, type("R", (), {"name": "onnxruntime"})
        self.log = folder / "asked.txt"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def sensitive_layers(self, wide_bits):
        return ("fc",)

    def evaluate(self, candidate, hopeless):
        with self.log.open("a") as file:
            file.write(f"{candidate}\n")
        time.sleep(self.delay_s)
        ratios = dict(candidate.ratios)
        if ratios["a"] > 0.85:
            raise PruningError("Too much of a.")
        latency = 1 - 0.5 * ratios["a"] - 0.5 * ratios["b"]
        stopped = hopeless(latency, 1_000_000)
        accuracy = 0.9 - 0.4 * ratios["a"] - 0.04 * ratios["b"]
        return replace(
            DENSE, accuracy=0.0 if stopped else accuracy, latency_ms=latency, stopped=stopped, file_bytes=1_000_000
        )


class Runs:
    """In place of compress.run: reports with the figures that a test wants, or errors, one after the other."""

    def __init__(self, *figures):
        self.figures, self.requests = list(figures), []

    def __call__(self, request, *, model, out, resume):
        self.requests.append(request)
        figures = self.figures[len(self.requests) - 1]
        if isinstance(figures, Exception):
            raise figures
        drop, speedup = figures
        report = example_report()
        verdict = report.verdict.model_copy(update={"accuracy_drop_points": drop, "speedup_vs_fastest_fp32": speedup})
        report = report.model_copy(update={"verdict": verdict})
        out.mkdir(parents=True)
        (out / "report.json").write_text(report.to_json())
        (out / "manifest.json").write_text("{}")
        return report


@pytest.fixture
def request_of(tmp_path):
    return search_network.request(tmp_path)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(target_search, "OneShot", Measured)
    monkeypatch.setattr(target_search, "open_workload", lambda *_: None)


def search(request_of, folder, runs, monkeypatch, **options):
    monkeypatch.setattr(target_search.pipeline, "run", runs)
    target = options.pop("target", Target(1.0, min_speedup=1.5))
    return target_search.search(request_of, Settings(target, **{"strategy": "random", "trials": 12} | options), folder)


def best(found):
    fits = [t for t in found["trials"] if t["outcome"] and t["outcome"]["latency_ms"] <= 1 / 1.5]
    return max(fits, key=lambda t: t["outcome"]["accuracy"])


def test_the_best_candidate_that_keeps_to_the_limits_is_trained(request_of, tmp_path, monkeypatch):
    runs = Runs((0.4, 1.6))
    found = search(request_of, tmp_path / "out", runs, monkeypatch)
    assert found["winner"] == best(found)["number"] and len(found["trials"]) == 12
    assert runs.requests[0].layer_sparsity == best(found)["candidate"]["ratios"]
    assert found["text"].startswith(f"The target is reached by the run of trial {found['winner']}: ")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found
    page = (tmp_path / "out" / "search.html").read_text()
    assert "reaches the target" in page and f"runs/trial-{found['winner']:05d}" in page


def test_the_front_has_what_nothing_is_both_faster_and_more_accurate_than():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.6), (4.0, 0.9), (3.0, 0.7)]
    outcomes = [{"latency_ms": ms, "accuracy": accuracy} for ms, accuracy in points]
    assert pages.pareto(outcomes) == [outcomes[1], outcomes[3], outcomes[0]]
    assert pages.pareto([]) == []
    scored = [{"number": number, "outcome": outcome} for number, outcome in enumerate(outcomes, start=1)]
    runs = [
        {"trial": 2, "folder": "runs/2", "latency_ms": 2.1, "accuracy_drop_points": 0.4},
        {"trial": 3, "folder": "runs/3", "latency_ms": None, "accuracy_drop_points": None},
    ]
    figure = pages._front(scored, runs, {"latency_ms": 5.0, "accuracy": 0.95}, dark=False)
    line, candidates, dense, trained = figure.data
    assert (line.name, line.mode, line.line.shape) == ("front of the candidates", "lines", "hv")
    assert (list(line.x), list(line.y)) == ([1.0, 2.0, 3.0], pytest.approx([45.0, 35.0, 5.0]))
    assert len(candidates.x) == 6 and (dense.x, dense.y) == ((5.0,), (0.0,))
    assert (trained.x, trained.y) == ((2.1,), (0.4,)) and figure.layout.yaxis.autorange == "reversed"


def test_a_miss_is_told_and_the_next_candidate_tried(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((2.5, 1.6), (0.9, 1.7)), monkeypatch)
    assert [row["missed"] for row in found["runs"]] == [["2.5 points of accuracy lost, at most 1 asked for"], []]
    assert found["winner"] == found["runs"][1]["trial"] != found["runs"][0]["trial"]
    judged = (
        f"The target is reached by the run of trial {found['winner']}, number 2 of the runs judged on the same test im"
    )
    assert found["text"].startswith(judged)


def test_a_run_that_comes_out_slower_takes_candidates_along_that_would_miss_as_well(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((0.1, 1.2), (0.1, 1.6)), monkeypatch)
    assert found["runs"][0]["missed"] == ["1.2 times faster, at least 1.5 asked for"]
    by_number = {t["number"]: t["outcome"]["latency_ms"] for t in found["trials"] if t["outcome"]}
    first, second = (by_number[row["trial"]] for row in found["runs"])
    assert second <= (1 / 1.5) * first / (1 / 1.2)


def test_a_run_that_fails_says_why_and_the_next_candidate_is_tried(request_of, tmp_path, monkeypatch):
    runs = Runs(HandoffError("The file answers differently."), (0.4, 1.6))
    found = search(request_of, tmp_path / "out", runs, monkeypatch)
    failed, reached = found["runs"]
    assert failed["missed"] == ["The file answers differently."] and failed["accuracy"] is None
    assert found["winner"] == reached["trial"] != failed["trial"]
    assert "The file answers differently." in (tmp_path / "out" / "search.html").read_text()
    with pytest.raises(StorageError, match="full"):
        search(request_of, tmp_path / "full", Runs(StorageError("The disk is full.")), monkeypatch)


def test_nothing_is_claimed_when_no_run_reaches_the_target(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((2.0, 1.6), (3.0, 1.6)), monkeypatch, tries=2)
    assert found["winner"] is None and len(found["runs"]) == 2
    assert found["text"].startswith("The target is not reached by any of 2 trained candidates. Trial ")
    assert found["text"].endswith(" points of accuracy lost, at most 1 asked for. Allow more tries, or ask for less.")


def test_the_text_says_when_candidates_run_out_before_the_tries(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((0.1, 0.01)), monkeypatch)
    assert found["text"].startswith("The target is not reached by the one trained candidate. Trial ")
    assert found["text"].endswith(
        "No other candidate is expected to keep to the limits. Allow more trials, or ask for less."
    )


def test_the_text_says_when_no_candidate_could_be_made(request_of, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise PruningError("Too much of everything.")

    monkeypatch.setattr(Measured, "evaluate", refuses)
    text = search(request_of, tmp_path / "out", Runs(), monkeypatch, trials=3)["text"]
    assert text == (
        "The target is not reached: none of 3 candidates could be made. The first one: Too much of everything."
    )


def test_a_figure_that_just_misses_does_not_read_like_its_limit():
    assert [target_search._told(value, 1) for value in (1.004, 1.00004, 2.5)] == ["1.004", "1.00004", "2.5"]


def test_nothing_is_trained_when_no_candidate_keeps_to_the_limits(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs(), monkeypatch, target=Target(1.0, min_speedup=50))
    measured = [t for t in found["trials"] if t["outcome"] and not t["repeats"]]
    assert found["runs"] == [] and f"none of {len(measured)} candidates that were measured keeps to" in found["text"]
    assert found["text"].endswith("Allow more trials, or ask for less.")
    assert all(t["outcome"]["stopped"].startswith("misses a limit by") for t in found["trials"] if t["outcome"])


@pytest.mark.parametrize(("bits", "wide"), [(8, "32"), (4, "8/8")])
def test_a_widened_layer_gets_wider_weights_and_activations(bits, wide, request_of, tmp_path, monkeypatch):
    narrow = Request(**(request_of.model_dump() | {"weight_bits": bits, "activation_bits": bits}))
    found = search(narrow, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch)
    widened = [t["candidate"]["layer_bits"] for t in found["trials"] if t["candidate"]["layer_bits"]]
    assert widened and all(one == {"fc": wide} for one in widened)


@pytest.mark.parametrize(("strategy", "scored"), [("random", False), ("auto-compress", True)])
def test_a_strategy_that_learns_beyond_the_limits_sees_accuracy_there(
    strategy, scored, request_of, tmp_path, monkeypatch
):
    found = search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch, strategy=strategy)
    beyond = [t["outcome"] for t in found["trials"] if t["outcome"] and t["outcome"]["latency_ms"] > 1.15 / 1.5]
    assert beyond and all((outcome["stopped"] is None) is scored for outcome in beyond)


def test_what_was_not_measured_is_missed(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((None, 1.6)), monkeypatch, tries=1)
    assert found["runs"][0]["missed"] == ["points of accuracy lost not measured, at most 1 asked for"]


def test_a_candidate_that_cannot_be_made_is_a_trial_that_says_why(request_of, tmp_path, monkeypatch):
    found = search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch, trials=40)
    refused = [t for t in found["trials"] if t["refused"]]
    assert refused and {t["refused"] for t in refused} == {"Too much of a."}


@pytest.mark.parametrize("error", [StorageError, RuntimeUnavailableError])
def test_what_is_no_candidates_doing_ends_the_search_and_is_not_recorded(error, request_of, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error("Not now.")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Measured, "evaluate", fails)
        search(request_of, tmp_path / "out", Runs(), monkeypatch)
    assert Trials(tmp_path / "out").all == []
    assert len(search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch)["trials"]) == 12


def test_minutes_are_spent_on_candidates_that_cannot_be_made_too(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(trials.time, "perf_counter", lambda: next(clock))
    found = Trials(tmp_path)

    def refuses(candidate):
        raise PruningError("Too much of a.")

    settings = Settings(Target(min_speedup=2), max_minutes=0.5)
    for ratio, spent in ((0.1, False), (0.1, False), (0.2, True)):
        found.measure(Candidate((("a", ratio),)), refuses)
        assert target_search._spent(settings, found) is spent
    assert [trial.seconds for trial in Trials(tmp_path).all] == [20, 0, 20]
    assert [trial.repeats for trial in found.all] == [None, 1, None]


def test_nothing_new_ends_the_trials(tmp_path):
    found = Trials(tmp_path)
    for _ in range(11):
        assert not target_search._stale(found)
        found.measure(Candidate((("a", 0.1),)), lambda _: DENSE)
    assert target_search._stale(found) and len(found.all) == 11


def in_a_process(request, strategy, folder, delay_s=0.0):
    """A search of 14 trials, none of which keeps to the limits; each takes `delay_s` longer."""
    settings = Settings(Target(1.0, min_speedup=50.0), strategy, trials=14)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: [setattr(Measured, "delay_s", delay_s), target_search.search(request, settings, folder)]
    )
    process.start()
    return process


@pytest.mark.parametrize("strategy", ["tpe", "random", "uniform"])
def test_a_killed_search_goes_on_without_repeating_finished_trials(strategy, request_of, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = in_a_process(request_of, strategy, whole)
    victim = in_a_process(request_of, strategy, broken, delay_s=0.3)
    try:
        deadline = time.monotonic() + 90
        while len(list(broken.glob("trials/[0-9]*.json"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        victim.kill()
        victim.join()
    finished = len(Trials(broken).all)
    assert 4 <= finished < 14
    before = (broken / "asked.txt").read_text().splitlines()
    resumed = in_a_process(request_of, strategy, broken)
    for process in (undisturbed, resumed):
        process.join(120)
        assert process.exitcode == 0
    expected = [trial.candidate for trial in Trials(whole).all]
    assert [trial.candidate for trial in Trials(broken).all] == expected and len(expected) == 14
    again = (broken / "asked.txt").read_text().splitlines()[len(before) :]
    assert not set(again) & {str(trial.candidate) for trial in Trials(broken).all[:finished]}


def test_a_finished_search_measures_and_trains_nothing_again(request_of, tmp_path, monkeypatch):
    first = search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch)
    monkeypatch.setattr(Measured, "evaluate", lambda *_: pytest.fail("measured again"))
    assert search(request_of, tmp_path / "out", Runs(), monkeypatch) == first


def test_folders_of_others_are_refused(request_of, tmp_path, monkeypatch):
    search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch)
    with pytest.raises(RunError, match="holds another search. Choose another folder, or go on with the same options"):
        search(request_of, tmp_path / "out", Runs(), monkeypatch, trials=13)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(RunError, match=r"is not empty \(it holds thesis.txt\)"):
        search(request_of, tmp_path / "full", Runs(), monkeypatch)


def test_a_search_that_could_not_start_leaves_the_folder_to_a_corrected_one(request_of, tmp_path, monkeypatch):
    def no_images(*_, **__):
        raise DataError("There are no images.")

    out = tmp_path / "out"
    out.mkdir()
    (out / ".partial-search.json").touch()
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(target_search, "open_workload", no_images)
        search(request_of, out, Runs(), monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(target_search, "OneShot", no_images)
        search(request_of, out, Runs(), monkeypatch)
    with pytest.raises(RequestError, match="needs no training of its own"):
        search(request_of.model_copy(update={"pruner": "level"}), out, Runs(), monkeypatch)
    assert search(request_of, out, Runs((0.4, 1.6)), monkeypatch, trials=5)["runs"]


def test_a_damaged_or_missing_trial_is_told(request_of, tmp_path, monkeypatch):
    search(request_of, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch)
    record = tmp_path / "out" / "trials" / "00002.json"
    record.write_text("{")
    with pytest.raises(StorageError, match="00002.json is damaged .* Restore it, or search in a new folder"):
        Trials(tmp_path / "out")
    record.unlink()
    with pytest.raises(StorageError, match="lacks trial 2. Restore it, or search in a new folder"):
        Trials(tmp_path / "out")


def test_settings_out_of_range_are_refused():
    target = Target(min_speedup=2)
    with pytest.raises(RequestError, match="strategy: got 'luck', expected one of tpe, uniform, random"):
        Settings(target, "luck")
    with pytest.raises(RequestError, match="trials: got 0, expected a whole number from 1 up"):
        Settings(target, trials=0)
    with pytest.raises(RequestError, match="max_minutes: got 0, expected a number above 0"):
        Settings(target, max_minutes=0)


@pytest.mark.parametrize("strategy", ["simulated-annealing", "auto-compress", "amc"])
def test_a_strategy_of_ratios_alone_refuses_other_choices(strategy):
    target = Target(min_speedup=2)
    with pytest.raises(
        RequestError, match=rf"pruners: got \('fpgm',\), expected none with {strategy}, which chooses rat"
    ):
        Settings(target, strategy, pruners=("fpgm",))
    with pytest.raises(RequestError, match="these strategies choose: tpe, uniform, random"):
        Settings(target, strategy, quantizers=("lsq",))


def test_a_quantizer_that_does_not_exist_is_refused_before_anything_starts(request_of, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="quantizer: got 'qatt'"):
        search(request_of, tmp_path / "out", Runs(), monkeypatch, quantizers=("qatt",))
    assert not (tmp_path / "out").exists()
    bits = Request(**(request_of.model_dump() | {"layer_bits": {"fc": "4"}}))
    assert search(bits, tmp_path / "out", Runs((0.4, 1.6)), monkeypatch, quantizers=("none",))["winner"]
