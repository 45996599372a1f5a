"""Candidates made without training, on a network of three groups."""

import json
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import search_network
import torch
from torch import nn

from compress.errors import EngineError, HandoffError, RequestError, RunError
from compress.request import Request
from compress.search import evaluate as oneshots
from compress.search import latency
from compress.search.candidate import Candidate
from compress.search.evaluate import OneShot
from compress.search.problem import Problem
from compress.search.space import Space
from compress.search.strategies import STRATEGIES
from compress.search.target import Target
from compress.stages import steps
from compress.workload import open_workload

pytestmark = pytest.mark.integration

NAMES = ("0", "3", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return search_network.images(tmp_path_factory.mktemp("search") / "images")


@pytest.fixture(scope="module")
def base(folder):
    return search_network.request(folder)


@pytest.fixture(scope="module")
def source(folder, base):
    return open_workload(base, search_network.trained(folder))


@pytest.fixture(scope="module")
def oneshot(base, source, tmp_path_factory):
    with OneShot(base, source, tmp_path_factory.mktemp("measured")) as found:
        yield found


def candidate(*ratios, **others):
    return Candidate(tuple(zip(NAMES, ratios, strict=True)), **others)


# ---- a candidate as a request ----------------------------------------------------------------------------------------


def test_a_candidate_asks_for_its_ratios_and_bits():
    base = Request(layer_sparsity={"fc": 0.0}, layer_bits={"layer4": "8"}, max_quantization_loss=1)
    asked = Candidate((("b", 0.25), ("a", 0.5)), (("conv1", "32"),), "fpgm", "ptq").request(base)
    assert asked.layer_sparsity == {"fc": 0.0, "a": 0.5, "b": 0.25}
    assert asked.layer_bits == {"layer4": "8", "conv1": "32"}
    assert (asked.pruner, asked.quantizer, asked.max_quantization_loss) == ("fpgm", "ptq", 1)
    assert Candidate((("b", 0.25), ("a", 0.5))) == Candidate((("a", 0.5), ("b", 0.25)))


def test_a_candidate_without_a_quantizer_has_no_bits_to_choose():
    base = Request(layer_bits={"layer4": "4"}, max_quantization_loss=1)
    asked = Candidate((("a", 0.5),), (("conv1", "32"),), quantizer="none").request(base)
    assert (asked.quantizer, asked.layer_bits, asked.max_quantization_loss) == ("none", {}, None)
    listed = Request(quantization_config_list=[{"op_types": ["Conv2d"], "quant_bits": 8, "quant_types": ["weight"]}])
    assert Candidate((("a", 0.5),), quantizer="none").request(listed).quantization_config_list is None


def test_a_candidate_that_removes_nothing_asks_for_no_pruner():
    asked = Candidate((("a", 0.0),)).request(Request(layer_sparsity={"fc": 0.0}, exclude=("fc",)))
    assert (asked.pruner, asked.layer_sparsity, asked.exclude) == ("none", {}, ())


def test_a_candidate_comes_back_from_json():
    one = Candidate((("a", 0.5),), (("conv1", "32"),), "fpgm", None)
    assert Candidate.from_dict(json.loads(json.dumps(one.as_dict()))) == one


def test_what_a_candidate_keeps_whole_stays_whole_around_a_grouped_convolution(base):
    layers = [nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=8), nn.Conv2d(32, 32, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)).eval()
    source = open_workload(base, model)
    space = Space(oneshots.variable_groups(base, source), 8)
    assert [group.layers for group in space.groups] == [("0", "1"), ("2",)]
    asked = space.candidate({"2": 0.5}).request(base)
    assert steps.usable_plan(asked, source).layers.keys() == {"2"}
    both = steps.usable_plan(space.candidate({"0": 0.5}).request(base), source)
    assert {layer: group.channels_after for layer, group in both.layers.items()} == {"0": 16, "1": 16}


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_what_can_be_varied_is_what_the_base_request_does_not_name(base, source):
    assert [group.layers for group in oneshots.variable_groups(base, source)] == [("0",), ("3",), ("5",)]
    fixed = base.model_copy(update={"layer_sparsity": {"3": 0.0}})
    assert [group.layers for group in oneshots.variable_groups(fixed, source)] == [("0",), ("5",)]


