"""A local stand-in of the Hub's HTTP API: accounts, model repositories, commits, pull requests and large files.

It answers as the Hub documents it, so that the real client library is what is tested.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

WRITE, READ = "hf_write", "hf_read"
LARGE = 20_000
"""Bytes from which a file goes the way of large files."""


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)
    announced: dict[str, int | None] = field(default_factory=dict)
    """Bytes that a HEAD request is told, where they are not those of the file; None: nothing."""

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the stand-in holds; tests look at it and put things into it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""

    def visible(self, name: str, request: Request) -> Repository | Response:
        repository, token = self.repositories.get(name), _token(request)
        if repository is None or (repository.private and token not in (WRITE, READ)):
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository


def _refusal(status: int, code: str = "", text: str = "") -> Response:
    return JSONResponse({"error": text}, status, headers={"X-Error-Code": code, "X-Error-Message": text})


def _token(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _application(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def note(request: Request, call_next):
        hub.seen.append((request.method, request.url.path))
        return await call_next(request)

    _add_repositories(app, hub)
    _add_commits(app, hub)
    _add_reading(app, hub)
    return app


def _add_repositories(app: FastAPI, hub: Hub) -> None:
    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Response:
        content = (await request.json())["content"]
        valid = content.startswith("---\n") and "\n---" in content[4:]
        return JSONResponse(
            {"warnings": [], "errors": [] if valid else [{"message": "no metadata"}]}, 200 if valid else 400
        )

    @app.post("/api/repos/create")
    async def create(request: Request) -> Response:
        given = await request.json()
        name = f"{given.get('organization') or 'someone'}/{given['name']}"
        if _token(request) != WRITE:
            return _refusal(403, text="You don't have the rights to create a model under this namespace")
        if name in hub.repositories:
            return JSONResponse({"url": f"{hub.url}/{name}", "name": name}, 409)
        hub.repositories[name] = Repository(private=bool(given.get("private") or given.get("visibility") == "private"))
        return JSONResponse({"url": f"{hub.url}/{name}", "name": name})


def _add_commits(app: FastAPI, hub: Hub) -> None:
    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, revision: str, request: Request) -> Response:
        if _token(request) != WRITE:
            return _refusal(403, text="Forbidden")
        files = (await request.json())["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False,
                  "oid": None} for f in files]  # fmt: skip
        return JSONResponse({"files": modes})

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(owner: str, name: str, request: Request) -> Response:
        objects = (await request.json())["objects"]
        answers = [{**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in objects]
        return JSONResponse({"objects": answers, "transfer": "basic"})

    @app.put("/large/{oid}")
    async def upload(oid: str, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return _refusal(400, text="wrong hash")
        hub.large[oid] = content
        return Response()

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, revision: str, request: Request) -> Response:
        repository = hub.visible(f"{owner}/{name}", request)
        if isinstance(repository, Response):
            return repository
        added = _added(hub, await request.body())
        answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{owner}/{name}/commit/{'0' * 40}"}
        if request.query_params.get("create_pr"):
            repository.pull_requests.append(added)
            answer["pullRequestUrl"] = f"{hub.url}/{owner}/{name}/discussions/{len(repository.pull_requests)}"
        else:
            repository.files |= added
        return JSONResponse(answer)


def _added(hub: Hub, body: bytes) -> dict[str, bytes]:
    """The files of a commit's lines of JSON."""
    added = {}
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            added[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            added[value["path"]] = hub.large[value["oid"]]
    return added


def _add_reading(app: FastAPI, hub: Hub) -> None:
    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    async def info(owner: str, name: str, request: Request, revision: str = "main") -> Response:
        repository = hub.visible(f"{owner}/{name}", request)
        if isinstance(repository, Response):
            return repository
        if revision not in ("main", repository.sha):
            return _refusal(404, "RevisionNotFound", "Invalid rev id")
        return JSONResponse(
            {
                "id": f"{owner}/{name}", "sha": repository.sha, "private": repository.private, "tags": [],
                "siblings": [{"rfilename": file} for file in sorted(repository.files)],
            }
        )  # fmt: skip

    @app.api_route("/{owner}/{name}/resolve/{revision}/{file:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, revision: str, file: str, request: Request) -> Response:
        repository = hub.visible(f"{owner}/{name}", request)
        if isinstance(repository, Response):
            return repository
        if repository.gated:
            return _refusal(403, "GatedRepo", "Access is restricted")
        if file not in repository.files:
            return _refusal(404, "EntryNotFound", "Entry not found")
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                   "Content-Length": str(len(content))}  # fmt: skip
        if request.method != "HEAD":
            return Response(content, headers=headers)
        size = repository.announced.get(file, len(content))
        if size is None:
            return StreamingResponse(iter(()), headers={name: headers[name] for name in ("X-Repo-Commit", "ETag")})
        return Response(b"", headers=headers | {"Content-Length": str(size)})


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """The stand-in on a free port of this machine, until the block ends."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(_application(hub), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
