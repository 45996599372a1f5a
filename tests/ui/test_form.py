"""The form's values as a request, the words for it, the settings of the server, the check in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from example_report import example_report
from places import ROOT

from compress.errors import CompressError, RequestError, RunError
from compress.jobs import Queue
from compress.jobs.retention import Limits
from compress.report import charts
from compress.request import Request
from compress.ui import backend
from compress.ui.estimates import Structure
from compress.ui.form import folded_fields, main_fields, more_fields, to_request
from compress.ui.handlers import App, PageState, Visitor
from compress.ui.narrow import fit_narrow
from compress.ui.views import results, start
from compress.ui.web.settings import Settings, prepare_environment

VISIT = Visitor("10.0.0.1", "http://here/")


def no_images(folder: Path, image: Path) -> dict[str, Any]:
    raise AssertionError("no image was given")


def no_count(structure: Structure) -> dict[str, Any]:
    raise AssertionError("nothing is counted while a page is built")


@pytest.fixture(scope="module")
def untouched() -> dict[str, Any]:
    return form_values()


def form_values() -> dict[str, Any]:
    """The form's values as the page opens."""
    with gr.Blocks(analytics_enabled=False):
        fields = main_fields(("resnet18", "resnet50")) | more_fields()
    return {name: field.value for name, field in fields.items()}


def test_the_untouched_form_is_the_default_request(untouched: dict[str, Any]) -> None:
    assert to_request(untouched) == (Request(), {})


def test_every_field_of_a_request_is_in_the_form() -> None:
    folded = [name for names in folded_fields().values() for name in names]
    assert len(folded) == len(set(folded))
    assert set(folded) | {"model", "checkpoint", "data", "sparsity", "quantizer", "weight_bits"} == set(
        Request.model_fields
    )
    assert "More" not in folded_fields(), "a new field of Request deserves its heading in SECTIONS"


@pytest.mark.parametrize(
    ("changed", "field", "value"),
    [
        ({"sparsity": 35}, "sparsity", 0.35),
        ({"bits": 4}, "activation_bits", 4),
        ({"bits": 4, "activation_bits": "8"}, "activation_bits", 8),
        ({"arithmetic": "half"}, "weight_bits", 16),
        ({"arithmetic": "full"}, "quantizer", "none"),
        ({"images": "none"}, "data", "none"),
        ({"weights": "random"}, "checkpoint", "random"),
        ({"mean": "0.1 0.2, 0.3", "std": "1,1,1"}, "mean", (0.1, 0.2, 0.3)),
        ({"input_size": "64"}, "input_size", 64),
        ({"exclude": "layer1.0.conv1, fc"}, "exclude", ("layer1.0.conv1", "fc")),
        ({"augment": True}, "augment", True),
        ({"pruner": "fpgm"}, "pruner", "fpgm"),
    ],
)
def test_a_changed_field_reaches_the_request(
    untouched: dict[str, Any], changed: dict[str, Any], field: str, value: Any
) -> None:
    request, _ = to_request(untouched | changed)
    assert getattr(request, field) == value


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": None}, "model: got '', expected the name of a torchvision classifier"),
        ({"mean": "0.5, x, 0.5"}, "expected three numbers"),
        ({"input_size": "big"}, "input_size: got 'big', expected a whole number of pixels"),
        ({"images": "upload"}, "No .zip of images was chosen: upload one"),
        ({"arithmetic": "full", "pruner": "none"}, "expected something to do"),
    ],
)
def test_what_cannot_work_is_refused(untouched: dict[str, Any], changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompressError, match=sentence):
        to_request(untouched | changed)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {},
            "50 % of the channels go: about 1/4 of the parameters stay. "
            "8-bit integers take a quarter of the space of 32-bit numbers.",
        ),
        (
            {"sparsity": 0.25, "weight_bits": 4, "activation_bits": 4},
            "about 56 % of the parameters stay. 4-bit weights are trained on their grid and kept in 8-bit",
        ),
        ({"pruner": "none"}, "No channels are removed."),
        ({"pruner": "level"}, "50 % of the weights become zero; no layer gets smaller or faster."),
        ({"quantizer": "none", "weight_bits": 32, "activation_bits": 32}, "Numbers keep their 32 bits."),
    ],
)
def test_the_settings_are_put_into_words(given: dict[str, Any], words: str) -> None:
    assert words in start.explain(Request(**given), None)