def test_a_candidate_is_as_small_as_it_asks(oneshot):
    found = oneshot.evaluate(candidate(0.5, 0.5, 0.75))
    layers = (3 * 8 * 9 + 8) + 2 * 8 + (8 * 8 * 9 + 8) + (8 * 8 * 9 + 8) + (8 * 2 + 2)
    assert found.parameters == layers
    assert found.file_bytes < oneshot.dense.file_bytes and found.stopped is None
    assert found.n_images == 19 and found.accuracy > 0.8
    assert found.latency_low_ms <= found.latency_ms <= found.latency_high_ms


def test_images_that_score_are_neither_refitted_nor_calibrated_on(oneshot, monkeypatch):
    refitted, refit = [], oneshots.steps.refit
    monkeypatch.setattr(oneshots.steps, "refit", lambda *given: refitted.append(given[1]) or refit(*given))
    oneshot.evaluate(candidate(0.5, 0.5, 0.75))
    (source,) = refitted
    pixels, scored = (part.take(torch.arange(len(part))) for part in (source.dataset.train, oneshot._held_out))
    assert (len(pixels), len(scored)) == (77, 19)
    assert not {image.numpy().tobytes() for image in pixels} & {image.numpy().tobytes() for image in scored}
    seen = {image.numpy().tobytes() for image in oneshot._calibration}
    assert not seen & {image.numpy().tobytes() for batch, _ in oneshot._scored() for image in batch}


def test_scoring_holds_one_batch_of_images_at_a_time(oneshot, source, monkeypatch):
    alive, batches = [], oneshots.iter_batches

    def watched(*given, **options):
        for images, labels in batches(*given, **options):
            assert sum(batch() is not None for batch in alive) <= 1
            alive.append(weakref.ref(images))
            yield images, labels

    monkeypatch.setattr(oneshots, "iter_batches", watched)
    monkeypatch.setattr(oneshots.steps, "TEST_BATCH", 4)
    assert oneshot._score(source.model)[1] == 19 and len(alive) == 5


def test_fewer_images_calibrate_when_they_are_large(oneshot, source, monkeypatch):
    monkeypatch.setattr(oneshots.steps, "MOST_PIXELS", 5 * search_network.SIZE**2)
    with OneShot(oneshot.base, source, oneshot.folder) as later:
        assert len(later._calibration) == 5


def test_nothing_removed_is_the_dense_structure(oneshot):
    whole = oneshot.evaluate(candidate(0.0, 0.0, 0.0))
    assert whole.parameters == oneshot.dense.parameters
    assert oneshot.evaluate(candidate(0.05, 0.05, 0.05)).latency_ms == whole.latency_ms


def test_a_structure_is_timed_once_also_by_a_later_attempt(oneshot, source, monkeypatch):
    first = oneshot.evaluate(candidate(0.5, 0.0, 0.0))
    monkeypatch.setattr(latency.benchmark, "race", lambda *_: pytest.fail("timed again"))
    with OneShot(oneshot.base, source, oneshot.folder) as later:
        assert later.dense == oneshot.dense and later.runtime is oneshot.runtime
        assert later.evaluate(candidate(0.5, 0.0, 0.0)).latency_ms == first.latency_ms


def test_other_bits_are_another_structure(oneshot):
    before = len(oneshot._stopwatch._kept["structures"])
    narrow = oneshot.evaluate(candidate(0.5, 0.5, 0.5))
    wide = oneshot.evaluate(candidate(0.5, 0.5, 0.5, layer_bits=(("5", "32"),)))
    assert len(oneshot._stopwatch._kept["structures"]) == before + 2
    assert wide.file_bytes > narrow.file_bytes


def test_a_hopeless_candidate_is_not_scored(oneshot, monkeypatch):
    monkeypatch.setattr(oneshots.steps, "refit", lambda *_: pytest.fail("refitted"))
    asked = []
    found = oneshot.evaluate(candidate(0.5, 0.5, 0.0), lambda ms, size: asked.append((ms, size)) or "too slow")
    assert (found.stopped, found.accuracy, found.n_images) == ("too slow", 0.0, 0)
    assert asked == [(found.latency_ms, found.file_bytes)]


