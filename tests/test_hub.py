"""Checkpoints from the Hub and runs to it, through the real client against a local stand-in of its HTTP API."""

from __future__ import annotations

import hashlib
import json
import socket

import gradio as gr
import hub_server
import pytest
import torch
import torchvision
from example_report import example_report
from huggingface_hub import constants
from safetensors.torch import save
from test_cli import call

from compress import hub, signing
from compress.errors import CheckpointError, PublishingError, RequestError, RunError
from compress.files import sha256
from compress.report import card
from compress.request import Request
from compress.ui import sharing
from compress.ui.web.settings import Settings
from compress.workload import open_workload


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.running() as running:
        _use(monkeypatch, tmp_path, running.url)
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
        yield running


def _use(monkeypatch, tmp_path, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run, as far as publishing looks at it."""
    folder = tmp_path / "run"
    report = example_report()
    files = {
        "README.md": card.model_card(report).encode(),
        "report.json": report.to_json().encode(),
        "artifacts/model.safetensors": save({"weight": torch.arange(9000.0)}),
        "artifacts/infer.py": b"print('hello')\n",
        "request.json": b'{"data": "/srv/uploads/pets.zip"}',
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listed = {name: {"sha256": sha256(folder / name), "bytes": len(content)} for name, content in files.items()}
    document = {"format": 1, "files": listed}
    (folder / "manifest.json").write_text(signing.sealed("manifest.json", document))
    (folder / "log.txt").write_text("not a result")
    return folder


# ---- to the Hub ------------------------------------------------------------------------------------------------------


def test_the_files_of_the_manifest_but_the_request_arrive_in_a_private_repository(server, run):
    done = hub.publish(run, "team/small")
    repository = server.repositories["team/small"]
    assert repository.private and done.private
    assert set(repository.files) == {
        "README.md", "report.json", "artifacts/model.safetensors", "artifacts/infer.py", "manifest.json"
    }  # fmt: skip
    sent = dict(repository.files)
    told = json.loads(sent.pop("manifest.json"))
    assert all(content == (run / name).read_bytes() for name, content in sent.items())
    assert {name: entry["sha256"] for name, entry in told["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in sent.items()
    }
    assert len(server.large) == 1, "the weights went the way of large files"
    assert done.url == f"{server.url}/team/small/commit/{'0' * 40}" and done.files == 5


def test_nothing_that_is_published_names_the_folder_of_the_run(server, run, tmp_path):
    job_id = "0123456789abcdef" * 2
    folder = tmp_path / "runs" / job_id
    report = example_report()
    asked = report.request | {"data": f"{folder}/uploads/data/pets.zip", "checkpoint": f"{folder}/uploads/w.pth"}
    for text in (card.model_card(report.model_copy(update={"request": asked})),
                 card.html_report(report.model_copy(update={"request": asked}))):  # fmt: skip
        assert job_id not in text and str(tmp_path) not in text and "pets.zip" in text and "w.pth" in text
    folder.parent.mkdir()
    run.rename(folder)
    document = signing.unchecked(folder / "manifest.json")
    own = {name: value for name, value in document.items() if name in ("format", "files")}
    (folder / "manifest.json").write_text(signing.sealed("manifest.json", own, folder / "manifest.json"))
    assert job_id in (folder / "manifest.json").read_text(), "it is signed for this run"
    assert hub.publish(folder, "team/small").files == 5
    assert not any(job_id.encode() in content for content in server.repositories["team/small"].files.values())


@pytest.mark.parametrize("name", ["README.md", "report.json"])
def test_a_run_of_an_earlier_version_that_names_its_folder_is_not_published(name, server, run):
    (run / name).write_text(f"{run}/uploads/pets.zip")
    document = signing.unchecked(run / "manifest.json")
    del document["signature"]
    document["files"][name] = {"sha256": sha256(run / name), "bytes": (run / name).stat().st_size}
    (run / "manifest.json").write_text(signing.sealed("manifest.json", document))
    with pytest.raises(PublishingError, match=f"{name} of this run names the folder where it lies on this machine"):
        hub.publish(run, "team/small")
    assert server.seen == []


def test_public_only_when_asked_and_never_changed_afterwards(server, run):
    assert not hub.publish(run, "team/small", private=False).private
    assert not hub.publish(run, "team/small", private=True).private, "a repository that is there keeps its visibility"


def test_a_pull_request_changes_nothing_in_the_repository(server, run):
    server.repositories["else/model"] = hub_server.Repository(files={"README.md": b"theirs"})
    done = hub.publish(run, "else/model", pull_request=True)
    assert done.url == f"{server.url}/else/model/discussions/1"
    assert server.repositories["else/model"].files == {"README.md": b"theirs"}
    assert set(server.repositories["else/model"].pull_requests[0]) >= {"README.md", "manifest.json"}
    assert ("POST", "/api/repos/create") not in server.seen


def test_a_changed_file_is_found_before_anything_is_sent(server, run):
    (run / "artifacts/infer.py").write_text("changed")
    with pytest.raises(PublishingError) as refused:
        hub.publish(run, "team/small")
    assert str(refused.value) == (
        "This run is not published because it does not verify: artifacts/infer.py was changed after the run: its sha256 "
        "differs from the manifest"
    )
    assert server.seen == []


def test_a_token_that_may_not_write(server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.READ)
    with pytest.raises(PublishingError) as refused:
        hub.publish(run, "team/small")
    assert str(refused.value) == (
        "The Hub answered 403: this token may not write to team/small. Choose a repository of your own, ask for a pull "
        "request, or make a token with write access."
    )
    assert hub_server.READ not in str(refused.value)


def test_without_a_token_or_a_name(server, run, monkeypatch):
    with pytest.raises(RequestError, match="expected owner/name, such as my-team/small-resnet18"):
        hub.publish(run, "small")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishingError, match="put it into the environment variable HF_TOKEN"):
        hub.publish(run, "team/small")
    assert server.seen == []


def test_the_shell_command(server, run, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "publish", run, "team/small")
    assert code == 0
    assert out == f"5 files are in team/small (private).\n{server.url}/team/small/commit/{'0' * 40}\n"


# ---- from the Hub ----------------------------------------------------------------------------------------------------


def weights(classes=10):
    torch.manual_seed(3)
    return torchvision.models.mobilenet_v3_small(num_classes=classes).eval()


def test_a_checkpoint_of_the_hub_is_read_like_a_file(server):
    model = weights()
    server.repositories["team/net"] = hub_server.Repository(
        private=True, files={"README.md": b"", "model.safetensors": save(model.state_dict()), "old.pth": b"x"}
    )
    request = Request(model="mobilenet_v3_small", checkpoint="hf://team/net", data="none", input_size=32)
    source = open_workload(request)
    sha = server.repositories["team/net"].sha
    assert source.weights == f"model.safetensors of team/net on the Hub at {sha[:7]}"
    with torch.no_grad():
        assert torch.equal(source.model(source.example), model(source.example))
    (fetched,) = [path for method, path in server.seen if method == "GET" and "/resolve/" in path]
    assert fetched == f"/team/net/resolve/{sha}/model.safetensors", "the commit that was looked at, not a branch"


@pytest.mark.parametrize(
    ("files", "reference", "sentence"),
    [
        (
            {"a.pth": b"", "b.pth": b""},
            "hf://team/net",
            "has 2 checkpoints (a.pth, b.pth); name one: hf://team/net/a.pth.",
        ),
        (
            {"config.json": b""},
            "hf://team/net",
            "has no checkpoint: a file that ends with .safetensors, .pth, .pt, .bin",
        ),
        ({"a.pth": b""}, "hf://team/net/c.pth", "team/net has no file c.pth. Its checkpoints: a.pth."),
        ({"a.pth": b""}, "hf://team/net@v2", "has no such branch, tag or commit; leave @revision out"),
        ({"a.pth": b""}, "hf://team/other", "shows no model repository team/other: check the name, or give HF_TOKEN"),
    ],
)
def test_what_cannot_be_meant_gets_one_sentence(server, files, reference, sentence):
    server.repositories["team/net"] = hub_server.Repository(files=files)
    with pytest.raises(CheckpointError) as refused:
        hub.download(reference)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_gated_repository_says_where_to_accept_its_terms(server):
    server.repositories["team/net"] = hub_server.Repository(gated=True, files={"a.pth": b""})
    with pytest.raises(CheckpointError, match="team/net asks for its terms to be accepted on"):
        hub.download("hf://team/net")


@pytest.mark.parametrize("reference", ["hf://", "hf://net", "hf://team/net@", "hf://team/../net", "hf://team/net/../x"])
def test_other_references_are_refused_before_any_request(server, reference):
    with pytest.raises((RequestError, CheckpointError)):
        hub.download(reference)
    assert all(".." not in path for _, path in server.seen)


def test_without_a_network_both_ways_say_so(monkeypatch, tmp_path, run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    _use(monkeypatch, tmp_path, url)
    with pytest.raises(CheckpointError) as refused:
        hub.download("hf://team/net")
    assert str(refused.value) == (
        f"{url} cannot be reached from this machine (ConnectError): check the network, or give the checkpoint as a file."
    )
    with pytest.raises(PublishingError, match="check the network, or publish later: the run stays as it is."):
        hub.publish(run, "team/small", token="hf_x")


def cached(tmp_path) -> int:
    """Bytes of all files in the Hub's cache but its own marks."""
    files = [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files if "blobs" in path.parts or "snapshots" in path.parts)


def fetches(server) -> int:
    return sum(method == "GET" and "/resolve/" in path for method, path in server.seen)


def test_a_file_that_is_too_large_is_not_fetched(server, tmp_path):
    server.repositories["team/net"] = hub_server.Repository(
        files={"w.pth": b"x" * 1000}, announced={"w.pth": 2_600_000_000}
    )
    with pytest.raises(CheckpointError) as refused:
        hub.download("hf://team/net")
    assert str(refused.value) == (
        "w.pth of team/net has 2.4 GiB; at most 2 GiB are accepted: save the weights alone, in float16."
    )
    assert fetches(server) == 0 and cached(tmp_path) == 0


def test_a_file_without_a_size_is_not_fetched(server, tmp_path):
    server.repositories["team/net"] = hub_server.Repository(files={"w.pth": b"x" * 1000}, announced={"w.pth": None})
    with pytest.raises(CheckpointError, match="does not say how large w.pth of team/net is"):
        hub.download("hf://team/net")
    assert fetches(server) == 0


def test_a_download_ends_when_more_arrives_than_was_announced(server, tmp_path):
    server.repositories["team/net"] = hub_server.Repository(files={"w.pth": bytes(50_000)}, announced={"w.pth": 1000})
    with pytest.raises(CheckpointError, match="sends more of w.pth of team/net than the 1,000 bytes that it announced"):
        hub.download("hf://team/net")
    assert cached(tmp_path) == 0


def test_a_download_of_fewer_bytes_than_announced_is_incomplete(server, tmp_path):
    server.repositories["team/net"] = hub_server.Repository(files={"w.pth": bytes(1000)}, announced={"w.pth": 2000})
    with pytest.raises(CheckpointError, match="sent of team/net is incomplete: try again, or give the checkpoint as a"):
        hub.download("hf://team/net")
    assert cached(tmp_path) == 0


def test_a_download_leaves_the_disk_some_room(server, tmp_path, monkeypatch):
    server.repositories["team/net"] = hub_server.Repository(files={"w.pth": b"x" * 1000})
    monkeypatch.setattr(hub, "FREE_BYTES", 2**60)
    with pytest.raises(CheckpointError, match=r"There is no room for w.pth of team/net \(0 MiB\)"):
        hub.download("hf://team/net")
    assert fetches(server) == 0


@pytest.mark.parametrize("before", [False, True])
def test_what_is_refused_does_not_stay_in_the_cache(before, server, tmp_path):
    server.repositories["team/net"] = hub_server.Repository(files={"w.pth": b"x" * 1000})
    if before:
        hub.download("hf://team/net")
    with pytest.raises(CheckpointError, match="is neither a .safetensors file nor"):
        open_workload(Request(model="resnet18", checkpoint="hf://team/net", data="none"))
    assert cached(tmp_path) == (1000 if before else 0), "what was there before belongs to somebody"


def test_file_names_of_a_repository_can_be_shown(server):
    server.repositories["team/net"] = hub_server.Repository(files={"a\x1b[2J.pth": b"", "b.pth": b""})
    with pytest.raises(CheckpointError, match=r"has a file a<U\+001B>\[2J.pth, whose name holds a control character"):
        hub.download("hf://team/net")


# ---- from the page ---------------------------------------------------------------------------------------------------


class FinishedRuns:
    """As much of the queue as publishing asks for."""

    def __init__(self, folder):
        self._folder = folder

    def artifacts(self, job_id):
        if job_id != "done":
            raise RunError("This run has no files yet: it is running.")
        return {}

    def folder(self, job_id):
        return self._folder


def pressed(run, job_id, repository, host="127.0.0.1", public=False, pull_request=False, allowed_hosts=()):
    publish = sharing.publisher(FinishedRuns(run), Settings(host=host, allowed_hosts=allowed_hosts))
    return publish(job_id, repository, public, pull_request)


def test_the_button_publishes_and_links_to_the_commit(server, run):
    shown = pressed(run, "done", " team/small ")
    assert "5 files are in team/small (private)" in shown and f'href="{server.url}/team/small/commit/' in shown
    assert "(public)" in pressed(run, "done", "team/open", public=True)


def test_what_is_refused_is_shown_as_text(server, run):
    assert "This run has no files yet" in pressed(run, "busy", "team/small")
    assert "repository: got &#x27;&lt;b&gt;&#x27;, expected owner/name" in pressed(run, "done", "<b>")


@pytest.mark.parametrize("reached", [{"host": "0.0.0.0"}, {"allowed_hosts": ("app.example",)}])
def test_nobody_else_publishes_with_the_servers_token(server, run, reached):
    shown = pressed(run, "done", "team/small", **reached)
    assert "everybody who reaches it would do so with its token" in shown and server.seen == []


def test_a_space_asks_to_log_in(monkeypatch, run):
    monkeypatch.setenv("SPACE_ID", "team/espalier")
    assert not sharing.asks_to_log_in(dict(SPACE_ID="team/espalier"))
    monkeypatch.setenv("OAUTH_CLIENT_ID", "id")
    publish = sharing.publisher(FinishedRuns(run), Settings(host="0.0.0.0"))
    assert publish.__annotations__["token"] == gr.OAuthToken | None
    assert "Log in first" in publish("done", "team/small", False, False, None)