def test_the_estimate_is_in_the_models_own_numbers() -> None:
    shown = start.explain(Request(), 11_689_512)
    assert "11.7 million → about <b>2.9 million</b>" in shown
    assert "46.8 MB → about <b>2.9 MB</b>" in shown


def profile(parameters: int, left: int) -> dict[str, Any]:
    row = {"parameters": left, "macs": 9_500_000, "groups": [[0, 64, 32, 1]], "left_out": [[2, 3]]}
    return {
        "parameters": parameters,
        "macs": 37_000_000,
        "rows": {str(percent): row for percent in range(1, 100)},
        "words": ["conv1 layer1.0.conv2", "their <outputs> are added", "fc", "gives the answer"],
    }


def test_the_estimate_is_looked_up_once_it_was_counted(tmp_path: Path) -> None:
    counted = []

    def count(structure: Structure) -> dict[str, Any]:
        counted.append(structure)
        return profile(11_181_642, 3_000_000)

    offers = [backend.Offer("resnet18", 11_689_512, 224)]
    app = App(Queue(tmp_path), dict, Settings(data=tmp_path), offers, no_images, count)
    rough = app.explain(form_values())["meaning"]
    assert "11.7 million → about <b>2.9 million</b>" in rough and "A rule of thumb" in rough
    shown = app.explain_counted(form_values())["meaning"]
    assert counted == [Structure("resnet18", 10, 32, 8)]
    assert "11.2 million → about <b>3.0 million</b>" in shown and "37.0 million → about <b>9.5 million</b>" in shown
    assert "44.7 MB → about <b>3.0 MB</b>" in shown
    assert "Counted from the plan for resnet18 with 10 classes at 32 × 32 pixels." in shown
    assert "Layers that shrink (2)" in shown and "conv1, layer1.0.conv2" in shown
    assert "their &lt;outputs&gt; are added" in shown and "Layers that are not pruned (1)" in shown
    assert app.explain_counted(form_values()) == {} and app.explain(form_values())["meaning"] == shown
    again = App(Queue(tmp_path), dict, Settings(data=tmp_path), offers, no_images, no_count)
    assert again.explain(form_values())["meaning"] == shown, "kept on disk"
    assert "Exclude not counted." in app.explain(form_values() | {"exclude": "fc"})["meaning"]
    app.explain_counted(form_values() | {"images": "upload", "input_size": "64", "channel_multiple": 4})
    assert counted[1:] == [Structure("resnet18", 1000, 64, 4)]
    nothing = app.explain(form_values() | {"pruner": "none"})["meaning"]
    assert "No channels are removed." in nothing and "Counted" not in nothing


def test_a_model_that_cannot_be_counted_keeps_the_rough_estimate(tmp_path: Path) -> None:
    def count(structure: Structure) -> dict[str, Any]:
        raise RunError("it took too long")

    app = App(Queue(tmp_path), dict, Settings(data=tmp_path), [backend.Offer("resnet18", 11_689_512)], no_images, count)
    assert app.explain_counted(form_values()) == {}
    assert "A rule of thumb" in app.explain(form_values())["meaning"]