def test_measurements_of_another_request_are_refused(oneshot, source):
    other = oneshot.base.model_copy(update={"seed": 1})
    told = "holds measurements of another request or command. Choose another folder"
    with pytest.raises(RunError, match=told):
        OneShot(other, source, oneshot.folder)
    with pytest.raises(RunError, match=told):
        OneShot(oneshot.base, source, oneshot.folder, scored_images=7)


def test_measurements_of_another_machine_or_of_a_runtime_that_is_gone_are_refused(oneshot, source, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"another machine \(.*; this one is Z80\)"):
        patch.setattr(latency.machine, "describe", lambda _: SimpleNamespace(cpu="Z80"))
        OneShot(oneshot.base, source, oneshot.folder)
    reference = oneshot._stopwatch._kept["reference"]
    monkeypatch.setitem(latency.RUNTIMES, reference, SimpleNamespace(runs_here=False))
    auto = oneshot.base.model_copy(update={"runtime": "auto"})
    (oneshot.folder / "auto").mkdir(exist_ok=True)
    kept = oneshot._stopwatch._kept | {"request": auto.model_dump(mode="json"), "structures": {}}
    (oneshot.folder / "auto" / "measured.json").write_text(json.dumps(kept))
    with pytest.raises(RunError, match=f"holds times of {reference}, which does not run here any more. Install it"):
        OneShot(auto, source, oneshot.folder / "auto")


def test_a_runtime_that_refuses_the_file_is_left_out_unless_it_is_asked_for(oneshot, monkeypatch):
    said = []
    monkeypatch.setattr(oneshot._stopwatch, "_notify", said.append)

    def load(runtime):
        if runtime.name == "picky":
            raise HandoffError("An operator is missing.")
        return nullcontext(runtime.name)

    here = {name: SimpleNamespace(name=name, title=name.title()) for name in ("picky", "other")}
    with ExitStack() as stack:
        assert oneshot._stopwatch._sessions(stack, here, load) == {"other": "other"}
        assert said == ["without Picky: An operator is missing."]
        with pytest.raises(HandoffError, match="An operator is missing"):
            oneshot._stopwatch._sessions(stack, {"picky": here["picky"]}, load)
        monkeypatch.setattr(oneshot._stopwatch, "base", oneshot.base.model_copy(update={"runtime": "picky"}))
        with pytest.raises(HandoffError, match="An operator is missing"):
            oneshot._stopwatch._sessions(stack, here, load)


def test_a_runtime_that_fails_in_the_race_is_left_out_unless_it_is_asked_for(oneshot, monkeypatch):
    said = []
    monkeypatch.setattr(oneshot._stopwatch, "_notify", said.append)

    def race(sessions):
        if "crashing" in sessions:
            raise EngineError("openvino", "OpenVINO ended by signal 11 (SIGSEGV) while it was timed.")
        return [f"time of {session}" for session in sessions]

    monkeypatch.setattr(oneshot._stopwatch, "_race", race)
    sessions = {"openvino": "crashing", "onnxruntime": "sound"}
    assert oneshot._stopwatch._timings(sessions) == {"onnxruntime": "time of sound"}
    assert said == [
        "without OpenVINO: OpenVINO ended by signal 11 (SIGSEGV) while it was timed. Choose another runtime."
    ]
    with pytest.raises(EngineError, match="signal 11"):
        oneshot._stopwatch._timings({"openvino": "crashing"})
    monkeypatch.setattr(oneshot._stopwatch, "base", oneshot.base.model_copy(update={"runtime": "openvino"}))
    with pytest.raises(EngineError, match="signal 11"):
        oneshot._stopwatch._timings(sessions)


def test_a_reference_whose_process_is_gone_is_loaded_again(oneshot):
    before = oneshot._stopwatch._reference
    before._process.end()
    found = oneshot.evaluate(candidate(0.25, 0.25, 0.25))
    assert found.latency_ms > 0 and oneshot._stopwatch._reference is not before


@pytest.mark.parametrize("pruner", ["level", "none", "agp"])
def test_pruners_that_shrink_nothing_or_train_are_refused(base, source, pruner):
    with pytest.raises(RequestError, match="needs no training of its own: l1-norm, l2-norm, fpgm, taylor"):
        OneShot(base.model_copy(update={"pruner": pruner}), source)