def test_a_public_server_lists_only_the_visitors_own_runs(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    mine, _ = queue.submit(Request()), queue.submit(Request(seed=1))
    context = f'{{"job": "", "mine": ["{mine}", "{"0" * 32}", 7], "viewport": "light wide"}}'
    public = App(queue, dict, Settings(data=tmp_path, host="0.0.0.0"), (), no_images, no_count)
    assert public.open(VISIT, context)["runs"].count("<li>") == 1 and mine in public.open(VISIT, context)["runs"]
    assert mine in public.search("RESNET18 queued", context)["runs"]
    assert public.search("seed", context)["runs"] == '<p class="soft" role="status">No run matches.</p>'
    local = App(queue, dict, Settings(data=tmp_path), (), no_images, no_count)
    assert local.open(VISIT, context)["runs"].count("<li>") == 2
    unlisted = App(queue, dict, Settings(data=tmp_path, list_runs=False), (), no_images, no_count)
    assert "No runs yet" in unlisted.open(VISIT, "nonsense")["runs"]


def test_the_form_is_filled_with_a_run_and_takes_its_uploads_again(tmp_path: Path, untouched: dict[str, Any]) -> None:
    queue = Queue(tmp_path)
    weights = tmp_path / "mine.pth"
    weights.write_bytes(b"w")
    first = queue.submit(Request(sparsity=0.333), files={"checkpoint": weights})
    weights.unlink()
    app = App(queue, dict, Settings(data=tmp_path), (), no_images, no_count)
    filled = app.open(VISIT, f'{{"again": "{first}"}}')
    assert (filled["again"], filled["weights"], filled["sparsity"]["value"]) == (first, "upload", 33.3)
    assert "mine.pth is used again unless you upload another" in filled["again_note"]
    values = untouched | {name: filled[name] for name in untouched if name in filled} | {"sparsity": 33.3, "seed": 5}
    submitted = app.submit(VISIT, values, first, "light wide")
    again = queue.request(submitted["job"])
    assert (again.sparsity, again.seed) == (0.333, 5)
    assert Path(again.checkpoint).read_bytes() == b"w"
    assert Path(again.checkpoint).is_relative_to(tmp_path / "runs" / submitted["job"])
    assert "http://here/" in submitted["settings"] and str(tmp_path) not in submitted["settings"]
    assert "There is no run" in app.open(VISIT, f'{{"again": "{"0" * 32}"}}')["notice"]


def test_a_visitor_is_a_login_name_or_an_address(tmp_path: Path) -> None:
    queue = Queue(tmp_path, max_per_owner=1)
    app = App(queue, dict, Settings(data=tmp_path), (), no_images, no_count)
    assert "job" in app.submit(VISIT, form_values(), "", "")
    assert "this server allows 1 for each user" in app.submit(VISIT, form_values(), "", "")["notice"]
    assert "job" in app.submit(Visitor("somebody else", "http://here/"), form_values(), "", "")


def test_what_the_browser_tells_is_taken_only_in_its_form() -> None:
    assert PageState.read('{"mine": "x", "compare": {"a": 1}, "ticked": [1, "b"], "job": 7, "viewport": null}') == PageState(
        job="7", key="", again="", compare=None, mine=(), ticked=("b",), viewport=""
    )
    assert PageState.read("[]") == PageState.read("no json") == PageState.read("")
    assert len(PageState.read(json.dumps({"mine": ["a"] * 5000})).mine) == 200, "no page keeps more"
    assert PageState.read('{"compare": [""]}').compare == ("",), "the page of all runs, with none ticked"


def test_narrow_charts_keep_their_data() -> None:
    for key, wide in charts.figures(example_report()).items():
        points = [len(trace.x) for trace in wide.data]
        slim = fit_narrow(wide)
        assert [len(trace.x) for trace in slim.data] == points, key
        assert slim.layout.font.size == 10
        assert slim.layout.margin.l < 20


def test_settings_come_from_the_environment() -> None:
    given = {
        "ESPALIER_DATA": "/data",
        "ESPALIER_HOST": "0.0.0.0",
        "ESPALIER_PORT": "80",
        "ESPALIER_RUNS_AT_ONCE": "2",
        "ESPALIER_MAX_QUEUED": "5",
        "ESPALIER_MAX_PER_VISITOR": "3",
        "ESPALIER_RUN_LIMIT_MIN": "90",
        "ESPALIER_KEEP_DAYS": "30",
        "ESPALIER_MAX_DISK_GB": "50",
        "ESPALIER_MAX_UPLOAD_MB": "10",
        "ESPALIER_LIST_RUNS": "1",
        "ESPALIER_ALLOWED_HOSTS": "a.example, b.example",
        "ESPALIER_LOGIN": "ada:correct:horse bob:long-enough",
    }
    settings = Settings.from_environment(given)
    assert settings == Settings(
        data=Path("/data"),
        host="0.0.0.0",
        port=80,
        at_once=2,
        max_queued=5,
        max_per_visitor=3,
        run_limit_min=90,
        keep_days=30,
        max_disk_gb=50,
        max_upload_mb=10,
        list_runs=True,
        allowed_hosts=("a.example", "b.example"),
        accounts=(("ada", "correct:horse"), ("bob", "long-enough")),
    )
    assert settings.queue_limits == {
        "at_once": 2, "max_queued": 5, "max_per_owner": 3, "max_seconds": 5400, "keeping": Limits(30, 50 * 10**9)
    }  # fmt: skip
    assert settings.hosts[-2:] == ("a.example", "b.example")
    assert Settings().hosts == ("127.0.0.1", "localhost", "::1") and not Settings().answers_to_addresses
    assert Settings(host="0.0.0.0").hosts == (*Settings().hosts, "0.0.0.0") and Settings(host="0.0.0.0").answers_to_addresses
    behind_a_proxy = Settings(allowed_hosts=("app.example",))
    assert (behind_a_proxy.local, behind_a_proxy.lists_all_runs) == (False, False), "strangers reach it by that name"
    assert "app.example" in behind_a_proxy.hosts and "127.0.0.1" in behind_a_proxy.hosts
    assert (Settings().lists_all_runs, Settings(host="0.0.0.0").lists_all_runs) == (True, False)
    for variable, text, allowed in (
        ("ESPALIER_PORT", "0", "a whole number from 1 to 65535"),
        ("ESPALIER_LIST_RUNS", "yes", "0 or 1"),
        ("ESPALIER_CLUSTER_GPUS", "1.5", "a number from 0 to 1, or a whole number"),
    ):
        with pytest.raises(RequestError, match=f"{variable}: got '{text}', expected {allowed}"):
            Settings.from_environment({variable: text})


def test_the_environment_switches_off_telemetry_and_history(tmp_path: Path) -> None:
    environ: dict[str, str] = {"GRADIO_ANALYTICS_ENABLED": "True"}
    prepare_environment(environ, Settings(data=tmp_path))
    assert environ["GRADIO_ANALYTICS_ENABLED"] == environ["GRADIO_RUN_HISTORY"] == environ["GRADIO_SHARE"] == "False"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environ["GRADIO_TEMP_DIR"] == str(tmp_path / "gradio")


def test_the_server_never_imports_torch() -> None:
    words = (
        "import sys; sys.path.insert(0, sys.argv[1]); import compress.ui.web.server; "
        "sys.exit('torch' in sys.modules or 'nni' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", words, str(ROOT)],
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
        timeout=60,
    )
    assert ended.returncode == 0


def test_a_bad_result_is_not_dressed_up() -> None:
    report = example_report()
    good = results.verdict(report)
    assert 'class="bad"' not in good and "<b>−0.5</b>" in good and "<b>12.1×</b><span>faster</span>" in good
    facts = report.verdict.model_copy(update={"speedup_vs_fastest_fp32": 0.8, "accuracy_drop_points": 33.2})
    bad = results.verdict(report.model_copy(update={"verdict": facts}))
    assert '<li class="bad"><b>0.8×</b><span>as fast</span>' in bad
    assert '<li class="bad"><b>−33.2</b>' in bad
    nothing = {"speedup_vs_fastest_fp32": None, "accuracy_drop_points": None, "runtime": None, "size_ratio": None}
    unknown = results.verdict(report.model_copy(update={"verdict": report.verdict.model_copy(update=nothing)}))
    assert unknown.count("<b>—</b>") == 3 and unknown.count("not measured") == 2


def test_the_models_on_offer_are_listed_once_for_each_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(*words: str, limit_s: float) -> list[dict[str, Any]]:
        asked.append(words)
        return [{"name": "resnet18", "parameters": 11_689_512, "input_size": 224}]

    monkeypatch.setattr(backend, "call", ask)
    for _ in range(2):
        assert backend.models(tmp_path / "models.json") == (backend.Offer("resnet18", 11_689_512),)
    monkeypatch.setattr(backend, "version", lambda package: "99")
    backend.models(tmp_path / "models.json")
    assert asked == [("models",), ("models",)]


@pytest.mark.parametrize(
    ("output", "printed", "code", "expected"),
    [
        ('{"possible": false}', "", 1, {"possible": False}),
        (
            '{"error": {"type": "CheckpointError", "message": "fc.weight holds NaN."}}',
            "warning\nError: fc.weight holds NaN.",
            1,
            CompressError("fc.weight holds NaN."),
        ),
        (
            "",
            "Segmentation fault",
            -11,
            RunError("`compress check` ended without an answer (exit code -11). Check the installation."),
        ),
    ],
)
def test_the_answer_of_a_check_in_its_own_process(output: str, printed: str, code: int, expected: Any) -> None:
    if isinstance(expected, dict):
        assert backend._answer("check", output, printed, code) == expected
    else:
        with pytest.raises(type(expected)) as refused:
            backend._answer("check", output, printed, code)
        assert str(refused.value) == str(expected)


@pytest.mark.parametrize("typed", ["team/net", " https://huggingface.co/team/net/ ", "hf://team/net"])
def test_a_repository_of_the_hub_is_a_source_of_weights(untouched, typed):
    request, files = to_request(untouched | {"weights": "hub", "hub": typed, "model": "resnet50"})
    assert request.checkpoint == "hf://team/net" and files == {}
    with pytest.raises(CompressError, match="No repository was named: write owner/name"):
        to_request(untouched | {"weights": "hub", "hub": " "})