def test_the_layer_that_bears_few_bits_worst_comes_first(oneshot, source):
    quantized = oneshot._quantized(oneshot.base, source.model)
    decibels = oneshots.quantization.layer_sensitivity(quantized, oneshot._calibration)
    assert set(decibels) == {"0", "3", "5", "9"}
    assert oneshot.sensitive_layers("32") == tuple(sorted(decibels, key=decibels.get))


def test_layers_that_are_wide_already_are_not_widened(oneshot, monkeypatch):
    monkeypatch.setattr(
        oneshot, "base", Request(**(oneshot.base.model_dump() | {"weight_bits": 4, "activation_bits": 4}))
    )
    assert set(oneshot.sensitive_layers("8/8")) == {"3", "5"}


# ---- space, target, strategies ---------------------------------------------------------------------------------------


@pytest.fixture
def space(oneshot):
    return Space(oneshot.groups, 8, pruners=("l1-norm", "fpgm"), sensitive=("9", "0"))


def test_choices_leave_whole_multiples(space):
    assert [space.choices(group) for group in space.groups] == [(0.0, 0.5), (0.0, 0.5), (0.0, 0.25, 0.5, 0.75)]
    assert space.candidate({"5": 0.6, "0": 0.25}).ratios == (("0", 0.0), ("3", 0.0), ("5", 0.5))
    assert space.candidate({}, widened=1).layer_bits == (("9", "32"),)
    assert space.candidate({}, widened=1, quantizer="none").layer_bits == ()


def test_a_missed_limit_weighs_more_than_any_accuracy(oneshot):
    target, dense = Target(min_speedup=2.0), replace(oneshot.dense, latency_ms=2.0, accuracy=0.9)
    meets = replace(dense, latency_ms=1.0, accuracy=0.2)
    assert target.excess(1.0, 1, dense) == 1.0
    assert target.score(meets, dense) == pytest.approx(-70.0)
    assert target.score(dense, dense) == pytest.approx(-100.0)
    both = Target(min_speedup=2.0, max_size_mb=0.5)
    assert both.excess(1.0, 1_000_000, dense) == 2.0


def test_a_target_without_a_limit_or_out_of_range_is_refused():
    with pytest.raises(RequestError, match="give --min-speedup, --max-latency-ms or --max-size-mb"):
        Target()
    with pytest.raises(RequestError, match="max_accuracy_drop: got 101, expected a number of points from 0 to 100"):
        Target(101, min_speedup=2)
    with pytest.raises(RequestError, match="max_size_mb: got 0, expected a number above 0"):
        Target(max_size_mb=0)


def test_uniform_halves_its_way_to_the_smallest_ratio_that_is_fast_enough(space, oneshot):
    dense = replace(oneshot.dense, latency_ms=1.0)
    strategy = STRATEGIES["uniform"](Problem(space, Target(min_speedup=2.0), dense, 6))
    history, tried = [], []
    for _ in range(4):
        one = strategy.propose(history, 6 - len(history))
        ratio = dict(one.ratios)["5"]
        tried.append((ratio, one.pruner))
        history.append((one, replace(dense, latency_ms=1 - ratio)))
    assert tried == [(0.5, "l1-norm"), (0.25, "l1-norm"), (0.25, "l1-norm"), (0.5, "fpgm")]


def test_uniform_does_not_take_a_stand_in_for_the_share_that_could_not_be_made(space, oneshot):
    dense = replace(oneshot.dense, latency_ms=1.0)
    strategy = STRATEGIES["uniform"](Problem(space, Target(min_speedup=2.0), dense, 6))
    stand_in = space.candidate({"0": 0.5})
    assert strategy.propose([], 6) != stand_in
    slow = strategy.propose([(stand_in, dense)], 5)
    assert slow == space.uniform(0.225) != space.uniform(0.675)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_a_function_of_its_history(name, space, oneshot):
    if name == "amc":
        pytest.importorskip("stable_baselines3", reason="pip install -r requirements-search.txt")
    problem = Problem(space, Target(min_speedup=2.0), oneshot.dense, 20, seed=3)
    history = []
    for left in range(20, 8, -1):
        one = STRATEGIES[name](problem).propose(history, left)
        assert one == STRATEGIES[name](problem).propose(history, left)
        assert all(ratio in space.choices(g) for (_, ratio), g in zip(one.ratios, space.groups, strict=True))
        history.append((one, oneshot.dense))
